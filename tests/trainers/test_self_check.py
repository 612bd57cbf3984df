"""The start-up self-check says what it measured and what it allows, and for each check that fails what to look at."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_ray.config.loading import load_config
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.engine.report import Applied, Report
from rlhf_ray.errors import NumericalError
from rlhf_ray.evaluation.agreement import LOG_PROB_BOUNDS, Bounds
from rlhf_ray.monitoring.report.summary import Check
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.mixture import MixedResult, MixtureSource, Part, Term
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import ModelSource
from rlhf_ray.trainers.ppo.algorithm import make_policy_loss
from rlhf_ray.trainers.ppo.self_check import FIRST_RATIO, LOG_PROBS, SCORE_ALONE, SelfCheck, log_prob_bounds, way_out
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import make_schedule
from tests.data.chat_templates import SHAPES, make_tokenizer

SAMPLES = [TextSample(0, index, "p", "r", None, True, (1, 2)) for index in range(3)]
SCHEDULES = {"policy": make_schedule([2, 2, 2], ranks=1, max_tokens=8)}


class Policy:
    """A policy group whose first update sees this mean ratio."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.skipped: list[bool] = []

    def share(self, batch: TrajectoryBatch) -> TrajectoryBatch:
        return batch

    def accumulate(self, *arguments: Any) -> Pending[Report]:
        metrics = {"ratio/mean": (3.0 * self.ratio, 3.0), "approximate_kl": (0.0, 3.0)}
        return Pending.done(Report(finite=True, loss=0.0, metrics=metrics))

    def apply(self, skip: bool) -> Pending[Applied]:
        self.skipped.append(skip)
        return Pending.done(Applied(skipped=skip, grad_norm=None, learning_rate=0.0, update=0))


CHAT = ChatFormat(make_tokenizer(SHAPES["a newline after the end"]))


class Reward:
    """A reward model whose scores of texts are off by so much, or that refuses them."""

    def __init__(self, off: float, error: str = "") -> None:
        self.off, self.error = off, error

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        return Pending.done([self._result(request) for request in requests])

    def _result(self, request: ScoreRequest) -> ScoreResult:
        if request.token_ids is not None:
            return ScoreResult.of(len(request.token_ids))
        if self.error:
            return ScoreResult.failed(self.error)
        assert request.messages is not None
        prompt, answer = CHAT.encode(request.messages, finished=request.finished)
        return ScoreResult.of(len(prompt) + len(answer) + self.off)


def talk(answer: str, *, finished: bool = True, ids: str | None = None) -> TextSample:
    """An answer in a conversation; ``ids`` is the text that its ids stand for, where it is another one."""
    messages = ({"role": "user", "content": "why?"}, {"role": "assistant", "content": answer})
    prompt, answer_ids = CHAT.encode([messages[0], {**messages[1], "content": ids or answer}], finished=finished)
    return TextSample(0, 0, "p", answer, None, finished, (*prompt, *answer_ids), messages=messages)


TALKS = [talk("so"), talk("and so", finished=False), talk("so", ids="s<|im_start|>o")]


def compare_forms(reward: Reward, *, terms: bool = False) -> list[Check]:
    source: Any = ModelSource(reward, policy=CHAT)
    mixture: Any = MixtureSource({"helpful": Term(source, Part(1.0))}) if terms else source
    experience: Any = SimpleNamespace(rewards=mixture)
    return SelfCheck(load_config("demo-ppo"), experience, None).same_form(TALKS)  # type: ignore[arg-type]


@pytest.mark.parametrize("terms", [False, True])
def test_ids_must_have_the_score_of_their_text_finished_and_cut(terms: bool) -> None:
    (equal,) = compare_forms(Reward(0.0), terms=terms)
    assert equal.passed and equal.value.startswith("2 of 3 answers (1 cut) differ by mean 0.0e+00, ")
    (off,) = compare_forms(Reward(2.5), terms=terms)
    assert not off.passed and "2 of 3 answers (1 cut) differ by mean 2.5e+00" in off.value
    (refused,) = compare_forms(Reward(0.0, "it has no chat template"), terms=terms)
    assert not refused.passed and refused.value == "no score: it has no chat template"
    text: Any = SimpleNamespace(rewards=ModelSource(Reward(2.5), policy=None))
    assert SelfCheck(load_config("demo-ppo"), text, None).same_form(TALKS) == []  # type: ignore[arg-type]


def run(*, shift: float = 0.0, ratio: float = 1.0, alone: float = 0.0) -> tuple[list[Any], Policy]:
    """Checks of a batch whose rollout log-probs, first ratio and scores of single samples are off by so much."""
    config: Any = load_config("demo-ppo")
    policy = Policy(ratio)
    experience: Any = SimpleNamespace(
        require_rewards=lambda samples: [ScoreResult.of(alone)] * len(samples),
        rewards=SimpleNamespace(reads="the ids as sampled"),
    )
    learner: Any = SimpleNamespace(groups=SimpleNamespace(policy=policy), policy_loss=make_policy_loss(config))
    batch = TrajectoryBatch.from_sequences([[1, 2]] * 3, action_mask=[[False, True]] * 3, score=[0.0] * 3)
    batch = batch.with_columns(log_probs=torch.zeros(6), rollout_log_probs=torch.full((6,), shift))
    return SelfCheck(config, experience, learner).run(batch, SCHEDULES, SAMPLES), policy


