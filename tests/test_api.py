"""The interface for Python: importing it is light, a call does what the command does, and raises what it would print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rlhf_ray
from rlhf_ray import api
from rlhf_ray.errors import CapacityError, ConfigError, RequestError, ResumableStop, RlhfRayError
from rlhf_ray.runs.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of two steps, evaluated after the second."""
    run = RunDirectory.create(tmp_path / "small", "kind: sft\nrun: {name: small}\n")
    run.metrics.append({"step": 1, "timestamp": 1e9, "loss/sft": 2.0})
    run.metrics.append({"step": 2, "timestamp": 1e9 + 1, "loss/sft": 1.0})
    run.metrics.append({"step": 2, "timestamp": 1e9 + 2, "evaluation/loss": 1.5})
    return run


def test_importing_the_package_and_its_functions_imports_nothing_heavy() -> None:
    program = (
        "import sys; from rlhf_ray import Run, RewardClient, evaluate, resume, score, train; import rlhf_ray.api;"
        "print(*sorted({'torch', 'ray', 'transformers', 'pydantic', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_exists() -> None:
    assert all(getattr(rlhf_ray, name) is not None for name in rlhf_ray.__all__)


def test_metrics_have_one_row_a_step_with_its_evaluation(run) -> None:
    metrics = rlhf_ray.Run(run.path).metrics()
    assert list(metrics.index) == [1, 2]
    assert metrics["loss/sft"].tolist() == [2.0, 1.0]
    assert metrics["evaluation/loss"].isna().tolist() == [True, False]
    assert metrics.loc[2, "evaluation/loss"] == 1.5


def test_a_run_that_has_logged_nothing_has_an_empty_table(tmp_path) -> None:
    RunDirectory.create(tmp_path / "new", "kind: sft\n")
    assert rlhf_ray.Run(tmp_path / "new").metrics().empty


def test_a_directory_that_is_no_run_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(RequestError, match=r"is not a run directory: it has no config\.yaml"):
        rlhf_ray.Run(tmp_path)


def test_every_problem_of_a_config_is_raised_at_once(tmp_path) -> None:
    with pytest.raises(ConfigError) as raised:
        rlhf_ray.train("demo-sft", {"run.root": tmp_path, "policy.rank": 2, "epochs": "many", "data.world": None})
    assert len(raised.value.problems) >= 3
    assert not any(tmp_path.iterdir())


def test_overrides_reach_the_config_as_the_values_they_are() -> None:
    values = {"a": None, "b": True, "c": 1e-5, "d": "no", "e": [1, "x"], "f": Path("/data/x y.jsonl"), "g": "1.0"}
    values |= {
        "h": "\U0001f600 \u2028",
        "i": np.int64(3),
        "j": np.bool_(True),
        "k": np.array([0.5]),
        "l": {"m": np.float32(2)},
    }
    from rlhf_ray.config.reading import read_value

    texts = dict(text.split("=", 1) for text in api._texts(values))
    read = {key: read_value(text) for key, text in texts.items()}
    assert read == {**values, "f": "/data/x y.jsonl", "k": [0.5]}
    assert [type(read[key]) for key in "ij"] == [int, bool]


def test_an_override_that_is_no_value_of_a_config_is_refused_by_its_key() -> None:
    with pytest.raises(RequestError, match=r"^run\.name: a bytes cannot stand in a config"):
        rlhf_ray.train("demo-sft", {"run.name": b"x"})


@pytest.mark.parametrize("overrides", [["run.seed=1"], "run.seed=1"])
def test_overrides_as_the_command_line_writes_them_are_refused_with_the_form_that_is_read(overrides) -> None:
    with pytest.raises(RequestError, match=r'a mapping was expected, such as \{"run\.seed": 1\}'):
        rlhf_ray.train("demo-sft", overrides)


@pytest.mark.parametrize("item", ["a text", {"text": "a text"}])
def test_one_item_in_place_of_a_sequence_is_refused(item) -> None:
    with pytest.raises(RequestError, match=r"items is one item, a sequence of them was expected: write \[item\]"):
        rlhf_ray.score("model", item)


@pytest.mark.parametrize(
    ("code", "error"),
    [(1, RlhfRayError), (2, RequestError), (3, CapacityError), (75, ResumableStop), (-9, RlhfRayError)],
)
def test_a_driver_that_did_not_finish_is_an_error_of_its_kind(code, error, monkeypatch, tmp_path) -> None:
    from rlhf_ray.launch import parent

    monkeypatch.setattr(parent, "start_run", lambda job: code)
    with pytest.raises(error, match=f"runs/demo-sft: the run ended with exit code {code}") as raised:
        rlhf_ray.train("demo-sft", {"run.root": str(tmp_path / "runs")})
    assert type(raised.value) is error
