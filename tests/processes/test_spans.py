"""What has ended stands in the file before the work goes on, and what cannot be written stops nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from rlhf_ray.processes import parts, spans

KILLED = """
import os, signal, sys
from pathlib import Path
from rlhf_ray.processes import spans
with spans.recording(Path(sys.argv[1])):
    with spans.span("ended"):
        pass
    with spans.span("open"):
        with spans.waiting(name="nothing"):
            os.kill(os.getpid(), signal.SIGKILL)
"""


def lines_of(directory: Path, lane: str = "driver") -> list[dict[str, Any]]:
    (path,) = [path for path in directory.iterdir() if path.name.startswith(lane.replace("/", "-"))]
    return [json.loads(line) for line in path.read_text().splitlines()]


def ended(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The spans that have ended, by their names."""
    begun = {line["id"]: line for line in lines if "begin" in line}
    whole = {line["id"]: begun[line["id"]] | line for line in lines if "end" in line and line["id"] in begun}
    return {span["name"]: span for span in whole.values()}


def test_a_process_that_is_killed_loses_nothing_that_had_ended(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    lines = lines_of(tmp_path)
    assert "ended" in ended(lines)
    left = {line["name"] for line in lines if "begin" in line} - ended(lines).keys()
    assert left == {"run", "start", "open"}, "and it is known in what it was killed"


def test_a_disk_that_is_full_stops_nothing_and_is_said_once(tmp_path: Path, project_log, monkeypatch) -> None:
    with spans.recording(tmp_path):
        monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        for _ in range(3):
            with spans.span("update"):
                pass
        monkeypatch.undo()
    assert project_log.getvalue().count("No space left on device") == 1 and "6 lines" in project_log.getvalue()
    assert "run" in ended(lines_of(tmp_path))


def test_a_directory_that_cannot_be_made_stops_nothing(tmp_path: Path, project_log) -> None:
    (tmp_path / "file").write_text("")
    with spans.recording(tmp_path / "file" / "spans"), spans.span("update"):
        assert spans.recorder() is None and spans.sending("policy", "apply") is None
    assert "the run goes on without it" in project_log.getvalue()


def test_without_a_recorder_nothing_is_written(tmp_path: Path) -> None:
    sent = spans.sending("policy", "apply")
    with spans.span("update"), spans.waiting(sent, name="x"):
        spans.end_step(1, 0.0, 1.0)
        spans.started()
    assert sent is None and spans.carried(sent) == {} and list(tmp_path.iterdir()) == []


def test_a_rank_answers_in_the_span_that_the_call_was_sent_in(tmp_path: Path) -> None:
    """The context that a call carries is all that its answer needs: which call, when it was sent, in what."""
    with spans.recording(tmp_path), spans.span("update"):
        sent = spans.sending("policy", "accumulate")
        assert sent is not None
        thread = threading.Thread(target=in_another_process, args=(sent.context,))
        thread.start()
        with spans.waiting(sent, for_all=True):
            thread.join()
    driver, rank = ended(lines_of(tmp_path)), ended(lines_of(tmp_path, "policy/1"))
    answer = rank["accumulate"]
    assert (answer["call"], answer["sent"], answer["parent"]) == (sent.call, sent.context.sent, driver["update"]["id"])
    wait = driver["policy.accumulate"]
    assert wait["answered"] == [sent.call] and answer["begin"] <= answer["end"] <= wait["end"]
    assert rank["take_sent"]["parent"] == answer["id"] and "sent" not in rank["take_sent"], "no time of another clock"
    (header,) = [line for line in lines_of(tmp_path, "policy/1") if "boot" in line]
    assert header["driver"] == next(path.stem for path in tmp_path.iterdir() if path.name.startswith("driver"))


def in_another_process(context: spans.Context) -> None:
    """As in the process of a rank, where no driver records."""
    drivers, spans._of_process[:] = list(spans._of_process), []
    try:
        with spans.answering(context, 1, "accumulate"):
            inner = spans.sending("rollout", "take_sent")
            assert inner is not None and inner.context.sent is None
            with spans.answering(inner.context._replace(role="policy"), 1, "take_sent"):
                pass
    finally:
        spans._of_process[:] = drivers


def test_a_loop_that_polls_is_one_wait_and_a_pause_ends_it(tmp_path: Path) -> None:
    with spans.recording(tmp_path):
        sent = [spans.sending("rollout", "generate") for _ in range(2)]
        for _ in range(20):
            for call in sent:
                with spans.waiting(call):
                    pass
        time.sleep(0.02)
        with spans.waiting(sent[0]):
            pass
    waits = [line for line in lines_of(tmp_path) if line.get("kind") == "wait"]
    assert [len(wait["calls"]) for wait in waits] == [2, 1]


def test_a_wait_without_end_is_written_in_parts(tmp_path: Path) -> None:
    with spans.recording(tmp_path):
        for _ in range(3 * spans.MOST_CALLS):
            with spans.waiting(spans.sending("rollout", "advance")):
                pass
    waits = [line for line in lines_of(tmp_path) if line.get("kind") == "wait"]
    assert len(waits) >= 3 and max(len(wait["calls"]) for wait in waits) <= spans.MOST_CALLS


def test_the_oldest_files_go_when_a_process_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "KEPT_BYTES", 1000)
    for number in range(5):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("x" * 400)
        os.utime(path, (number, number))
    with spans.recording(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir() if path.stem.isdigit()) == ["3.jsonl", "4.jsonl"]


