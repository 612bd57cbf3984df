"""Every function of an algorithm equals what OpenRLHF, TRL, torchtune and verl computed from the committed inputs, to 1e-6.

That each comparison would notice is shown by doing one thing in another way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf_ray.algorithms import masked
from rlhf_ray.algorithms.importance import ImportanceCorrection
from rlhf_ray.algorithms.policy_loss import Cispo, Clipped, Dppo, PolicyLoss

from . import algorithms
from .expected import Expected, differences

BAR, NOTICED = 1e-6, 1e-4
Inputs = dict[str, Any]


@pytest.fixture(scope="module", params=algorithms.COMPARISONS)
def compared(request: pytest.FixtureRequest) -> tuple[Expected, Callable[[Inputs], algorithms.Values]]:
    return Expected.read(request.param), algorithms.COMPARISONS[request.param]


def test_every_value_equals_theirs(compared) -> None:
    expected, ours = compared
    found = differences(ours(expected.inputs), expected.values)
    assert len(found) > 20
    assert {name: difference for name, difference in found.items() if difference > BAR} == {}


def test_the_inputs_reach_every_bound(compared) -> None:
    """Ratios, values, scores and weights on both sides of their bounds, ragged answers, whole groups, cut answers."""
    inputs = compared[0].inputs
    assert len(set(inputs["lengths"])) > 5 and set(inputs["finished"]) == {True, False}
    moved = np.exp(inputs["log_probs"] - inputs["old_log_probs"])
    drift = np.exp(inputs["old_log_probs"] - inputs["rollout_log_probs"])
    for values, low, high in (
        (moved, 0.8, 1.3),
        (drift, 0.8, 1.25),
        (inputs["values"] - inputs["old_values"], -0.2, 0.2),
        (inputs["scores"], -1.5, 1.5),
    ):
        assert (values < low).any() and (values > high).any() and ((values > low) & (values < high)).any()


@pytest.mark.parametrize(
    "name", ["scores", *(name for name in algorithms.PER_TOKEN if name not in ("token_rewards", "rollout_log_probs"))]
)
def test_another_number_is_noticed(name) -> None:
    """In some comparison; columns that only one of them reads are in that one."""
    largest = 0.0
    for key, ours in algorithms.COMPARISONS.items():
        expected = Expected.read(key)
        inputs = copy.deepcopy(expected.inputs)
        inputs[name] = inputs[name] * np.float32(1.01)
        largest = max(largest, *differences(ours(inputs), expected.values).values())
    assert largest > NOTICED


def biased(self: PolicyLoss, mask: Any, offsets: Any) -> Any:
    """All actions weigh alike, whatever was asked."""
    return mask.float()


CHANGES: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "answers averaged over tokens": ("algorithms_trl", lambda patch: patch.setattr(PolicyLoss, "_shares", biased)),
    "whitening over n - 1": (
        "algorithms_openrlhf",
        lambda patch: patch.setattr(algorithms, "whiten", lambda x, mask, **_: masked.whiten(x, mask, unbiased=True)),
    ),
    "whitening over n": (
        "algorithms_trl_ppo",
        lambda patch: patch.setattr(
            algorithms, "whiten", lambda x, mask, *, unbiased, **rest: masked.whiten(x, mask, **rest)
        ),
    ),
    "weights that are not bounded": (
        "algorithms_trl",
        lambda patch: patch.setattr(
            algorithms,
            "ImportanceCorrection",
            lambda level, rule, low, high, gating: ImportanceCorrection(level, rule, 0.0, 1e9, gating),
        ),
    ),
    "a trust region of the other divergence": (
        "algorithms_openrlhf",
        lambda patch: patch.setitem(algorithms.GATED, "token binary_kl", ("token", "tv", 0.0, 0.02)),
    ),
    "a trust region of tokens instead of answers": (
        "algorithms_openrlhf",
        lambda patch: patch.setitem(algorithms.GATED, "seq binary_kl", ("token", "binary_kl", 0.0, 0.02)),
    ),
    "a lower bound for cispo": (
        "algorithms_trl",
        lambda patch: patch.setitem(algorithms.TRL_LOSSES, "cispo", PolicyLoss(Cispo(0.2, 0.3))),
    ),
    "DPPO by the other divergence": (
        "algorithms_verl",
        lambda patch: patch.setitem(algorithms.VERL_LOSSES, "kl", PolicyLoss(Dppo("tv", 0.01, 0.01))),
    ),
    "DPPO with its bounds exchanged": (
        "algorithms_verl",
        lambda patch: patch.setitem(algorithms.VERL_LOSSES, "tv, wider above", PolicyLoss(Dppo("tv", 0.06, 0.02))),
    ),
    "DPPO without a cap": (
        "algorithms_verl",
        lambda patch: patch.setitem(algorithms.VERL_LOSSES, "tv, cut ratios", PolicyLoss(Dppo("tv", 0.05, 0.05))),
    ),
    "no dual clip": (
        "algorithms_trl",
        lambda patch: patch.setitem(algorithms.TRL_LOSSES, "two-sided clip", PolicyLoss(Clipped(0.2, 0.2))),
    ),
    "a ratio of each token": (
        "algorithms_openrlhf",
        lambda patch: patch.setitem(
            algorithms.OPENRLHF_LOSSES, "gspo", replace(algorithms.OPENRLHF_LOSSES["gspo"], ratio="token")
        ),
    ),
    "no discount": ("algorithms_openrlhf", lambda patch: patch.setattr(algorithms, "GAMMA", 1.0)),
    "another lambda": ("algorithms_trl_ppo", lambda patch: patch.setattr(algorithms, "LAM", 0.95)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_way_is_noticed(change, monkeypatch: pytest.MonkeyPatch) -> None:
    name, patch = CHANGES[change]
    expected = Expected.read(name)
    patch(monkeypatch)
    assert max(differences(algorithms.COMPARISONS[name](expected.inputs), expected.values).values()) > NOTICED


def test_the_committed_inputs_are_those_of_the_program() -> None:
    """Of every file; the numbers may be drawn otherwise by another version of torch."""
    made = algorithms.make_inputs()
    for name in algorithms.COMPARISONS:
        read = Expected.read(name).inputs
        assert read.keys() == made.keys()
        assert all(read[key] == made[key] for key in ("seed", "lengths", "groups", "finished"))
