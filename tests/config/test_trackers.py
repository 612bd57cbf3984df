"""A wrong tracker is told by its name with the way out, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.config import trackers
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.config.paths import with_absolute_paths
from rlhf_ray.config.trackers import NAMES, Target, key_of, missing, problem, target
from rlhf_ray.errors import ConfigError

WRONG = {
    "wanbd": "did you mean wandb? trackers are tensorboard, wandb, mlflow, trackio, jsonl",
    "TensorBoard": "did you mean tensorboard?",
    "neptune": "'neptune' is no tracker: trackers are",
    "": "'' is no tracker: trackers are",
    "jsonl": "jsonl needs a file: write jsonl:FILE",
    "wandb:": "names no place after the colon: write wandb, or wandb:offline",
    "wandb:http://host": "write wandb, or wandb:offline; WANDB_BASE_URL names another server",
    "mlflow:http://me:secret@host:5000": "MLFLOW_TRACKING_PASSWORD",
    "mlflow:https://token@host:5000": "MLFLOW_TRACKING_USERNAME",
    "mlflow:/data/mlruns": "write mlflow:sqlite:////data/mlruns",
    "mlflow:file:///data/mlruns": "write mlflow:sqlite:////data/mlruns",
    "mlflow:http://[host": "its place is no URI",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_tracker_is_told_with_the_way_out(text: str) -> None:
    with pytest.raises(ConfigError) as told:
        load_config("demo-sft", [f"monitoring.trackers=[tensorboard, '{text}']"])
    assert "monitoring.trackers" in str(told.value) and WRONG[text] in str(told.value)
    assert "secret" not in str(told.value).replace("/data", "")


def test_the_same_tracker_twice_is_refused_and_two_places_of_one_are_not() -> None:
    with pytest.raises(ConfigError, match="stands there 2 times"):
        load_config("demo-sft", ["monitoring.trackers=[wandb, wandb]"])
    load_config("demo-sft", ["monitoring.trackers=[jsonl:a, jsonl:b]"])
    keys = {key_of(target(text)) for text in ("jsonl:a", "jsonl:b", "wandb", "wandb:offline", "mlflow:http://h:1")}
    assert len(keys) == 5 and all(key.replace("-", "").isalnum() for key in keys)


def test_no_two_places_share_a_key_and_every_key_fits_into_the_name_of_a_file() -> None:
    long = "/deep" * 30
    places = (
        "/a/b-c",
        "/a/b/c",
        "/a/b/c/",
        "-",
        "/",
        f"/one{long}",
        f"/two{long}",
        "/\u65e5" * 90,
        "/\u672c" * 90,
        "/\udcff",
    )
    keys = {key_of(Target("jsonl", place)) for place in places}
    assert len(keys) == len(places)
    assert all(key.isascii() and len(key) < 200 and key.replace("-", "").isalnum() for key in keys)
    assert key_of(Target("jsonl", "/a/b-c")).startswith("jsonl-a-b-c-") and key_of(Target("wandb")) == "wandb"


@pytest.mark.parametrize(
    "text", ["tensorboard", "wandb", "wandb:offline", "mlflow:sqlite:////x.db", "trackio", "jsonl:x"]
)
def test_right_ones_pass_and_come_back(text: str) -> None:
    assert problem(text) == "" and str(target(text)) == text
    config = load_config("demo-sft", [f"monitoring.trackers=['{text}']"])
    assert f"'{text}'" in dump_config(config) or f"- {text}" in dump_config(config)


def test_places_that_are_paths_are_made_absolute(tmp_path: Path) -> None:
    paths = "'tensorboard:a', 'jsonl:b/c', 'trackio:/d', 'mlflow:sqlite:///x/y.db'"
    names = f"[tensorboard, {paths}, 'mlflow:http://h', wandb:offline]"
    config = with_absolute_paths(load_config("demo-sft", [f"monitoring.trackers={names}"]), tmp_path).to_train()
    assert config.monitoring.trackers == [
        "tensorboard", f"tensorboard:{tmp_path}/a", f"jsonl:{tmp_path}/b/c", "trackio:/d",
        f"mlflow:sqlite:///{tmp_path}/x/y.db", "mlflow:http://h", "wandb:offline",
    ]  # fmt: skip


def test_a_missing_package_is_told_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert missing(target("jsonl:x")) == ""
    assert missing(target("wandb:offline")) == "wandb is not installed: pip install 'rlhf-ray[wandb]'"
    assert missing(target("mlflow")).startswith("mlflow and sqlalchemy and alembic are not installed")
    assert missing(target("mlflow:http://h")) == "mlflow is not installed: pip install 'rlhf-ray[mlflow]'"
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-ray\[trackio\]'"):
        load_config("demo-sft", ["monitoring.trackers=[trackio]"], files=True)
    load_config("demo-sft", ["monitoring.trackers=[trackio]"])


def test_a_folder_of_the_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert "pip install" in missing(target("wandb"))


def test_every_tracker_has_an_extra() -> None:
    import tomllib

    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(NAMES) - {"jsonl"} <= extras.keys()
