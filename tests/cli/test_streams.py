"""A result is on standard output whole, or one sentence says why not; nothing of others reaches a terminal as commands."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.console import printable, table
from rlhf_ray.runs import RunDirectory

from .conftest import ROOT

RESULTS = {
    "check": ["check", "demo-sft"],
    "plan": ["plan", "demo-sft"],
    "status": ["status", "run"],
    "report": ["report", "run"],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    RunDirectory.create("run", "kind: sft\nrun: {name: ü}\n").release()
    return tmp_path


def pipe_without_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def closed() -> io.TextIOWrapper:
    with open(os.devnull, "w") as stream:
        return stream


def full() -> io.TextIOWrapper:
    return open("/dev/full", "w")


STREAMS = {
    "full": (full, "cannot write to standard output: No space left on device"),
    "without a reader": (pipe_without_reader, "standard output was closed by the program that reads it"),
    "closed": (closed, "cannot write to standard output: I/O operation on closed file"),
    "ascii": (lambda: io.TextIOWrapper(io.BytesIO(), "ascii"), "standard output is ascii, which has no '.*=utf-8"),
}  # fmt: skip


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("command", RESULTS)
def test_standard_output_that_takes_nothing_is_one_sentence(
    here: Path, command: str, stream: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if stream == "ascii" and command != "plan":  # whose tables have borders
        pytest.skip("ascii alone is written")
    make, message = STREAMS[stream]
    monkeypatch.setattr("rlhf_ray.console._leave_standard_output", lambda: None)  # this is the output of all tests
    monkeypatch.setattr(
        logging.getLogger("rlhf_ray"), "handlers", []
    )  # one of an earlier test writes to a stream that is closed
    monkeypatch.setattr(sys, "stdout", make())
    try:
        code = main(RESULTS[command])
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}")
    told = capsys.readouterr().err
    assert code in (1, 2) and "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("rlhf-ray: ") and "output" in line]
    assert message.partition("'.*")[0] in line and message.rpartition(".*")[2] in line


def test_closed_standard_streams_are_told_or_made_good(here: Path) -> None:
    """In a process of its own: each file that was opened would take the number of the closed stream."""
    command = f"PYTHONPATH={ROOT} {sys.executable} -m rlhf_ray"
    script = f"""
    {command} status run >&- 2> told; echo $?
    {command} status run 2>&- <&- > printed; echo $?
    {command} status run 2> piped | true; echo ${{PIPESTATUS[0]}}
    """
    (here / "script").write_text(script)
    codes = os.popen("bash script").read().split()
    assert codes == ["2", "0", "2"]
    told = (here / "told").read_text()
    assert told.startswith("rlhf-ray: standard output is closed") and told.count("\n") == 1
    assert "last commit" in (here / "printed").read_text()
    assert (here / "piped").read_text().count("\n") == 1 and "Exception ignored" not in (here / "piped").read_text()


def test_a_table_needs_no_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", full())
    try:
        assert "figure" in table("title", ["figure"], [[1]])
    except OSError as error:
        pytest.fail(str(error))


def test_nothing_of_others_reaches_a_terminal_as_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clear = "\x1b[2J\x1b]0;title\x07"
    assert printable(f"a{clear}\tü\n\ud800") == "a\\x1b[2J\\x1b]0;title\\x07\tü\n\\ud800"
    (here / "run/config.yaml").write_text('kind: "\\e[2Jsft"\n')
    assert main(["status", "run"]) == 0
    assert main(["status", f"{clear}run"]) == 2
    captured = capsys.readouterr()
    assert "\\x1b[2Jsft" in captured.out and "\\x1b[2J" in captured.err
    assert "\x1b" not in captured.out + captured.err
