"""Whatever the system says of a path that a user names is one sentence and exit code 2, by every command; nothing is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.runs import RunDirectory

WORLD = "policy.model.make.tokenizer_from=world"
COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "check": lambda path: ["check", path],
    "status": lambda path: ["status", path],
    "report": lambda path: ["report", path],
    "report --output": lambda path: ["report", "run", "--output", path],
    "resume": lambda path: ["resume", path],
    "export": lambda path: ["export", path, "out"],
    "data": lambda path: ["check", "demo-sft", "data.world=null", f'data.path="{path}"', WORLD],
    "policy": lambda path: ["check", "demo-sft", "policy.model.make=null", f'policy.model.path="{path}"'],
    "tokenizer": lambda path: ["check", "demo-sft", f'policy.model.make.tokenizer_from="{path}"'],
    "tokens": lambda path: ["check", "serve", f'token_file="{path}"'],
    "evaluate": lambda path: ["evaluate", "--data-only", "--data", path],
    "evaluate --held-out": lambda path: ["evaluate", "--data-only", "--data", "pairs.jsonl", "--held-out", path],
    "evaluate --output": lambda path: ["evaluate", "--data-only", "--data", "pairs.jsonl", "--output", path],
}  # fmt: skip
PATHS = {
    "long": "x" * 300,
    "very long": "a/" * 2100 + "b",
    "below a file": "pairs.jsonl/config.yaml",
    "a loop": "loop",
    "a pipe": "pipe",
    "a home of nobody": "~nosuchuser/config.yaml",
    "half a letter": "a\udcff",
}


TAKEN = {("report --output", "half a letter"), ("evaluate --output", "half a letter")}
"""What is no fault: the file system takes such a name."""
MAY_BE_IDS = ("data", "policy", "tokenizer")
"""Whose paths may be ids of a hub, or are only looked for."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    RunDirectory.create("run", "kind: sft\n").release()
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    return tmp_path


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and what the command says of itself."""
    capsys.readouterr()
    try:
        code = main(words)
    except BaseException as error:
        pytest.fail(f"{words[0]} ended with {type(error).__name__}: {str(error)[:200]}")
    lines = capsys.readouterr().err.splitlines()
    return code, "\n".join(line for line in lines if line.startswith("rlhf-ray: "))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_cannot_be_is_a_sentence(
    here: Path, command: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir(here))
    code, sentence = told(COMMANDS[command](PATHS[path]), capsys)
    if code == 0:
        assert (command, path) in TAKEN or command in MAY_BE_IDS
        return
    assert code == 2 and sentence.count("\n") == 0 and len(sentence) > 20
    assert sorted(os.listdir(here)) == before


@pytest.fixture
def as_somebody_else(here: Path) -> Iterator[None]:
    """Work as a user who can read and write nothing of a folder."""
    closed = here / "closed"
    closed.mkdir(0o700)
    for name in ("config.yaml", "pairs.jsonl", "tokens"):
        (closed / name).write_text("kind: sft\n")
        (closed / name).chmod(0o600)
    (here / "unreadable").write_text("kind: sft\n")
    (here / "unreadable").chmod(0o600)
    for folder in (here, *here.parents[:3]):
        folder.chmod(0o755)
    os.seteuid(12345)
    yield
    os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="changes the user")
@pytest.mark.parametrize("path", ["closed/config.yaml", "closed", "unreadable"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_user_cannot_read_is_told_as_such(
    here: Path, as_somebody_else: None, command: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, sentence = told(COMMANDS[command](path), capsys)
    if code == 0 and command == "tokenizer":
        return
    assert code == 2 and sentence.count("\n") == 0 and len(sentence) > 20
    if "--output" not in command:
        assert "cannot write" not in sentence and "writable" not in sentence
