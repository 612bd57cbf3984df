"""A reward model is read everywhere as it was trained: ``evaluate``, ``score``, ``/v1/reward`` and PPO give one score.

Three models are trained here, one on texts although its tokenizer has a chat template, one on conversations whose template
goes on after the end of a turn, and one whose base pads with the token that ends an answer.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker
from rlhf_ray.config.files.reward_record import KEY, read_reward_record
from rlhf_ray.config.loading import dump_config, load_config, parse_config
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.tokenizers import make_tokenizer
from rlhf_ray.errors import ConfigError, RequestError
from rlhf_ray.launch.evaluate import evaluate_pairs
from rlhf_ray.models.weights.tiny_llama import make_model
from rlhf_ray.rewards.offline import score_rows
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import ModelSource
from rlhf_ray.rows.layouts import Keys
from rlhf_ray.rows.preferences import PreferenceReader
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.serving.backend import GroupBackend
from rlhf_ray.serving.protocols.native import RewardBody
from rlhf_ray.trainers.ppo.rewards import make_reward_source
from rlhf_ray.trainers.supervised.reward_model import train_reward_model

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = """
kind: rm
run: {{name: rm, root: {root}}}
reward:
  model: {{path: {root}/base, head_init: inv_sqrt, dtype: fp32}}
  engine: {{optimizer: {{learning_rate: 3.0e-3}}}}