def test_a_sound_set_up_passes_and_the_update_is_dropped() -> None:
    checks, policy = run()
    assert all(check.passed for check in checks) and policy.skipped == [True]
    assert checks[-1].value == "the ids as sampled"


@pytest.mark.parametrize(
    ("fault", "name", "measured"),
    [
        ({"shift": 2.0}, LOG_PROBS, r"differ by mean 2\.0e\+00, .* nats"),
        ({"ratio": 1.5}, FIRST_RATIO, r"mean 1\.5, divergence 0\.0e\+00"),
        ({"alone": 3.0}, SCORE_ALONE, r"differ by mean 3\.0e\+00"),
    ],
    ids=["log-probs", "first ratio", "score"],
)
def test_a_check_that_fails_says_what_it_measured_and_what_to_look_at(
    fault: dict[str, float], name: str, measured: str
) -> None:
    with pytest.raises(NumericalError, match=measured) as error:
        run(**fault)
    assert str(error.value).endswith(f"{name}: {way_out(name, load_config('demo-ppo'))}")  # type: ignore[arg-type]


def sampled(shift: float, *, version: int = 1) -> TrajectoryBatch:
    """A batch of training, sampled by weights of this version, whose rollout log-probs are off by so much."""
    batch = TrajectoryBatch.from_sequences([[1, 2]] * 3, action_mask=[[False, True]] * 3)
    return batch.with_columns(
        log_probs=torch.zeros(6),
        rollout_log_probs=torch.full((6,), shift),
        weight_version=torch.full((6,), version, dtype=torch.int32),
    )


def check_of(**overrides: Any) -> SelfCheck:
    config = load_config("demo-ppo", [f"{key}={value}" for key, value in overrides.items()])
    return SelfCheck(config, None, None)  # type: ignore[arg-type]


def test_the_first_batch_that_new_weights_sampled_is_checked_once() -> None:
    check = check_of()
    assert check.after_update(sampled(9.0, version=0), 0) == [], "the weights that the engines started from"
    assert check.after_update(sampled(9.0, version=1), 2) == [], "the trainer's weights are newer than the sampler's"
    assert check.after_update(sampled(float("nan")), 1) == [], "the update will skip it"
    first = check.after_update(sampled(1e-6), 1)
    assert [(one.passed, one.value) for one in first] == [
        (True, "differ by mean 1.0e-06, 99 % 1.0e-06, largest 1.0e-06 nats over 3 tokens")
    ]
    assert check.after_update(sampled(9.0), 1) == [], "once"
    with pytest.raises(NumericalError, match=r"after an update differ by mean 9\.0e\+00, .*, wanted <= "):
        check_of().after_update(sampled(9.0), 1)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            {"policy.model.dtype": "fp32", "rollout.dtype": "bf16"},
            "policy.model.dtype is fp32 and rollout.dtype bf16: set both",
        ),
        (
            {"policy.model.dtype": "fp32", "rollout.dtype": "fp32"},
            "vLLM does not compute with the weights that it was sent",
        ),
        ({"rollout.backend": "transformers"}, "both run the model of transformers"),
    ],
)
def test_the_way_out_names_what_can_be_the_cause(overrides: dict[str, str], named: str) -> None:
    with pytest.raises(NumericalError) as error:
        check_of(**overrides).after_update(sampled(9.0), 1)
    assert named in str(error.value)
    assert ("policy.model.dtype" in str(error.value)) == ("bf16" in named), "one dtype is not the cause"
    assert "temperature" not in str(error.value), "both sides read one key"


@pytest.mark.parametrize(("raw", "off", "passed"), [(20.0, 0.3, True), (0.0, 0.3, False), (20.0, 5.0, False)])
def test_a_score_may_be_off_by_what_rounding_does_to_the_numbers_it_was_made_of(
    raw: float, off: float, passed: bool
) -> None:
    """A normalised reward is near 0, but the model's output was not; and so the sum of a mixture's terms."""
    config = load_config("demo-ppo", ["reward.model.dtype=bf16"])
    batch = TrajectoryBatch.from_sequences([[1, 2]] * 3, score=[0.1] * 3)
    of_model = ScoreResult(raw=raw, reward=0.1 + off)
    of_terms = MixedResult(raw=0.1 + off, reward=0.1 + off, terms={"one": raw, "other": -raw})
    for result in (of_model, of_terms):
        experience: Any = SimpleNamespace(require_rewards=lambda samples, result=result: [result])
        (check,) = SelfCheck(config, experience, None).score_alone(batch, SAMPLES)  # type: ignore[arg-type]
        assert check.passed == passed, check


def test_the_bounds_are_those_of_the_coarser_side_and_fp32_on_a_gpu_is_no_finer_than_tf32() -> None:
    def bounds(*overrides: str) -> Bounds:
        return log_prob_bounds(load_config("demo-ppo", list(overrides)))  # type: ignore[arg-type]

    assert bounds() == LOG_PROB_BOUNDS["fp32"]
    assert bounds("rollout.dtype=bf16") == bounds("policy.model.dtype=bf16") == LOG_PROB_BOUNDS["bf16"]
    assert bounds("rollout.resources.gpus_per_rank=1") == LOG_PROB_BOUNDS["fp16"]