def test_what_is_written_for_open_telemetry_is_its_protocol(tmp_path: Path) -> None:
    """Each line is read by OpenTelemetry's own classes, and says the same as the span."""
    before = time.time_ns()
    with spans.recording(tmp_path / "spans", tmp_path / "otlp"), spans.span("update"):
        with pytest.raises(ValueError, match="a secret"), spans.span("inner"):
            raise ValueError("a secret")
        first = spans.recorder().trace
        spans.end_step(7, time.monotonic() - 1, time.monotonic())
        with spans.span("after"):
            pass
    (path,) = (tmp_path / "otlp").iterdir()
    text = path.read_text()
    found = {}
    for line in text.splitlines():
        (resource,) = json_format.Parse(line, ExportTraceServiceRequest()).resource_spans
        (span,) = resource.scope_spans[0].spans
        found[span.name] = span
        about = {one.key: one.value.string_value or one.value.int_value for one in resource.resource.attributes}
        assert (
            about["service.name"] == "rlhf-ray"
            and about["rlhf_ray.lane"] == "driver"
            and about["process.pid"] == os.getpid()
        )
    ids = {
        name: json.loads(line)["id"]
        for name, line in ((one["name"], json.dumps(one)) for one in lines_of(tmp_path / "spans") if "name" in one)
    }
    # JSON of the protocol has ids in hexadecimal digits, which the classes read as base64: compare the text.
    assert all(f'"spanId":"{ids[name]}"' in text for name in ("update", "inner", "after", "step"))
    assert f'"parentSpanId":"{ids["update"]}"' in text and "a secret" not in text
    assert before < found["inner"].start_time_unix_nano < found["inner"].end_time_unix_nano < time.time_ns() + 10**6
    assert found["inner"].status.code == 2 and found["after"].status.code == 0
    assert text.count(f'"traceId":"{first}"') >= 2 and f'"traceId":"{first}"' not in next(
        line for line in text.splitlines() if '"name":"after"' in line
    )


def test_the_seeds_of_a_run_draw_the_same_with_spans(tmp_path: Path) -> None:
    import random

    random.seed(3)
    alone = random.random()
    random.seed(3)
    with spans.recording(tmp_path), spans.span("update"):
        assert random.random() == alone


def test_the_last_wait_of_every_thread_is_written_when_the_process_stops_to_record(tmp_path: Path) -> None:
    recorder, done = spans.Recorder(tmp_path, "driver"), threading.Event()
    ready = threading.Barrier(4)

    def work(name: str, still: bool) -> None:
        with recorder.waiting([], name):
            if still:
                ready.wait(60)
                done.wait(60)
        if not still:
            ready.wait(60)
            done.wait(60)  # so that none of the others has the number of this thread

    names = ("one", "two", "three")
    threads = [threading.Thread(target=work, args=(name, name == "three"), name=f"thread {name}") for name in names]
    for thread in threads:
        thread.start()
    ready.wait(60)
    recorder.close()
    waits = {line["name"]: line.get("thread") for line in lines_of(tmp_path) if line.get("kind") == "wait"}
    done.set()
    for thread in threads:
        thread.join()
    assert waits == {"one": "thread one", "two": "thread two"}, "and one that goes on has no end that could be written"


def test_a_line_of_which_a_part_alone_could_be_written_leaves_nothing_of_itself(
    tmp_path: Path, project_log, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    with spans.recording(tmp_path):
        monkeypatch.setattr(os, "write", lambda file, text: write(file, text[: len(text) // 2]))
        with spans.span("lost"):
            pass
        monkeypatch.undo()
        with spans.span("update"):
            pass
    lines = lines_of(tmp_path)  # each of them is JSON
    assert {"update", "run"} <= ended(lines).keys() and "lost" not in {line.get("name") for line in lines}
    assert "2 lines" in project_log.getvalue() and "bytes were written" in project_log.getvalue()


def test_a_lane_has_one_recorder_whichever_threads_of_its_process_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, count = [], 8
    all_ask = threading.Barrier(count)

    class Slow(spans.Recorder):
        def __init__(self, *words: Any, **more: Any) -> None:
            time.sleep(0.05)  # so that the others ask meanwhile whether there is one
            super().__init__(*words, **more)
            made.append(self)

    def answer() -> None:
        all_ask.wait(60)
        with spans.answering(context, 0, "health"):
            pass

    context = spans.Context(str(tmp_path), "", "driver", "policy", "", "", "c", None, True)
    monkeypatch.setattr(spans, "Recorder", Slow)
    threads = [threading.Thread(target=answer) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert [line["name"] for line in lines_of(tmp_path, "policy/0") if "name" in line] == ["health"] * count


@pytest.mark.parametrize("possible", [True, False], ids=["recorded", "not recorded"])
def test_an_error_of_the_file_system_in_what_is_recorded_is_raised_as_it_is(
    possible: bool, tmp_path: Path, project_log
) -> None:
    directory, error = tmp_path / "file" / "spans", OSError(28, "No space left on device")
    (tmp_path / "file").mkdir() if possible else (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught, spans.recording(directory):
        raise error
    assert caught.value is error and error.__context__ is None
    assert "No space left" not in project_log.getvalue()


def test_a_part_that_follows_another_begins_with_what_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
    recorder = spans.Recorder(tmp_path, "driver")
    run = recorder.begin("run", "run")
    for _ in range(100):
        with recorder.span("call", "phase"):
            pass
    header, first, *others = lines_of(tmp_path, recorder.name + ".jsonl.older")
    assert (first["name"], first["id"]) == ("run", run) and first["begin"] < header["since"]
    later, again, *_ = [json.loads(line) for line in recorder.path.read_text().splitlines()]
    assert again == first and later["since"] > header["since"]
    assert {**later, "since": 0} == {**header, "since": 0}, "a part is read without those before"
    assert all("since" not in line for line in others)
