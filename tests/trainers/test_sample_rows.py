"""A row of samples holds the numbers of each token of its answer, from the first that was sampled on."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch

from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.runs.lines import sample_problem
from rlhf_ray.trainers.ppo import metrics
from rlhf_ray.trainers.ppo.metrics import sample_rows
from rlhf_ray.trajectories.batch import TrajectoryBatch

TOKENIZER: Any = SimpleNamespace(decode=lambda ids: "".join(f"<{number}>" for number in ids))


def batch() -> TrajectoryBatch:
    """An answer of two tokens; an episode of two turns with an observation between them; a prompt without an answer."""
    made = TrajectoryBatch.from_sequences(
        [[1, 2, 3, 4], [5, 6, 7, 8, 9], [1, 2]],
        action_mask=[[False, False, True, True], [False, True, False, True, True], [False, False]],
    )
    numbers = torch.arange(11, dtype=torch.float32) + 0.123456
    numbers[3] = torch.nan
    return made.with_columns(log_probs=-numbers, advantages=numbers, score=torch.tensor([1.0, 2.55555, 3.0]))


def rows(count: int = 3) -> list[dict[str, Any]]:
    samples = [TextSample(n, 0, f"p{n}", f"r{n}", label=None, finished=n == 0, token_ids=()) for n in range(3)]
    made: list[Any] = sample_rows(samples, batch(), TOKENIZER, count)
    return [json.loads(json.dumps(row, allow_nan=False)) for row in made]


def test_each_token_of_an_answer_has_its_text_and_its_numbers() -> None:
    first, second, third = rows()
    assert first["tokens"] == {
        "text": ["<3>", "<4>"],
        "log_probs": [-2.1235, None],
        "advantages": [2.1235, None],
    }, "a number that is not finite is no number"
    assert second["tokens"]["text"] == ["<6>", "<7>", "<8>", "<9>"]
    assert second["tokens"]["log_probs"] == [-5.1235, None, -7.1235, -8.1235], "an observation was not sampled"
    assert "tokens" not in third and third["score"] == 3.0
    assert (second["prompt"], second["response"], second["finished"], second["score"]) == ("p1", "r1", False, 2.5556)
    assert not any(map(sample_problem, (first, second, third)))
    assert [row["prompt"] for row in rows(2)] == ["p0", "p1"] and rows(0) == []


def test_of_a_long_answer_the_beginning_is_kept_and_the_rest_is_counted(monkeypatch: Any) -> None:
    monkeypatch.setattr(metrics, "TOKENS_KEPT", 3)
    first, second, _ = rows()
    assert second["tokens"]["text"] == ["<6>", "<7>", "<8>"] and second["left_out"] == 1
    assert len(second["tokens"]["advantages"]) == 3 and "left_out" not in first
