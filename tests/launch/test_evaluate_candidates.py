"""``rlhf-ray evaluate`` over prompts with several answers: scores are those of plain transformers, a prompt counts with all its
answers or not at all, and no text is printed.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import load_config
from rlhf_ray.errors import DataError
from rlhf_ray.evaluation.rewardbench2 import SUBSETS
from rlhf_ray.launch.evaluate import evaluate
from rlhf_ray.rows.preferences import PreferenceReader
from rlhf_ray.storage import OutputFile

from ..serving.reward_models import save_reward_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_reward_model(tmp_path_factory.mktemp("candidates") / "model", seed=3)


def make_rows() -> list[dict[str, Any]]:
    """Three prompts of every subset but Ties, and two pairs of Ties."""
    rows = []
    for number, subset in enumerate(name for name in SUBSETS for _ in range(3) if name != "Ties"):
        answers = [f"{'xyz' * (number % 3)}{number} {letter}" for letter in "abcd"]
        rows.append(
            {
                "id": str(number),
                "prompt": f"why {number}?",
                "chosen": answers[:1],
                "rejected": answers[1:],
                "subset": subset,
            }
        )
    for number in range(2):
        for kind, count in (("ref", 1), ("tied", 3)):
            right, wrong = (
                [f"right {place}{number}" for place in range(count)],
                [f"wrong {number}{letter}" for letter in "ab"],
            )
            rows.append(
                {"id": f"{kind}:{number}", "prompt": "a colour?", "chosen": right, "rejected": wrong, "subset": "Ties"}
            )
    return rows  # fmt: skip


def plain_scores(model: Path, rows: list[dict[str, Any]]) -> list[list[float]]:
    """The score of every answer by plain transformers, from the text that the template writes."""
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def score(prompt: str, answer: str) -> float:
        ids = tokenizer(f"<bos>[user]{prompt}<eos>[assistant]{answer}<eos>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            return float(plain(torch.tensor([ids])).logits)

    return [[score(row["prompt"], answer) for answer in row["chosen"] + row["rejected"]] for row in rows]


def written(directory: Path, rows: list[dict[str, Any]]) -> Path:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(model: Path, path: Path, *, turns: bool = False) -> dict[str, Any]:
    config = load_config("serve", [f"reward.model.path={model}", "max_tokens=60"], kind="serve", files=True)
    output = path.with_name("figures.json")
    file, place = OutputFile(output, overwrite=True), ThisProcess(config.cluster)
    assert evaluate(config, path, PreferenceReader(turns=turns), output=file, place=place) == 0
    return dict(json.loads(output.read_text()))


@pytest.mark.parametrize("turns", [False, True])
def test_the_scores_of_the_benchmark_are_those_of_plain_transformers(
    model: Path, tmp_path: Path, turns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows()
    found, scores = run(model, written(tmp_path, rows), turns=turns), plain_scores(model, rows)
    right = [one[0] == max(one) for one in scores]
    by_subset = {
        subset: [hit for hit, row in zip(right, rows, strict=True) if row["subset"] == subset] for subset in SUBSETS
    }
    for subset in SUBSETS[:-1]:
        assert found["rewardbench"][subset] == pytest.approx(sum(by_subset[subset]) / 3)
    assert 0 < sum(right) < len(right), "rows that are all right or all wrong would show nothing"
    assert found["figures"]["prompts"] == len(rows) and found["figures"]["answers"] == sum(map(len, scores))
    flat = [score for one in scores for score in one]
    assert found["figures"]["score_mean"] == pytest.approx(sum(flat) / len(flat), abs=1e-5)
    assert found["rewardbench"]["Overall"] == pytest.approx(sum(found["rewardbench"][name] for name in SUBSETS) / 6)
    leads = sorted(one[0] - max(one[1:]) for one, row in zip(scores, rows, strict=True) if len(row["chosen"]) == 1)
    assert float(found["worst"]["rows"][0][0]) == pytest.approx(leads[0], abs=0.006)
    printed = "".join(capsys.readouterr())
    assert "RewardBench 2" in printed and "Precise IF" in printed
    assert not any(answer in printed for row in rows for answer in row["chosen"])


def test_a_prompt_counts_with_all_its_answers_or_not_at_all(
    model: Path, tmp_path: Path, project_log: io.StringIO
) -> None:
    rows = make_rows()[:2]
    rows[0]["rejected"][1] = "long " * 20
    found = run(model, written(tmp_path, rows))
    assert found["figures"]["prompts"] == 1 and found["figures"]["answers"] == 4
    assert "1 of 2 prompts have an answer without a score" in project_log.getvalue()
    assert "rows.jsonl:1: the item has" in project_log.getvalue()
    rows[1]["chosen"] = ["long " * 20]
    with pytest.raises(DataError, match="no prompt is left to evaluate on"):
        run(model, written(tmp_path, rows))


def test_ties_without_their_ids_have_no_score(model: Path, tmp_path: Path, project_log: io.StringIO) -> None:
    rows = [{**row, "id": "7"} for row in make_rows()[-2:]]
    found = run(model, written(tmp_path, rows))
    assert found["rewardbench"] == {} and "accuracy" in found["sources"]["Ties"]
    assert "the subset Ties has no score" in project_log.getvalue()
