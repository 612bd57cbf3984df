"""Ours equals what independent implementations computed from the committed inputs; without them, and without a network.

``make parity`` shows that the committed values are theirs. That each comparison would notice is shown here: one thing done
in another way moves a result by far more than the bar.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray import environment

environment.prepare()

from . import (  # noqa: E402
    expected,
    openrlhf_models,
    reward_losses,
    trl_log_probs,
    trl_preferences,
    trl_reward,
    trl_sft,
    trl_training,
)
from .expected import TOLERANCE, Expected, differences  # noqa: E402

Inputs = dict[str, Any]
NOTICED = 10 * TOLERANCE
WHOLE, IN_TWO, BY_PAIRS = 4096, 64, 40
"""Token budgets that cut an update of six pairs into one, two and about four micro-batches."""


def above_the_bar(found: dict[str, float]) -> dict[str, float]:
    return {name: difference for name, difference in found.items() if difference > TOLERANCE}


@pytest.fixture(scope="module")
def reward() -> Expected:
    return Expected.read("trl_reward")


@pytest.mark.parametrize(("zero", "max_tokens"), [(0, WHOLE), (0, BY_PAIRS), (1, IN_TWO), (2, IN_TWO), (3, IN_TWO)])
def test_ten_steps_of_reward_training_equal_trl(reward: Expected, zero: int, max_tokens: int) -> None:
    found = differences(trl_reward.ours(reward.inputs, max_tokens=max_tokens, zero=zero), reward.values)
    assert above_the_bar(found) == {}


@pytest.mark.parametrize(("zero", "max_tokens"), [(0, WHOLE), (0, IN_TWO), (2, IN_TWO)])
def test_ten_steps_of_fine_tuning_equal_trl(zero: int, max_tokens: int) -> None:
    """Losses, norms and all weights: TRL's come from padded batches, ours from packs, whole or cut into micro-batches."""
    trl = Expected.read("trl_sft")
    assert above_the_bar(differences(trl_sft.ours(trl.inputs, max_tokens=max_tokens, zero=zero), trl.values)) == {}
    answers = {sum(each["learned"]) for step in trl.inputs["steps"] for each in step}
    assert len(trl.inputs["steps"]) == 10 and len(answers) > 8, "ragged"
    assert (trl.values["clipped/gradient norm"] > trl.inputs["cases"]["clipped"]["max_grad_norm"]).all()
    assert len(trl.values) == 2 * (2 + len(trl.inputs["weights"]))


def test_another_token_that_is_learned_is_noticed() -> None:
    trl = Expected.read("trl_sft")
    inputs = copy.deepcopy(trl.inputs)
    inputs["cases"] = {"free": inputs["cases"]["free"]}
    learned = inputs["steps"][0][0]["learned"]
    learned[learned.index(1)] = 0
    found = differences(trl_sft.ours(inputs), {name: value for name, value in trl.values.items() if "free/" in name})
    assert found["free/loss"] > NOTICED and found["free/gradient norm"] > NOTICED


def test_what_is_compared_is_all_of_ten_ragged_steps(reward: Expected) -> None:
    lengths = {len(pair[side]) for pairs in reward.inputs["steps"] for pair in pairs for side in ("chosen", "rejected")}
    weights = {name for name in reward.values if name.startswith("clipped/weights/")}
    assert len(reward.inputs["steps"]) == 10 and len(lengths) > 8
    assert weights == {f"clipped/weights/{name}" for name in reward.inputs["weights"]}
    for name in weights:
        assert np.abs(reward.values[name] - reward.inputs["weights"][name.split("/")[-1]]).max() > NOTICED, name
    bounds = {name: case["max_grad_norm"] for name, case in reward.inputs["cases"].items()}
    assert (reward.values["clipped/gradient norm"] > bounds["clipped"]).all()
    assert (reward.values["margins and centering/gradient norm"] < bounds["margins and centering"]).all()


def swap_sides(inputs: Inputs) -> None:
    pair = inputs["steps"][0][0]
    pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]


def swap_across_steps(inputs: Inputs) -> None:
    first, second = inputs["steps"][:2]
    first[0], second[0] = second[0], first[0]


