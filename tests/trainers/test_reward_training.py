"""Reward-model runs as users have them, small and in one process: what they leave, and that they survive.

What must hold: a run that is killed goes on at the right pair and ends in the same bits; every pair comes once an epoch;
``final/`` says to plain transformers what it said in training; ``best/`` is the best; the report shows the pairs.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rlhf_ray.config.files.reward_record import KEY
from rlhf_ray.data.load import load_demonstrations, load_pairs
from rlhf_ray.errors import IntegrityError
from rlhf_ray.evaluation.agreement import Bounds
from rlhf_ray.launch.export import export
from rlhf_ray.models import load_tokenizer
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.supervised import reward_model, reward_saving

from . import reward_runs
from .reward_runs import RECORD, config_of, record_pairs, train

pytestmark = pytest.mark.early

UPDATES = 15
"""Two epochs of 60 pairs, 8 an update."""


@pytest.fixture(autouse=True)
def single_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, list[Any]]:
    """A run that nothing disturbed, and its pairs by update."""
    root = tmp_path_factory.mktemp("whole")
    make = reward_model.make_pair_batch
    record_pairs(root / RECORD)
    try:
        run = train(config_of(root))
    finally:
        reward_model.make_pair_batch = make
    return run, recorded(root)


def recorded(root: Path) -> list[Any]:
    return [json.loads(line) for line in (root / RECORD).read_text().splitlines()]


def values(run: RunDirectory, name: str) -> list[float]:
    return [line[name] for line in run.metrics.read() if name in line]


def same_bits(one: Path, other: Path) -> bool:
    left, right = (load_file(path / "model.safetensors") for path in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def plain_scores(directory: Path, sequences: list[list[int]]) -> torch.Tensor:
    """By transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1).float().eval()
    with torch.no_grad():
        return torch.stack([model(torch.tensor([sequence])).logits[0, 0] for sequence in sequences])


