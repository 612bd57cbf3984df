"""An encoder's scores are transformers' own for each item alone, whatever the item is given as and in whatever company.

What is expected is computed by transformers from the directory, one item at a time and unpadded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto import modeling_auto

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.place import place_reward_group
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.shells import ACTORS
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.actors.workers.encoder import EncoderRewardWorker
from rlhf_ray.actors.workers.registry import WORKERS
from rlhf_ray.actors.workers.reward import RewardSetup
from rlhf_ray.cli.main import main
from rlhf_ray.config.files.encoders import ENCODERS as KINDS
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.run import ClusterConfig
from rlhf_ray.data.tokenizers import fingerprint
from rlhf_ray.errors import ConfigError, ModelLoadError
from rlhf_ray.launch.evaluate import evaluate_pairs
from rlhf_ray.models import Actor, get_llm_for_sequence_regression
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.rows.preferences import PreferenceReader
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import make_schedule

from ..models.encoders import ENCODERS, POSITIONS, save_encoder

Texts = tuple[str, ...]


def words(first: int, count: int) -> str:
    return " ".join(f"w{4 + (first + 7 * number) % 60}" for number in range(count))


PAIRS: list[Texts] = [(words(3 * n, 1 + n % 9), words(5 * n + 1, 1 + (n * n) % 23)) for n in range(24)]
ALONE: list[Texts] = [(words(9 * n, 2 + 5 * n),) for n in range(6)]


def group_of(path: Path, *, max_tokens: int = 200, **model: object) -> RewardGroup:
    role = ScoringRole.model_validate({"model": {"path": str(path), "dtype": "fp32", **model}})
    setup = RewardSetup(role, seed=0, max_tokens=max_tokens, max_item_tokens=4096)
    return place_reward_group(ThisProcess(ClusterConfig()), setup).load().result()


class Reference:
    """The scores of plain transformers."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def score(self, *texts: str) -> float:
        return float(self.model(**self.tokenizer(*texts, return_tensors="pt")).logits[0, 0])


def scores_of(group: RewardGroup, requests: list[ScoreRequest]) -> list[float | None]:
    return [result.raw for result in group.score(requests).result()]