def cut_the_last_token(inputs: Inputs) -> None:
    inputs["steps"][1][0]["rejected"].pop()


def set_in(section: str, name: str | int, value: object) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        for key in filter(None, section.split("/")):
            inputs = inputs[int(key) if key.isdigit() else key]
        assert inputs[name] != value
        inputs[name] = value

    return change


CHANGES: dict[str, Callable[[Inputs], None]] = {
    "a pair the wrong way round": swap_sides,
    "pairs in another order": swap_across_steps,
    "a token less": cut_the_last_token,
    "another learning rate": set_in("optimizer", "learning_rate", 0.00202),
    "another beta": set_in("optimizer", "betas", [0.9, 0.999]),
    "another eps": set_in("optimizer", "eps", 9e-5),
    "weight decay": set_in("optimizer", "weight_decay", 0.1),
    "no clipping": set_in("cases/clipped", "max_grad_norm", 1000.0),
    "no margins": set_in("cases/margins and centering", "margins", False),
    "no centering": set_in("cases/margins and centering", "centering", 0.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_way_of_training_is_noticed(reward: Expected, change: str) -> None:
    inputs = copy.deepcopy(reward.inputs)
    CHANGES[change](inputs)
    found = differences(trl_reward.ours(inputs), reward.values)
    assert max(found[name] for name in found if name.endswith(("/loss", "/held-out scores"))) > NOTICED


def test_a_run_of_256_pairs_ends_in_the_scores_of_trl() -> None:
    """The bar is 1e-3. A run that learned nothing would have half of the held-out pairs the wrong way round."""
    trl = Expected.read("trl_training")
    assert sum(map(len, trl.inputs["steps"])) == 256 and len(trl.inputs["held_out"]) == 64
    scores = trl.values["training/held-out scores"]
    assert (scores[0::2] > scores[1::2]).mean() > 0.7
    assert max(differences(trl_training.ours(trl.inputs), trl.values).values()) <= 1e-4


@pytest.fixture(scope="module")
def preferences() -> Expected:
    return Expected.read("trl_preferences")


@pytest.mark.parametrize(("zero", "max_tokens"), [(0, WHOLE), (0, BY_PAIRS), (2, IN_TWO), (3, IN_TWO)])
def test_ten_steps_of_dpo_ipo_simpo_and_kto_equal_trl(preferences: Expected, zero: int, max_tokens: int) -> None:
    """Packed here, padded there; the reference asked once here, at every step there."""
    found = differences(trl_preferences.ours(preferences.inputs, max_tokens=max_tokens, zero=zero), preferences.values)
    assert above_the_bar(found) == {}


def test_what_is_compared_with_trl_is_all_of_ten_ragged_steps_that_learn(preferences: Expected) -> None:
    steps = preferences.inputs["steps"]
    assert preferences.inputs | {"weights": None} == trl_preferences.make_inputs() | {"weights": None}
    assert len(steps) == 10 and len({len(row["chosen"]) for rows in steps for row in rows}) > 6
    names = preferences.inputs["weights"]
    for case in trl_preferences.CASES:
        moved = [
            np.abs(preferences.values[f"{case}/weights/{name}"] - preferences.inputs["weights"][name]).max()
            for name in names
        ]
        assert min(moved) > NOTICED, case
    assert (preferences.values["kto/kl"] > 0.01).sum() > 4


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("sigmoid", "beta", 0.303), ("ipo", "length_normalised", False), ("sigmoid of means", "length_normalised", False),
        ("simpo", "simpo_gamma", 0.61), ("simpo, labels smoothed", "label_smoothing", 0.0), ("kto", "desirable_weight", 1.21),
    ],
)  # fmt: skip
def test_another_loss_on_preferences_is_noticed(preferences: Expected, case: str, key: str, value: object) -> None:
    inputs = copy.deepcopy(preferences.inputs)
    inputs["cases"][case]["loss"][key] = value
    found = differences(trl_preferences.ours(inputs, cases=[case]), preferences.values)
    assert found[f"{case}/loss"] > NOTICED