def test_a_killed_run_goes_on_at_the_right_pair_to_the_same_bits(
    whole: tuple[RunDirectory, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, pairs = whole
    killed_after = random.randrange(1, UPDATES - 1)
    program = subprocess.Popen([sys.executable, reward_runs.__file__, str(tmp_path)])
    deadline = time.monotonic() + 120
    record = tmp_path / RECORD
    while not record.exists() or len(record.read_bytes().splitlines()) <= killed_after:
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    program.kill()
    assert program.wait() == -9
    before = recorded(tmp_path)

    steps = list(range(3, UPDATES + 1, 3))
    record.unlink()
    monkeypatch.setattr(reward_model, "make_pair_batch", reward_model.make_pair_batch)
    record_pairs(record)
    run = train(config_of(tmp_path), resume=True)
    start = UPDATES - len(recorded(tmp_path))
    assert start in {0, *steps, 4, 8, 12}, f"killed after update {killed_after}"
    assert before[:start] + recorded(tmp_path) == pairs, f"killed after update {killed_after}"
    assert same_bits(run.final, undisturbed.final), f"killed after update {killed_after}"
    assert run.best.exists() == undisturbed.best.exists()
    assert values(run, "loss/rm") == values(undisturbed, "loss/rm")
    assert values(run, "evaluation/accuracy") == values(undisturbed, "evaluation/accuracy")


def test_every_pair_comes_exactly_once_an_epoch(whole: tuple[RunDirectory, list[Any]]) -> None:
    _, updates = whole
    stream = [json.dumps(pair) for pairs in updates for pair in pairs]
    assert len(updates) == UPDATES and len(stream) == 120
    assert Counter(stream[:60]) == Counter(stream[60:]) and stream[:60] != stream[60:]
    world = load_pairs(config_of(Path(whole[0].path).parent).data, load_tokenizer_of(whole[0]), 3)
    assert Counter(stream[:60]) == Counter(
        json.dumps([[int(i) for i in side] for side in (pair.chosen, pair.rejected)]) for pair in world.train
    )


def load_tokenizer_of(run: RunDirectory) -> Any:
    return load_tokenizer(config_of(run.path.parent).reward.model)


def test_what_is_logged_and_reported(whole: tuple[RunDirectory, list[Any]]) -> None:
    run, _ = whole
    assert values(run, "padding/share") == [0.0] * UPDATES
    assert all(0.1 < share < 0.6 for share in values(run, "shared_prefix/share"))
    assert min(values(run, "matmul/share")) > 0.0
    assert values(run, "seconds_left")[-1] == 0.0 and len(values(run, "seconds_left")) == UPDATES - 1
    assert len(values(run, "evaluation/accuracy")) == 4 and set(values(run, "evaluation/pairs")) == {40.0}
    summary = run.summary()
    page = summary.preferences
    assert page is not None and page.probes is not None and summary.memory is not None
    assert sum(count for _, _, count in page.calibration) == 40
    assert [sum(shares) for shares in page.histograms.values()] == pytest.approx([1.0, 1.0])
    assert {row[0] for row in page.sources.rows} == {"world/minimal", "world/free", "all"}
    assert [row[0] for row in page.probes.rows][-1] == "flatters" and len(page.probes.rows) == 5
    margins = [float(row[0]) for row in page.worst.rows]
    wrong = round((1 - values(run, "evaluation/accuracy")[-1]) * 40)
    assert margins == sorted(margins) and len(margins) == min(wrong, 20)
    html = run.report_path.read_text()
    for heading in ("Held-out pairs", "What it learned besides the rule", "The worst held-out pairs"):
        assert html.count(f"<h2>{heading}</h2>") == 1


def test_final_says_to_plain_transformers_what_it_said_in_training(whole: tuple[RunDirectory, list[Any]]) -> None:
    run, _ = whole
    config = config_of(run.path.parent)
    held_out = load_pairs(config.data, load_tokenizer_of(run), config.run.seed).held_out
    scores = plain_scores(
        run.final, [list(map(int, side)) for pair in held_out for side in (pair.chosen, pair.rejected)]
    )
    saved = json.loads((run.final / "config.json").read_text())
    assert (
        saved["mean"]
        == pytest.approx(float(scores.mean()), abs=1e-5)
        == pytest.approx(values(run, "evaluation/score_mean")[-1], abs=1e-5)
    )
    assert saved["std"] == pytest.approx(float(scores.std(unbiased=False)), abs=1e-5)
    kept = (saved.get("num_labels", 1), saved["problem_type"], saved["value_head_prefix"])
    assert kept == (1, "regression", "score") and saved["pad_token_id"] == load_tokenizer_of(run).pad_token_id
    accuracy = float((scores[0::2] > scores[1::2]).float().mean())
    assert accuracy == pytest.approx(values(run, "evaluation/accuracy")[-1], abs=1e-6)


def test_the_page_explains_every_number_that_is_logged(whole: tuple[RunDirectory, list[Any]]) -> None:
    page = (Path(__file__).parents[2] / "docs/reward_training.md").read_text()
    cells = re.findall(r"^\| (`[^|]+`) \|", page, re.MULTILINE)
    explained = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    logged = {name.removeprefix("evaluation/") for line in whole[0].metrics.read() for name in line}
    habits = {name for name in logged if name.startswith("habit/")}
    assert habits and "habit/NAME" in explained
    assert logged - habits <= explained


def test_the_best_evaluation_is_kept_where_it_is_not_the_last(whole: tuple[RunDirectory, list[Any]]) -> None:
    run, _ = whole
    accuracies = values(run, "evaluation/accuracy")
    facts = run.summary().facts
    assert run.best.exists() == (max(accuracies[:-1]) >= accuracies[-1])
    if run.best.exists():
        config = config_of(run.path.parent)
        held_out = load_pairs(config.data, load_tokenizer_of(run), config.run.seed).held_out
        sides = [list(map(int, side)) for pair in held_out for side in (pair.chosen, pair.rejected)]
        scores = plain_scores(run.best, sides)
        assert float((scores[0::2] > scores[1::2]).float().mean()) == pytest.approx(max(accuracies), abs=1e-6)
        assert facts["best"].startswith("best/: update ")
    else:
        assert facts["best"].startswith("the last update")


SHORT = ("data.world.pairs=16", "epochs=1.0", "evaluation.every_steps=0", "checkpoint.every_steps=0")


def test_demonstrations_score_zero_on_average(tmp_path: Path) -> None:
    config = config_of(tmp_path, *SHORT, "normalization.over=demonstrations")
    run = train(config)
    rows = load_demonstrations(config.data, load_tokenizer_of(run), config.run.seed).held_out
    scores = plain_scores(run.final, [list(row.token_ids) for row in rows])
    saved = json.loads((run.final / "config.json").read_text())
    assert saved["std"] == 1.0 and saved["mean"] == pytest.approx(float(scores.mean()), abs=1e-5)
    assert abs(saved["mean"]) > 1e-3


def test_an_adapter_is_saved_alone_with_its_head_and_normalisation(tmp_path: Path) -> None:
    base = train(config_of(tmp_path / "base", *SHORT)).final
    over = [
        f"reward.model.path={base}",
        "reward.model.make=null",
        "reward.model.head_init=null",
        "reward.model.lora={rank: 4}",
        *SHORT,
    ]
    merged = train(config_of(tmp_path / "merged", *over))
    adapter = train(config_of(tmp_path / "adapter", *over, "save=adapter"))
    assert not (adapter.final / "model.safetensors").exists()
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {path.name for path in adapter.final.iterdir()}
    from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression

    loaded = get_llm_for_sequence_regression(
        str(adapter.final), "reward", param_dtype="fp32", attn_implementation="sdpa", normalize_reward=True
    ).eval()
    plain = json.loads((merged.final / "config.json").read_text())
    ids = torch.tensor([[5, 9, 12, 7, 1]])
    with torch.no_grad():
        scores = loaded(ids)
    expected = (plain_scores(merged.final, ids.tolist()) - plain["mean"]) / plain["std"]
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    exported = export(str(adapter.final), str(tmp_path / "exported"))
    records = [json.loads((path / "config.json").read_text())[KEY] for path in (merged.final, adapter.final, exported)]
    assert records == [plain[KEY]] * 3, "what it remembers goes with it"


def test_an_adapter_over_four_bits_is_read_back_over_four_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = train(config_of(tmp_path / "base", *SHORT)).final
    model = f"reward.model={{path: {base}, head_init: inv_sqrt, make: null, dtype: bf16, quantization: nf4, lora: {{rank: 4}}}}"
    monkeypatch.setitem(
        reward_saving.AGREES_TO, "bf16", Bounds.of_all(0.01)
    )  # over whole weights scores differ by more
    run = train(config_of(tmp_path / "adapter", *SHORT, model, "save=adapter", "run.deterministic=false"))
    assert (run.final / "adapter_model.safetensors").exists()


def test_a_directory_that_says_something_else_when_read_back_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_ray.actors.workers.reward import RewardWorker

    save = RewardWorker.save_pretrained

    def damaged(self: RewardWorker, directory: str, metadata: Any = None) -> None:
        save(self, directory, metadata)
        path = Path(directory) / "model.safetensors"
        state = load_file(path)
        save_file(state | {"score.weight": state["score.weight"] + 0.05}, path, metadata={"format": "pt"})

    monkeypatch.setattr(RewardWorker, "save_pretrained", damaged)
    config = config_of(tmp_path, *SHORT)
    with pytest.raises(
        IntegrityError, match=r"final/ was written and read again, but its scores of 16 sequences differ"
    ):
        train(config)
    assert not (tmp_path / "tiny/final").exists()


def test_without_held_out_pairs_nothing_is_evaluated_kept_as_best_or_normalised(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} ", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(16)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make = f"{{shape: llama-tiny, tokenizer_from: {file}, vocabulary: 300}}"
    config = config_of(tmp_path, "data.world=null", f"data.path={file}", "data.evaluation_fraction=0.0", "data.cache=null",
                       f"reward.model.make={make}", "epochs=1.0")  # fmt: skip
    run = train(config)
    assert "mean" not in json.loads((run.final / "config.json").read_text())
    assert not run.best.exists() and values(run, "evaluation/accuracy") == []
    assert "Held-out pairs" not in run.report_path.read_text()