@pytest.mark.parametrize("kind", ENCODERS)
def test_scores_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    path = save_encoder(kind, tmp_path)
    reference, group = Reference(path), group_of(path)
    requests = [ScoreRequest(prompt=prompt, response=response) for prompt, response in PAIRS]
    requests += [ScoreRequest(text=text) for (text,) in ALONE]
    requests += [ScoreRequest(messages=({"role": "user", "content": one}, {"role": "assistant", "content": two}))
                 for one, two in PAIRS[:3]]  # fmt: skip
    ids = reference.tokenizer(*PAIRS[4])["input_ids"]
    requests.append(ScoreRequest(token_ids=tuple(ids)))
    expected = [reference.score(*texts) for texts in [*PAIRS, *ALONE, *PAIRS[:3], PAIRS[4]]]
    assert torch.tensor(expected).std() > 0.05, "scores that hardly differ compare nothing"
    torch.testing.assert_close(torch.tensor(scores_of(group, requests)), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert ("equal lengths" in group.report_line) == (kind == "fnet")
    limit = group.describe().result()["max_tokens"]
    assert limit == POSITIONS - 4 * ("roberta" in kind)
    longest = ScoreRequest(text=words(1, limit - 2))
    assert scores_of(group, [longest]) == [pytest.approx(reference.score(longest.text or ""), abs=1e-5)]
    (refused,) = group.score([ScoreRequest(text=words(1, limit - 1))]).result()
    assert f"has {limit + 1} tokens, the limit is {limit}" in str(refused.error)


def test_the_last_layer_runs_for_the_first_token_where_the_head_reads_no_other(tmp_path: Path) -> None:
    for kind, expected in (("bert", 1), ("deberta-v2", 1), ("fnet", 9)):
        worker = EncoderRewardWorker()
        group = RewardGroup(InProcessRanks("reward", worker))
        path = save_encoder(kind, tmp_path / kind)
        role = ScoringRole.model_validate({"model": {"path": str(path), "dtype": "fp32"}})
        group.setup(RewardSetup(role, seed=0), timeout_s=60).result()
        read: list[int] = []
        layers = [module for name, module in worker.encoder.model.named_modules() if name.endswith("encoder.layer")]
        layers[0][-1].output.register_forward_hook(lambda _, __, out, read=read: read.append(out.shape[1]))
        score = Reference(path).score(words(1, 7))
        assert scores_of(group, [ScoreRequest(text=words(1, 7))]) == [pytest.approx(score, abs=1e-5)]
        assert read == [expected]


def test_every_worker_can_be_a_ray_actor() -> None:
    assert ACTORS.keys() == WORKERS.keys()
    assert all(issubclass(actor, WORKERS[kind]) for kind, actor in ACTORS.items())


def test_each_of_several_ranks_scores_its_share(tmp_path: Path) -> None:
    path = save_encoder("bert", tmp_path)
    worker = EncoderRewardWorker()
    group = RewardGroup(InProcessRanks("reward", worker))
    role = ScoringRole.model_validate({"model": {"path": str(path), "dtype": "fp32"}})
    group.setup(RewardSetup(role, seed=0, max_tokens=64), timeout_s=60).result()
    requests = [ScoreRequest(prompt=prompt, response=response) for prompt, response in PAIRS]
    alone = dict(enumerate(scores_of(group, requests)))
    together: dict[int, float | None] = {}
    for worker.rank, worker.world_size in ((0, 2), (1, 2)):
        share = dict(worker.score(requests))
        assert share.keys().isdisjoint(together) and 6 < len(share) < 18
        together |= {position: result.raw for position, result in share.items()}
    assert together == pytest.approx(alone, abs=1e-5) and len(together) == len(PAIRS)


def test_the_ids_of_an_encoder_are_never_those_of_a_policy(tmp_path: Path) -> None:
    """A policy with the same tokenizer samples ids without the tokens around them, so PPO must send texts."""
    path = save_encoder("bert", tmp_path)
    described = group_of(path).describe().result()
    assert described["fingerprint"] != fingerprint(AutoTokenizer.from_pretrained(path))


def test_a_cut_item_keeps_its_first_token_and_its_end(tmp_path: Path) -> None:
    path = save_encoder("bert", tmp_path)
    reference, group = Reference(path), group_of(path)
    prompt, response = words(1, 60), words(2, 10)
    (result,) = group.score([ScoreRequest(prompt=prompt, response=response, truncate=True)]).result()
    kept = " ".join(prompt.split()[-(POSITIONS - 13) :])
    assert result.truncated and result.tokens == POSITIONS
    assert result.raw == pytest.approx(reference.score(kept, response), abs=1e-5)


def test_several_turns_are_one_text_before_the_answer(tmp_path: Path) -> None:
    path = save_encoder("bert", tmp_path)
    turns = ("system", "w5 w6"), ("user", "w7"), ("assistant", "w9"), ("user", "w8"), ("assistant", "w4 w4")
    messages = tuple({"role": role, "content": text} for role, text in turns)
    expected = Reference(path).score("w5 w6\n\nw7\n\nw9\n\nw8", "w4 w4")
    assert scores_of(group_of(path), [ScoreRequest(messages=messages)]) == [pytest.approx(expected, abs=1e-5)]


def test_a_chat_template_writes_the_items_of_an_encoder_that_has_one(tmp_path: Path) -> None:
    path = save_encoder("modernbert", tmp_path)
    (path / "chat_template.jinja").write_text("[CLS]{% for m in messages %} {{ m.content }} [SEP]{% endfor %}")
    reference = Reference(path)
    ids = reference.tokenizer("[CLS] w5 w6 [SEP] w7 [SEP]", add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        expected = float(reference.model(**ids).logits[0, 0])
    request = ScoreRequest(prompt="w5 w6", response="w7")
    assert scores_of(group_of(path), [request]) == [pytest.approx(expected, abs=1e-5)]


def test_the_head_computes_in_fp32(tmp_path: Path) -> None:
    """Different items keep different scores in bf16, whose numbers near 5 lie 0.031 apart."""
    path = save_encoder("roberta", tmp_path)
    exact = [Reference(path).score(*pair) for pair in PAIRS]
    rounded = scores_of(group_of(path, dtype="bf16"), [ScoreRequest(prompt=p, response=r) for p, r in PAIRS])
    assert torch.tensor(rounded).bfloat16().float().tolist() != rounded
    torch.testing.assert_close(torch.tensor(rounded), torch.tensor(exact), atol=0.1, rtol=0.1)


def test_ids_of_a_batch_are_scored_in_its_order(tmp_path: Path) -> None:
    path = save_encoder("deberta-v2", tmp_path)
    reference, group = Reference(path), group_of(path)
    ids = [reference.tokenizer(*pair)["input_ids"] for pair in PAIRS]
    batch = TrajectoryBatch.from_sequences(ids)
    schedule = make_schedule(batch.lengths.tolist(), ranks=1, max_tokens=90)
    scored = group.scores(group.share(batch), schedule).result().tolist()
    assert scored == pytest.approx([reference.score(*pair) for pair in PAIRS], abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_evaluation_reads_both_sides_as_pairs(tmp_path: Path, kind: str) -> None:
    path, file = save_encoder(kind, tmp_path / "model"), tmp_path / "pairs.jsonl"
    rows = [{"prompt": words(n, 3), "chosen": words(2 * n, 4), "rejected": words(3 * n + 1, 6)} for n in range(20)]
    turned = [{"prompt": [{"role": "user", "content": row["prompt"]}],
               **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}}
              for row in rows]  # fmt: skip
    too_long = {"prompt": words(1, 60), "chosen": "w5", "rejected": "w6"}
    reference = Reference(path)
    margins = [reference.score(r["prompt"], r["chosen"]) - reference.score(r["prompt"], r["rejected"]) for r in rows]
    config = load_config("serve", [f"reward.model.path={path}", "reward.model.dtype=fp32"], kind="serve", files=True)
    for written in ([*rows, too_long], turned):
        file.write_text("".join(json.dumps(row) + "\n" for row in written))
        report = evaluate_pairs(config, file, PreferenceReader(), place=ThisProcess(config.cluster))
        assert report.figures["pairs"] == 20
        assert report.figures["margin"] == pytest.approx(sum(margins) / 20, abs=1e-5)


def test_evaluation_and_scoring_give_the_template_the_same_variables(tmp_path: Path) -> None:
    path, file = save_encoder("modernbert", tmp_path / "model"), tmp_path / "pairs.jsonl"
    (path / "chat_template.jinja").write_text(
        "[CLS] {{ style }}{% for m in messages %} {{ m.content }} [SEP]{% endfor %}"
    )
    variables = {"style": "w9"}
    sides = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "w5"), ("rejected", "w6 w7"))}
    asked = {"role": "user", "content": "w8"}
    file.write_text(json.dumps({"prompt": [asked], **sides, "chat_template_kwargs": variables}))
    config = load_config("serve", [f"reward.model.path={path}", "reward.model.dtype=fp32"], kind="serve", files=True)
    report = evaluate_pairs(config, file, PreferenceReader(), place=ThisProcess(config.cluster))
    requests = [ScoreRequest(messages=(asked, *side), chat_template_kwargs=variables) for side in sides.values()]
    chosen, rejected = scores_of(group_of(path), requests)
    assert chosen is not None and rejected is not None
    assert report.figures["margin"] == pytest.approx(chosen - rejected, abs=1e-6)
    without = scores_of(group_of(path), [ScoreRequest(messages=(asked, *sides["chosen"]))])
    assert without != [pytest.approx(chosen, abs=1e-4)], "the variable reaches the template"