def test_reward_losses_equal_trl_and_openrlhf() -> None:
    theirs = Expected.read("reward_losses")
    found = differences(reward_losses.ours(theirs.inputs), theirs.values)
    assert len({name.split("/")[0] for name in found}) == 6 and max(found.values()) <= 1e-6


@pytest.mark.parametrize("name", ["chosen", "rejected", "margin"])
def test_another_score_or_margin_is_noticed(name: str) -> None:
    theirs = Expected.read("reward_losses")
    inputs = theirs.inputs | {name: theirs.inputs[name] + np.float32(0.001)}
    found = differences(reward_losses.ours(inputs), theirs.values)
    assert {loss for loss in found if "margin" in loss or name != "margin"} == {
        loss for loss, difference in found.items() if difference > 1e-6
    }


def test_log_probs_and_entropies_equal_trl() -> None:
    trl = Expected.read("trl_log_probs")
    assert len({name.split("/")[0] for name in trl.values}) == len(trl.inputs["temperatures"]) == 2
    assert above_the_bar(differences(trl_log_probs.ours(trl.inputs), trl.values)) == {}


@pytest.mark.parametrize("name", ["layer", "of entropy", "of log-probs"])
def test_another_output_layer_or_weight_is_noticed(name: str) -> None:
    trl = Expected.read("trl_log_probs")
    inputs = trl.inputs | {name: trl.inputs[name] * np.float32(1.001)}
    assert above_the_bar(differences(trl_log_probs.ours(inputs), trl.values))


def test_reward_models_and_critics_equal_openrlhfs() -> None:
    """Loaded from what this project writes, which OpenRLHF writes again under the same names."""
    openrlhf = Expected.read("openrlhf_models")
    assert openrlhf.inputs == openrlhf_models.make_inputs() and set(openrlhf.inputs["batches"]) == {"left", "right"}
    found = differences(openrlhf_models.ours(openrlhf.inputs), openrlhf.values)
    assert above_the_bar(found) == {} and len(found) > 3 * 8 + 3 * 20


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        (set_in("", "mean", 0.251), "normalised"),
        (set_in("", "std", 1.51), "normalised"),
        (set_in("batches/right/mask/0", 8, 0), "scores, right"),
        (set_in("batches/left/action_mask/1", 1, 0), "values, left"),
    ],
)
def test_another_normalisation_or_place_of_the_score_is_noticed(change: Callable[[Inputs], None], noticed: str) -> None:
    openrlhf = Expected.read("openrlhf_models")
    inputs = copy.deepcopy(openrlhf.inputs)
    change(inputs)
    inputs["cases"] = {"llama": inputs["cases"]["llama"]}
    found = differences(openrlhf_models.ours(inputs), openrlhf.values)
    assert all(found[name] > NOTICED for name in found if name.startswith("llama/") and noticed in name)


def test_the_committed_inputs_are_those_of_the_program(reward: Expected) -> None:
    """All but the weights, which another version of torch may draw otherwise."""
    training = Expected.read("trl_training").inputs
    sft = Expected.read("trl_sft").inputs
    pairs = ((reward.inputs, trl_reward), (training, trl_training), (sft, trl_sft))
    for found, made in ((inputs, module.make_inputs()) for inputs, module in pairs):
        assert found | {"weights": None} == made | {"weights": None}


def test_a_file_gives_back_its_arrays_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected, "DIRECTORY", tmp_path)
    numbers = np.random.default_rng(0).normal(size=200).astype(np.float32)
    values = {"few": numbers[:7], "many": numbers.reshape(20, 10), "one": numbers[:1].reshape(())}
    Expected({"tokens": [[1, 2], [3]]}, values, {"trl": "1.16.0"}).write("it")
    read = Expected.read("it")
    assert read.inputs == {"tokens": [[1, 2], [3]]} and read.versions == {"trl": "1.16.0"}
    assert set(differences(read.values, values).values()) == {0.0}


def test_a_missing_misshapen_or_broken_value_differs() -> None:
    good = {"a": np.zeros(2, np.float32)}
    for bad in ({}, {"a": np.zeros((2, 1))}, {"a": np.array([0.0, np.nan])}, good | {"b": np.zeros(1)}):
        assert max(differences(bad, good).values()) == max(differences(good, bad).values()) == float("inf")
