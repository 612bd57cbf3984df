"""A run directory that somebody edited: ``status``, ``report`` and ``resume`` name the file and the line, and end at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.errors import IntegrityError
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.record import read_record
from rlhf_ray.storage.reading import read_bytes, read_text

DEEP = "[" * 6000 + "]" * 6000
STARTED = '"attempt": 1, "from_step": 0, "timestamp": 1e9'
METRICS = {
    '{"step": 1, "timestamp": NaN}': "NaN is no number in JSON",
    '{"step": 1, "timestamp": 1e999}': "timestamp is inf, not a time in seconds",
    '{"step": 1, "timestamp": 1e300}': "timestamp is 1e[+]300, not a time",
    '{"step": 1, "timestamp": "noon"}': "timestamp is 'noon', not a time",
    '{"step": 1}': "it has no timestamp",
    '{"timestamp": 1e9}': "it has no step",
    '{"step": "one", "timestamp": 1e9}': "step is 'one', not a whole number",
    '{"step": true, "timestamp": 1e9}': "step is True, not a whole number",
    '{"step": -1, "timestamp": 1e9}': "step is -1, not a whole number",
    '{"step": 1, "timestamp": 1e9, "loss/sft": "low"}': "loss/sft is 'low', not a number",
    '{"step": 1, "timestamp": 1e9, "loss/sft": {"a": 1}}': "loss/sft is .*, not a number",
    '{"step": 1, "timestamp": 1e9, "loss/sft": ' + "9" * 400 + "}": "loss/sft is 9+ ..., not a number",
    '{"step": 1, "timestamp": 1e9, "\\u001b[2J": "x"}': r"\\x1b\[2J is 'x', not a number",
    '{"step": 1, "timestamp": 1e9, "loss/sft": ' + DEEP + "}": "nested too deep",
    '{"step": 1, "timestamp": ' + "9" * 6000 + "}": "Exceeds the limit",
    "[1]": "list, not an object",
    "one": "Expecting value",
    "\udcff": "can't decode byte 0xff",
}
ATTEMPTS = {
    '{"attempt": 1, "from_step": 0}': "it has no timestamp",
    '{"attempt": null, "from_step": 0, "timestamp": 1e9}': "attempt is None, not a whole number",
    '{"attempt": 1, "from_step": 0, "timestamp": -1e30}': "timestamp is -1e[+]30, not a time",
    "{" + STARTED + ', "changes": 5}': "changes is 5, not a list of key, from and to",
    "{" + STARTED + ', "changes": [{"key": "steps", "from": 1}]}': "changes is .*, not a list",
    "{" + STARTED + ', "accepted": ["data.path"]}': "accepted is .*, not a list",
    '{"a": ' + DEEP + "}": "nested too deep",
}
LEDGER = {
    '{"step": 1, "attempt": 1}': "it has no prompt_ids",
    '{"step": 1, "attempt": 1, "prompt_ids": "abc"}': "prompt_ids is 'abc', not a list of whole numbers",
    '{"step": "1", "attempt": 1, "prompt_ids": [1]}': "step is '1', not a whole number",
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "run", "kind: sft\nrun: {name: run}\n")
    made.metrics.append({"step": 1, "timestamp": 1e9, "loss/sft": 0.5})
    made.release()
    return made


def told(capsys: pytest.CaptureFixture[str], command: str, run: RunDirectory) -> str:
    """The one line of a command that ends with 1 or 2."""
    assert main([command, str(run.path)]) in (1, 2)
    message = capsys.readouterr().err
    assert "Traceback" not in message and len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("command", ["status", "report"])
@pytest.mark.parametrize(
    ("name", "line"),
    [("metrics.jsonl", line) for line in METRICS] + [("attempts.jsonl", line) for line in ATTEMPTS],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_a_line_that_nobody_can_read_is_named_with_what_is_wrong(run, capsys, command, name, line):
    good = (run.path / name).read_bytes()
    (run.path / name).write_bytes(good + line.encode(errors="surrogateescape") + b"\n")
    message = told(capsys, command, run)
    assert f"{name}:2 is damaged (" in message and message.rstrip().endswith("remove the line to continue")
    with pytest.raises(IntegrityError, match={**METRICS, **ATTEMPTS}[line]):
        RunDirectory(run.path).metrics.read()
    (run.path / name).write_bytes(good)
    assert main([command, str(run.path)]) == 0, "the way out is one"


@pytest.mark.parametrize("line", LEDGER)
def test_so_is_a_line_of_the_ledger(run, line):
    (run.path / "ledger.jsonl").write_text(f"{line}\n")
    with pytest.raises(IntegrityError, match=rf"ledger\.jsonl:1 is damaged \({LEDGER[line]}"):
        RunDirectory.open(run.path).ledger.entries()


def test_a_line_that_a_later_version_wrote_with_more_in_it_is_read(run):
    run.metrics.append({"step": 2, "timestamp": 1e9, "a/new/metric": None, "another": 3})
    assert [line["step"] for line in RunDirectory.open(run.path).metrics.read()] == [1, 2]


REPLACED: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "directory": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", REPLACED)
@pytest.mark.parametrize("name", ["metrics.jsonl", "attempts.jsonl", "summary.json", "closing.json"])
def test_what_is_no_file_is_neither_waited_for_nor_read(run, capsys, name, kind):
    (run.path / name).unlink(missing_ok=True)
    REPLACED[kind](run.path / name)
    message = told(capsys, "report", run)
    assert f"{name} is not a regular file: move away what is there" in message
    with pytest.raises(IntegrityError, match="not a regular file"):
        run.metrics.append({}) if name == "metrics.jsonl" else read_bytes(run.path / name)


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_what_is_not_utf_8_is_said(run, capsys, name):
    (run.path / name).write_bytes(b"kind: \xff")
    assert f"{name} is damaged: byte 7 is not UTF-8" in told(capsys, "report", run)
    with pytest.raises(IntegrityError, match="byte 7"):
        read_text(run.path / name)


@pytest.mark.parametrize("text", ["", "- a\n", "5", "kind: [1]\n", "a: ["])
def test_a_config_that_is_none_has_a_status_and_is_not_resumed(run, capsys, text):
    run.config_path.write_text(text)
    assert main(["status", str(run.path)]) == 0 and main(["report", str(run.path)]) == 0
    capsys.readouterr()
    assert main(["resume", str(run.path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "[]", "5", '{"inputs": 5}', '{"inputs": ' + DEEP + "}", '{"inputs": {"data.path": {"files": 3}}}']
)
def test_fingerprints_that_were_edited_are_refused_with_the_way_out(tmp_path, text):
    (tmp_path / "inputs.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"inputs\.json is damaged"):
        read_record(tmp_path / "inputs.json")


DRIVER = '{"lane": "driver", "driver": "driver", "boot": "a", "clock": 0, "wall": 0, "born": 0}'
RANK = DRIVER.replace('{"lane": "driver"', '{"lane": "policy/²"')
STEP = '{"id": "s", "name": "step", "kind": "step", "step": 1, "begin": 5, "end": %s}'
CALL = '{"id": "c", "name": "apply", "kind": "call", "begin": %s, "end": 8}'


@pytest.mark.parametrize(
    ("driver", "rank", "said"),
    [  # what a report once failed of
        (STEP % 9, CALL % 6, "<b>policy/²</b>"),
        (STEP % 9, CALL % "1e999", "1 damaged lines of the spans were left out"),
        (STEP % 5, CALL % 5, "The slowest recorded step, 1, took 0 s."),
        (STEP % ("9" * 400), CALL % 6, None),
    ],
    ids=["a rank that is no number", "a time without end", "a step without time", "a time that no float holds"],
)
def test_spans_that_make_no_sense_cost_a_report_no_more_than_their_section(run, project_log, driver, rank, said):
    run.spans.mkdir()
    (run.spans / "driver.jsonl").write_text(f"{DRIVER}\n{driver}\n")
    (run.spans / "rank.jsonl").write_text(f"{RANK}\n{rank}\n")
    assert main(["report", str(run.path)]) == 0
    page, log = run.report_path.read_text(), project_log.getvalue()
    if said is not None:
        assert said in page and "cannot be read" not in log
    else:
        assert (
            "Why a step was slow" not in page and f"{run.spans} cannot be read, so the report does not say why" in log
        )
        assert "OverflowError" in log