def test_tools_without_a_template_to_write_them_are_refused_and_not_left_out(tmp_path: Path) -> None:
    turns = {"role": "user", "content": "w7"}, {"role": "assistant", "content": "w9"}
    (result,) = (
        group_of(save_encoder("bert", tmp_path)).score([ScoreRequest(messages=turns, tools=({"name": "w8"},))]).result()
    )
    assert result.raw is None and "an encoder without a chat template does not read: leave them out" in str(
        result.error
    )


# ------------------------------------------------------------------------------------------------------------ what is refused


def test_every_kind_is_an_encoder_that_classifies_texts() -> None:
    names = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.keys()
    assert names >= KINDS <= modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()


def problems(kind: str, changes: list[str]) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config({"serve": "serve", "rm": "hh-rm", "ppo": "hh-ppo"}[kind], changes, kind=kind, files=True)
    return str(refused.value)


def test_what_an_encoder_cannot_do_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = save_encoder("deberta-v2", tmp_path / "model")
    trained = problems("rm", [f"reward.model.path={path}"])
    assert f"reward.model.path: {path} is an encoder (model_type deberta-v2)" in trained and "only causal" in trained
    for role in ("policy", "critic", "reference"):
        assert f"{role}.model.path: {path} is an encoder" in problems("ppo", [f"{role}.model.path={path}"])
    served = [f"reward.model.path={path}", "reward.model.lora={rank: 2}", "reward.engine.zero=3", "reward.form=text"]
    assert "reward.scorer: " in problems("serve", [f"reward.model.path={path}", "reward.scorer=vllm"])
    found = problems("serve", served)
    assert f"reward.model.lora: {path} is an encoder" in found and f"reward.engine: {path} is an encoder" in found
    assert f"reward.form: {path} is an encoder" in found


def test_an_encoder_is_no_causal_model_in_python_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_encoder("bert", tmp_path / "model")
    with pytest.raises(ModelLoadError, match=r"is an encoder .model_type bert.* rlhf-ray score, serve or evaluate"):
        get_llm_for_sequence_regression(str(path), "reward", init_value_head=True)
    with pytest.raises(ModelLoadError, match="is an encoder"):
        Actor(str(path))
    assert main(["export", str(path), str(tmp_path / "out")]) == 2
    assert "copy its directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"labels": 3}, "classifier of .* has 3 outputs"), ({"drop": "classifier"}, "without a score head .classifier.weight.")],
)  # fmt: skip
def test_an_encoder_without_one_score_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    from safetensors.torch import load_file, save_file

    path = save_encoder("bert", tmp_path, labels=changes.get("labels", 1))
    file = path / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not n.startswith(changes.get("drop", "nothing"))}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(ModelLoadError, match=sentence):
        group_of(path)


def test_a_config_that_does_not_name_its_one_label_is_put_right(tmp_path: Path) -> None:
    path = save_encoder("roberta", tmp_path)
    expected = Reference(path).score(*PAIRS[0])
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if "label" not in k}))
    request = ScoreRequest(prompt=PAIRS[0][0], response=PAIRS[0][1])
    assert scores_of(group_of(path), [request]) == [pytest.approx(expected, abs=1e-5)]