data: {{path: {root}/pairs.jsonl, evaluation_fraction: 0.25, max_tokens: 64, cache: null, apply_chat_template: {turns}}}
batch: {{pairs_per_update: 4, max_tokens_per_micro_batch: 512}}
epochs: 1
monitoring: {{ray_metrics: false}}
"""
PROMPT, ANSWERS = "what is 3?", ("this 3", "that 3")
ROWS = [{"prompt": f"what is {n}?", "chosen": f"this {n}", "rejected": f"that {n}"} for n in range(12)]


class Trained(NamedTuple):
    """A reward model that was trained here."""

    path: Path
    form: str
    group: RewardGroup


def train(root: Path, form: str, *, pads_with_end: bool) -> Trained:
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = make_tokenizer(root / "pairs.jsonl", 300)
    tokenizer.chat_template = TEMPLATE
    if pads_with_end:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(root / "base")
    model = make_model(
        "llama-tiny", 304, seed=0, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=1
    )
    model.save_pretrained(root / "base")
    config: Any = parse_config(CONFIG.format(root=root, turns=str(form == "conversation").lower()), files=True)
    run = RunDirectory.create(root / "rm", dump_config(config))
    train_reward_model(config, run, None, place=ThisProcess(config.cluster))
    run.release()
    group = RewardGroup(InProcessRanks("reward", RewardWorker()))
    serve: Any = load_config("serve", [f"reward.model={{path: {run.final}, dtype: fp32}}"], kind="serve", files=True)
    group.setup(RewardSetup(serve.reward, seed=0), timeout_s=60.0).result()
    return Trained(run.final, form, group)


@pytest.fixture(scope="module", params=["text", "conversation", "text, padded with the end"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    form, _, padded = request.param.partition(", ")
    return train(tmp_path_factory.mktemp(form), form, pads_with_end=bool(padded))


def plain_scores(trained: Trained) -> list[float]:
    """What transformers gives to both answers, joined or written by the template up to the end, one by one."""
    tokenizer = AutoTokenizer.from_pretrained(trained.path)
    model = AutoModelForSequenceClassification.from_pretrained(trained.path, dtype=torch.float32).eval()
    before = PROMPT if trained.form == "text" else f"<|user|>{PROMPT}<eos>\n<|assistant|>"
    with torch.no_grad():
        ids = [tokenizer(f"{before}{answer}<eos>", return_tensors="pt")["input_ids"] for answer in ANSWERS]
        return [float(model(input_ids=one).logits) for one in ids]


def close(numbers: list[float]) -> Any:
    return pytest.approx(numbers, abs=1e-5)


def test_what_is_written_remembers_its_training_and_transformers_reads_it_at_the_same_token(trained: Trained) -> None:
    config = json.loads((trained.path / "config.json").read_text())
    record = read_reward_record(config, "config.json")
    assert record is not None and (record.forms, record.end_token) == ((trained.form,), "<eos>")
    assert (record.template is not None) is (trained.form == "conversation")
    tokenizer = AutoTokenizer.from_pretrained(trained.path)
    assert tokenizer.pad_token_id == config["pad_token_id"] != tokenizer.eos_token_id
    described = trained.group.describe().result()["reads"]
    assert described["recorded"] and described["forms"] == [trained.form] and described["scored_token"] == "end"


def test_score_and_the_service_read_a_prompt_and_its_response_as_training_did(trained: Trained) -> None:
    rows = [{"prompt": PROMPT, "response": answer} for answer in ANSWERS]
    offline = score_rows(rows, trained.group, truncate=False).result()
    body = RewardBody.read({"items": rows})
    config: Any = load_config("serve", [f"reward.model.path={trained.path}"], kind="serve", files=True)
    backend = GroupBackend(trained.group, config.reward.model, normalize=False)
    served = asyncio.run(backend.score(list(body.items)))  # type: ignore[arg-type]
    expected = plain_scores(trained)
    assert [result.raw for result in offline] == close(expected)
    assert [result.raw for result in served] == close(expected)
    assert backend.describe()["reads"]["forms"] == [trained.form]


def test_messages_are_read_by_a_model_of_conversations_and_refused_by_one_of_texts(trained: Trained) -> None:
    talks = [
        {"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer}]}
        for answer in ANSWERS
    ]
    results = score_rows(talks, trained.group, truncate=False).result()
    if trained.form == "conversation":
        assert [result.raw for result in results] == close(plain_scores(trained))
    else:
        assert all("reads plain texts (as it was trained): send prompt and response" in str(r.error) for r in results)


def test_a_text_is_read_at_the_end_of_its_answer_whatever_the_template_writes_after_it(trained: Trained) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained.path)
    talks = [[{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer}] for answer in ANSWERS]
    rendered = [{"text": tokenizer.apply_chat_template(talk, tokenize=False)} for talk in talks]
    results = score_rows(rendered, trained.group, truncate=False).result()
    if trained.form == "conversation":
        assert [result.raw for result in results] == close(plain_scores(trained))


def test_evaluate_gives_the_margin_of_the_same_scores(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": PROMPT, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}))
    config: Any = load_config(
        "serve", [f"reward.model={{path: {trained.path}, dtype: fp32}}"], kind="serve", files=True
    )

    def margin(*, turns: bool) -> float:
        reader = PreferenceReader(Keys(), turns=turns)
        report = evaluate_pairs(config, tmp_path / "one.jsonl", reader, place=ThisProcess(config.cluster))
        return report.figures["margin"]

    better, worse = plain_scores(trained)
    assert margin(turns=False) == pytest.approx(better - worse, abs=1e-5)
    if trained.form == "conversation":
        assert margin(turns=True) == pytest.approx(better - worse, abs=1e-5)
    else:
        with pytest.raises(RequestError, match=r"--apply-chat-template: .* was trained on plain texts"):
            margin(turns=True)


@pytest.mark.parametrize("conversations", [False, True])
def test_ppo_gives_the_same_score_or_refuses_the_prompts(trained: Trained, conversations: bool) -> None:
    policy = ChatFormat(AutoTokenizer.from_pretrained(trained.path))
    config: Any = parse_config(PPO.format(model=trained.path))
    forms: list[Any] = ["conversation" if conversations else "text"]

    def source() -> Any:
        return make_reward_source(config, {"reward": trained.group}, policy, forms=forms, cleanup=ExitStack())

    if conversations and trained.form == "text":
        with pytest.raises(RequestError, match=r"the prompts are conversations, .* on which it was trained"):
            source()
        return
    rewards = source()
    assert isinstance(rewards, ModelSource)
    assert (rewards.policy is not None) is (conversations == (trained.form == "conversation")), (
        "ids in its own form only"
    )
    results = rewards.score([sample(policy, answer, conversations) for answer in ANSWERS]).result()
    assert [result.reward for result in results] == close(plain_scores(trained))


def test_a_model_that_remembers_nothing_is_read_after_all_that_its_template_writes_where_that_is_said(
    trained: Trained, tmp_path: Path
) -> None:
    """As programs read it that give the result of ``apply_chat_template`` to transformers; ``evaluate`` too."""
    shutil.copytree(trained.path, tmp_path / "elsewhere")
    config = json.loads((trained.path / "config.json").read_text())
    del config[KEY]
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(trained.path)
    model = AutoModelForSequenceClassification.from_pretrained(trained.path, dtype=torch.float32).eval()
    talks = [[{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer}] for answer in ANSWERS]
    with torch.no_grad():
        ids = [tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=False) for talk in talks]
        expected = [float(model(input_ids=one).logits) for one in ids]
    role = f"reward={{model: {{path: {tmp_path / 'elsewhere'}, dtype: fp32}}, scored_token: rendering}}"
    serve: Any = load_config("serve", [role], kind="serve", files=True)
    group = RewardGroup(InProcessRanks("reward", RewardWorker()))
    group.setup(RewardSetup(serve.reward, seed=0), timeout_s=60.0).result()
    results = score_rows([{"messages": talk} for talk in talks], group, truncate=False).result()
    assert [result.raw for result in results] == close(expected)
    assert abs(expected[0] - plain_scores(trained)[0]) > 1e-4, "another token"
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": PROMPT, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}))
    with torch.no_grad():
        before_the_end = [float(model(input_ids=one[:, :-2]).logits) for one in ids]  # without <eos> and the newline
    for token, (better, worse) in (("rendering", expected), ("before_end", before_the_end)):
        serve = load_config("serve", [role.replace("rendering", token)], kind="serve", files=True)
        report = evaluate_pairs(serve, tmp_path / "one.jsonl", PreferenceReader(), place=ThisProcess(serve.cluster))
        assert report.figures["margin"] == pytest.approx(better - worse, abs=1e-5)


@pytest.mark.parametrize("conversations", [False, True])
def test_check_refuses_what_a_model_remembers_otherwise(trained: Trained, tmp_path: Path, conversations: bool) -> None:
    for key, value in (("form", "conversation" if trained.form == "text" else "text"), ("scored_token", "before_end")):
        with pytest.raises(ConfigError, match=f"reward.{key}: {value}, but .* was trained .*: remove it"):
            load_config(
                "serve", [f"reward.model.path={trained.path}", f"reward.{key}={value}"], kind="serve", files=True
            )
    prompt = [{"role": "user", "content": PROMPT}] if conversations else PROMPT
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt}))
    config: Any = parse_config(
        PPO.format(model=trained.path), ["data.world=null", f"data.path={tmp_path / 'prompts.jsonl'}"]
    )
    problems = [
        text for key, text in chain.from_iterable(rule() for rule in config.files()) if "trained on plain" in text
    ]
    assert bool(problems) is (conversations and trained.form == "text")


def sample(policy: ChatFormat, answer: str, conversations: bool) -> TextSample:
    """An answer as a policy with the same tokenizer would have sampled it."""
    question = ({"role": "user", "content": PROMPT},)
    before = policy.prompt_ids(question) if conversations else policy.tokenizer(PROMPT)["input_ids"]
    ids = (*before, *policy.tokenizer(answer)["input_ids"], policy.tokenizer.eos_token_id)
    return TextSample(
        prompt_id=0, sample_index=0, prompt=PROMPT, response=answer, label=None, finished=True, source="", token_ids=ids,
        messages=(*question, {"role": "assistant", "content": answer}) if conversations else None,
    )  # fmt: skip


PPO = """
kind: ppo
run: {{name: small}}
steps: 1
policy: {{model: {{path: org/name}}, engine: {{optimizer: {{learning_rate: 1e-3}}}}}}
reward: {{model: {{path: {model}}}}}
data: {{world: {{}}}}
algorithm: {{name: grpo}}
batch: {{prompts_per_step: 16, samples_per_prompt: 4, sequences_per_update: 64}}
"""
