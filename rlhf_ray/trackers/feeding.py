"""The process that feeds one tracker from the record of a run.

Invariants: rows are sent in order and each once, also after a kill at any moment: what was sent is what the tracker has. A call
of a tracker that takes too long ends this process. It ends by itself once nobody works on the run and all is sent. No secret
of the environment is sent, or written by what is written here.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlhf_ray.config.reading import read_mapping
from rlhf_ray.config.shown import shown_config, without_secrets
from rlhf_ray.config.trackers import missing, target
from rlhf_ray.errors import RequestError, RlhfRayError, StorageError
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trackers.base import Curve, Tracker
from rlhf_ray.trackers.making import make_tracker
from rlhf_ray.trackers.rows import Record, Row, sendable
from rlhf_ray.trackers.state import State, StateFile

POLL_S = 2.0
READING_SHARE = 0.05
"""Of the time, for reading the record again and again."""
OPEN_S, CALL_S = 600.0, 120.0
"""How long a tracker may take to open a curve, and to do anything else."""
ROWS_HELD, HELD_S = 100, 2.0
"""After so many rows, or so much time, they are flushed and counted as sent."""
BUSY_S = 10.0
"""How long to wait for another process that feeds the tracker, such as that of the attempt before."""
EXIT_REFUSED, EXIT_ERROR = 2, 3
SECRET_OF_HUBS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")
"""wandb and trackio send these to the Hugging Face Hub when they start, and wait for its answer."""


class Feeder:
    """Sends what is on record of a run to one tracker, whose ``state`` it keeps.

    ``over(seconds)`` waits so long at most, and says whether nobody works on the run any more. ``variables`` are those of the
    environment whose secrets are not sent.
    """

    def __init__(
        self,
        run: RunDirectory,
        tracker: Tracker,
        file: StateFile,
        state: State,
        *,
        project: str,
        live: bool,
        over: Callable[[float], bool],
        variables: Mapping[str, str] = os.environ,
    ) -> None:
        self._run, self._tracker, self._file, self._state = run, tracker, file, state
        self._project, self._live, self._over, self._variables = project, live, over, variables
        self._open = ""
        """The curve that the tracker has open."""

    def work(self) -> None:
        """Send everything that may be sent until the run is over."""
        seen, pause = None, 0.0
        while True:
            over, marks = self._over(pause), _marks(self._run)
            pause = POLL_S
            if over or marks != seen:
                began = time.monotonic()
                self._send(read_record(self._run, over=over), over)
                seen, pause = marks, max(POLL_S, (time.monotonic() - began) / READING_SHARE)
            if over:
                break
        self._close(finished=self._run.is_finished)

    def _send(self, record: Record, over: bool) -> None:
        curves = sendable(record, live=self._live, over=over)
        for key, rows in curves.items():
            is_last = key == list(curves)[-1]
            if key != self._open and (is_last or any(row.step > self._state.sent.get(key, -1) for row in rows)):
                self._go_on(key)
            self._log(key, [row for row in rows if row.step > self._state.sent.get(key, -1)])

    def _go_on(self, key: str) -> None:
        """Open a curve, so that a wrong setting is told before there is anything to send."""
        self._close(finished=True)
        config = shown_config(read_mapping(self._run.config_text()).values, self._variables)
        curve = Curve(self._state.run, self._state.id, key, self._project, self._run.path.absolute(), config)
        with _deadline(OPEN_S):
            self._state.sent[key] = self._tracker.open(curve)
        self._open = key
        self._keep()

    def _log(self, key: str, rows: Sequence[Row]) -> None:
        held, since = 0, time.monotonic()
        for row in rows:
            with _deadline(CALL_S):
                self._tracker.log(row)
            held += 1
            if row is rows[-1] or held >= ROWS_HELD or time.monotonic() - since >= HELD_S:
                with _deadline(CALL_S):
                    self._tracker.flush()
                self._state.sent[key] = row.step
                self._keep()
                held, since = 0, time.monotonic()

    def _close(self, *, finished: bool) -> None:
        if self._open:
            with _deadline(CALL_S):
                self._tracker.close(finished=finished)
            self._open = ""

    def _keep(self) -> None:
        self._state.error = ""
        self._file.write(self._state)


def read_record(run: RunDirectory, *, over: bool) -> Record:
    """What the files of a run say now. Commits come first: a line that is on record after them may be undone."""
    committed, finished = max(run.checkpoints.steps(), default=-1), run.is_finished
    trained = run.final_step() if over else None
    starts = [line["timestamp"] for line in run.attempts.read()]
    void = run.void_metrics.read()
    return Record(run.metrics.read(), void, starts, committed, trained, finished)


def _marks(run: RunDirectory) -> list[Any]:
    """What changes when there may be more to send."""
    paths = (run.metrics.path, run.attempts.path, run.summary_path, run.checkpoints.directory)
    return [_mark(path) for path in paths]


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer, whatever it is doing; a thread that needs no interpreter sees to it."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def ends_with_input(run: RunDirectory, line: int = 0) -> Callable[[float], bool]:
    """Says whether a run is over: nobody owns it, or the other side of the pipe ``line`` is closed."""

    def over(seconds: float) -> bool:
        readable, _, _ = select.select([line], [], [], seconds)
        return bool(readable) or not run.is_owned()

    return over


def main(arguments: Sequence[str] | None = None) -> int:
    """Feed one tracker; standard input is a pipe that is closed when the run is over. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="rlhf_ray.trackers.feeding")
    parser.add_argument("run_directory")
    parser.add_argument("tracker")
    parser.add_argument("--project", required=True)
    parser.add_argument("--live", action="store_true")
    options = parser.parse_args(arguments)
    wanted = target(options.tracker)
    variables = dict(os.environ)
    for name in SECRET_OF_HUBS:  # before anything imports the tracker's package
        os.environ.pop(name, None)
    try:
        run = RunDirectory(options.run_directory)
    except RlhfRayError as error:
        sys.stderr.write(f"{without_secrets(str(error), variables)}\n")
        return EXIT_ERROR
    file = StateFile(run.path, wanted)
    over = ends_with_input(run)
    busy_until = time.monotonic() + BUSY_S
    while not file.own():
        if time.monotonic() > busy_until:
            sys.stderr.write(f"{wanted} is being fed by {file.owner()}\n")
            return EXIT_ERROR
        time.sleep(0.2)
    state = State("", "")
    try:
        state = file.begin(_name(run))
        if lacks := missing(wanted):
            raise RequestError(lacks)
        tracker = make_tracker(wanted)
        Feeder(
            run, tracker, file, state, project=options.project, live=options.live, over=over, variables=variables
        ).work()
    except (Exception, SystemExit) as error:
        sys.stderr.write(without_secrets(traceback.format_exc(), variables))
        is_ours = isinstance(error, RlhfRayError)
        state.error = without_secrets(str(error) if is_ours else _last_line(error), variables)
        if state.run:
            with suppress(RlhfRayError):  # the same disk may be full
                file.write(state)
        is_refused = isinstance(error, RequestError) and not isinstance(error, StorageError)
        return EXIT_REFUSED if is_refused else EXIT_ERROR
    return 0


def _name(run: RunDirectory) -> str:
    """The name of a run, by which a copy of its directory is told from it."""
    values = read_mapping(run.config_text()).values.get("run")
    name = values.get("name") if isinstance(values, dict) else None
    return name if isinstance(name, str) else run.path.absolute().name


def _last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what libraries do at the end of a process may wait for ever, and they have closed what they had
