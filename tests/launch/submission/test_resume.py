"""``rlhf-ray submit --resume`` sends the command that resumes the run, by a name that the cluster knows it under."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.errors import EXIT_WRONG_REQUEST
from rlhf_ray.launch import submit as launch


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of every command that would be sent."""
    words: list[list[str]] = []

    class Server:
        def __init__(self, address: str) -> None:
            self.address = address

        def submit(self, job: str, *, entrypoint: str, **_: Any) -> None:
            words.append(shlex.split(entrypoint))

    monkeypatch.setattr(launch, "JobServer", Server)
    return words


def test_a_run_is_resumed_by_its_whole_path_with_its_changes(
    sent: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "a run"
    run.mkdir()
    (run / "config.yaml").write_text("kind: sft\n")
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "--resume", "a run", "steps=8", "--accept", "data.path", "--no-wait"]) == 0
    assert main(["submit", "--resume", "/on/the/cluster", "--no-wait"]) == 0
    resume = ["python", "-m", "rlhf_ray", "resume"]
    assert sent == [[*resume, str(run), "steps=8", "--accept", "data.path"], [*resume, "/on/the/cluster"]]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--resume", "gone"], "gone is not here: give --resume the whole path"),
        (["--resume", "."], "is not a run directory"),
        ([], "submit needs a config"),
    ],
)
def test_what_cannot_be_resumed_is_refused_before_anything_is_sent(
    sent: list[list[str]],
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", *words, "--no-wait"]) == EXIT_WRONG_REQUEST
    assert sentence in capsys.readouterr().err
    assert sent == []
