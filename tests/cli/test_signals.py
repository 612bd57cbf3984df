"""Every command obeys SIGINT, SIGTERM and SIGHUP with one sentence and the exit code that is documented."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray import environment
from rlhf_ray.cli.main import main
from rlhf_ray.config import loading
from rlhf_ray.launch import parent, score
from rlhf_ray.pending import Pending
from rlhf_ray.processes import lifeline
from rlhf_ray.processes.child import Ended
from rlhf_ray.processes.interrupts import SIGNALS
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from tests.serving.reward_models import save_reward_model

each_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@each_signal
@pytest.mark.parametrize("command", ["check", "plan", "submit"])
def test_a_command_that_loses_nothing_stops_at_once_with_the_code_of_the_signal(monkeypatch, capsys, command, number):
    monkeypatch.setattr(loading, "load_config", lambda *config, **options: signal.raise_signal(number))
    assert main([command, "demo-sft"]) == 128 + number
    assert capsys.readouterr().err == f"rlhf-ray: stopped by {number.name}\n"


class Stopped:
    """A cluster and a reward group on it that are asked to stop after so many chunks of rows, by ``number``."""

    def __init__(self, number: int, chunks: int) -> None:
        self.number = number
        self.chunks = chunks

    def for_job(self, config: object, *, together: bool) -> Stopped:
        return self

    def __enter__(self) -> Stopped:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        if self.chunks == 0:
            signal.raise_signal(self.number)
        self.chunks -= 1
        return Pending.done([ScoreResult(raw=1.0, reward=1.0) for _ in requests])


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is the child that does the work."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(lifeline, "_line", theirs)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward"))


@each_signal
@pytest.mark.parametrize("chunks", [0, 3])
@pytest.mark.usefixtures("child")
def test_score_keeps_what_was_written_and_the_same_command_goes_on(
    monkeypatch, capsys, tmp_path, model, number, chunks
):
    rows = [{"text": str(row)} for row in range(10)]
    (tmp_path / "items.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = ["score", str(model), "--input", "items.jsonl", "--output", "scores.jsonl"]
    monkeypatch.setattr(score, "ROWS_PER_CALL", 2)

    def run(stopped: Stopped) -> tuple[int, str]:
        monkeypatch.setattr(score, "Cluster", stopped)
        monkeypatch.setattr(score, "load_scorer", lambda cluster, config: stopped)
        return main(command), capsys.readouterr().err

    code, message = run(Stopped(number, chunks))
    assert code == 75
    assert "stopped on request" in message and "the same command goes on" in message and "Traceback" not in message
    written = (tmp_path / "scores.jsonl").read_text().splitlines() if chunks else []
    assert len(written) == max(0, 2 * (chunks - 1))  # one chunk is scored ahead of the one that is written
    code, _ = run(Stopped(number, 100))
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("ended", "code"),
    [(Ended(75, 15), 75), (Ended(0), 0), (Ended(143, 15), 143), (Ended(-9), 1), (Ended(-15, 15), 143)],
)
@pytest.mark.parametrize(
    "options", [("score", "--input", "x", "--output", "y"), ("serve",), ("evaluate", "--data", "x")]
)
def test_a_command_that_starts_ray_here_does_it_in_a_session_of_its_own(monkeypatch, model, options, ended, code):
    started: list[Any] = []
    monkeypatch.setattr(parent, "run_child", lambda words, **options: (started.append(words), ended)[1])
    command = [options[0], str(model), *options[1:]]
    assert main(command) == code
    assert started == [["-m", "rlhf_ray", *command]]


def test_the_exit_code_is_the_last_line_of_a_submitted_job(monkeypatch, capsys):
    monkeypatch.setenv(environment.SAYS_EXIT_CODE, "1")
    assert main(["check", "no-such-recipe"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"{environment.EXIT_CODE_LINE}2"
    assert os.environ[environment.SAYS_EXIT_CODE] == "1"


def test_signals_are_handled_before_anything_that_takes_a_while_is_imported():
    """A signal that comes earlier meets Python's own handlers, which show a stack trace."""
    program = "import sys; import rlhf_ray.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"rich", "ruamel", "psutil", "numpy", "torch", "ray", "transformers", "shutil"}


@each_signal
def test_an_export_that_is_stopped_leaves_nothing(monkeypatch, capsys, tmp_path, model, number):
    from rlhf_ray.launch import export

    def save(*arguments: object, **options: object) -> None:
        (Path(str(arguments[2])) / "half").write_text("written")
        signal.raise_signal(number)

    monkeypatch.setattr(export, "save_pretrained", save)
    assert main(["export", str(model), str(tmp_path / "exported")]) == 128 + number
    assert f"stopped by {number.name}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
