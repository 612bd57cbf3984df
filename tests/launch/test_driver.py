"""Every ending of a driver is a code, and a mistake of the user's is a message; a refused run frees its name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest

from rlhf_ray import environment
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.console import get_logger
from rlhf_ray.errors import (
    CapacityError,
    ConfigError,
    DataError,
    GroupError,
    Interrupted,
    NumericalError,
    RequestError,
    ResumableStop,
)
from rlhf_ray.launch import driver
from rlhf_ray.processes.interrupts import kept_handlers
from rlhf_ray.runs import inputs
from rlhf_ray.trainers import stopping

CONFIG = dump_config(load_config("demo-sft", ["run.name=small"]))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A driver listens to signals; the tests after it do not."""
    with kept_handlers():
        yield
    stopping._received.clear()
    stopping._stop.clear()


@pytest.fixture
def message(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the project's logger says."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    return caplog


def failing(error: Exception) -> Callable[..., NoReturn]:
    """Work that ends in ``error``."""

    def work(*arguments: object, **options: object) -> NoReturn:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(["run.seed: wrong"]), 2),
        (DataError("rows.jsonl:3: no 'answer'"), 2),
        (CapacityError("the job does not fit"), 3),
        (ResumableStop("stopped on request"), 75),
        (GroupError("policy", 1, "accumulate", "the process died"), 1),
        (NumericalError("5 updates in a row were skipped"), 1),
    ],
)
def test_an_error_of_ours_is_one_message_and_its_code(message, error, code):
    assert driver.exit_code(failing(error)) == code
    (record,) = message.records
    assert record.getMessage() == str(error) and record.exc_info is None


def test_any_other_error_shows_its_trace(message):
    assert driver.exit_code(failing(KeyError("a bug"))) == 1
    assert message.records[-1].exc_info is not None


def test_work_that_ends_is_done():
    assert driver.exit_code(lambda: None) == 0


def raise_signal(number: int) -> None:
    """Raise a signal that something handles; any other would end the tests."""
    assert signal.getsignal(number) != signal.SIG_DFL
    signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_only_asks_once_steps_have_begun(number):
    def work() -> None:
        stopping.steps_begin()
        raise_signal(number)
        raise_signal(number)

    assert driver.exit_code(work) == 0
    assert stopping.stop_requested()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_is_obeyed_at_once_and_the_run_can_go_on(tmp_path, monkeypatch, message, number):
    went_on = []

    def train(*job: object, place: object) -> None:
        raise_signal(number)
        went_on.append("after the signal")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "import_object", lambda path: train)
    assert driver.exit_code(lambda: driver.train_new_run(CONFIG)) == 75
    assert went_on == []
    assert "stopped on request before the first step; go on with: rlhf-ray resume" in message.text
    assert (tmp_path / "runs/small/config.yaml").is_file()


def test_a_signal_before_a_run_is_begun_leaves_nothing(project_log):
    assert driver.exit_code(lambda: signal.raise_signal(signal.SIGTERM)) == 128 + signal.SIGTERM
    assert project_log.getvalue().count("stopped by SIGTERM") == 1


def test_a_request_to_stop_made_in_one_job_of_the_demo_stops_the_next_before_it_begins(monkeypatch):
    assert driver.exit_code(lambda: (stopping.steps_begin(), signal.raise_signal(signal.SIGTERM))) == 0
    with pytest.raises(Interrupted):
        stopping.listen()


@pytest.mark.parametrize("error", [DataError("rows.jsonl:3: no 'answer'"), CapacityError("full")])
def test_a_run_that_was_refused_before_its_first_step_frees_its_name(tmp_path, monkeypatch, error):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "run_trainer", failing(error))
    for _ in range(2):
        with pytest.raises(type(error)):
            driver.train_new_run(CONFIG)
    assert not (tmp_path / "runs/small").exists()


@pytest.mark.parametrize("error", [GroupError("policy", 1, "setup", "the process died"), ResumableStop("wanted")])
def test_a_run_that_failed_keeps_its_directory(tmp_path, monkeypatch, error):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "run_trainer", failing(error))
    with pytest.raises(type(error)):
        driver.train_new_run(CONFIG)
    assert (tmp_path / "runs/small/config.yaml").read_text() == CONFIG
    with pytest.raises(RequestError, match="rlhf-ray resume"):
        driver.train_new_run(CONFIG)


def test_a_run_refused_after_a_step_keeps_its_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def one_step(config: object, run: driver.RunDirectory, checkpoint: object, *, place: object) -> None:
        run.metrics.append({"step": 1, "timestamp": 0.0})
        raise RequestError("the disk is full")

    monkeypatch.setattr(driver, "run_trainer", one_step)
    with pytest.raises(RequestError):
        driver.train_new_run(CONFIG)
    assert len((tmp_path / "runs/small/metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(("source", "offline"), [("data.path=org/rows", "0"), ("data.path=rows.jsonl", "1")])
def test_only_a_job_that_names_a_hub_id_lets_its_driver_ask_the_hub(source, offline, tmp_path, monkeypatch) -> None:
    """The driver reads the tokenizer and the rows in its own process, whose parent was offline."""
    overrides = ["data.world=null", source, "data.evaluation_fraction=0.1", f"run.root={tmp_path}"]
    text = dump_config(load_config("demo-sft", overrides))
    for name in environment.HUB_SWITCHES:
        monkeypatch.setenv(name, "1")
    seen = []

    def train(*job: object, place: object) -> None:
        seen.extend(os.environ[name] for name in environment.HUB_SWITCHES)

    monkeypatch.setattr(driver, "import_object", lambda path: train)
    monkeypatch.setattr(inputs, "fingerprint_inputs", lambda config: {})  # would ask the hub
    driver.train_new_run(text)
    assert seen == [offline] * 3
