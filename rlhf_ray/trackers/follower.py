"""The process that has the trackers of a run fed, each by a process of its own, which it starts again when it fails.

Invariants: one tracker that fails, hangs or ends its process costs the others nothing, and the run nothing at all: what trains
waits for no tracker. Nothing is given up while the run is on; once it is over, each tracker has a few tries left, and a limit.
What a tracker lacks then is said, with the command that sends it.
"""

from __future__ import annotations

import argparse
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rlhf_ray import environment
from rlhf_ray.config.shown import without_secrets
from rlhf_ray.config.trackers import Target, target
from rlhf_ray.console import get_logger, printable
from rlhf_ray.errors import EXIT_DONE, EXIT_FAILED, RlhfRayError
from rlhf_ray.processes.child import Ended
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trackers.feeding import CALL_S, EXIT_ERROR, EXIT_REFUSED, OPEN_S
from rlhf_ray.trackers.state import StateFile, follower_log

LOOK_S = 0.5
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 300.0
"""Before a tracker that failed is tried again."""
LAST_TRIES = 3
"""How often in a row, without a step sent in between, a tracker may fail once the run is over."""
PATIENCE_S = 2 * CALL_S
"""How long a tracker may be sent no step once the run is over."""
LOG_BYTES = 1 << 20


class Fed:
    """One tracker of a run, and the process that feeds it."""

    def __init__(self, run: RunDirectory, wanted: Target, options: Sequence[str], *, patient: bool) -> None:
        self.file = StateFile(run.path, wanted)
        self.done = False
        self.lacks = ""
        """Why it lacks steps at the end; empty where it has all that there are."""
        self._run, self._options, self._patient = run, options, patient
        self._process: subprocess.Popen[bytes] | None = None
        self._over = False
        self._failures = 0
        """In a row, without progress in between."""
        self._next_try = 0.0
        self._mark = self._mark_at_start = self._state_mark()
        self._sent = self._sent_most = self.file.sent()
        self._log_from = 0
        self._progressed_at = 0.0

    def look(self, over: bool) -> None:
        """See to the process; ``over`` says that the run is."""
        now = time.monotonic()
        if over and not self._over:
            self._over, self._failures, self._next_try, self._progressed_at = True, 0, now, now
        if self._process is None:
            if now >= self._next_try:
                self._start(now)
            return
        if over and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
            self._process.stdin = None
        code = self._process.poll()
        self._note_progress(now)
        if code is None:
            if over and now - self._progressed_at > PATIENCE_S:
                self.stop()
            return
        self._process = None
        if code == EXIT_DONE:
            self.done = True
        else:
            self._failed(self._cause(code), refused=code == EXIT_REFUSED, now=now)

    def stop(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()

    def _state_mark(self) -> int:
        try:
            return os.stat(self.file.path).st_mtime_ns
        except OSError:
            return 0

    def _note_progress(self, now: float) -> None:
        """Progress is a step that was sent: a tracker that opens, and then fails, makes none however often it is tried."""
        mark = self._state_mark()
        if mark == self._mark:
            return
        sent, before = self.file.sent(), self._sent
        self._mark, self._sent = mark, sent
        if _is_further(sent, before):
            self._progressed_at = now
        # One that forgets what it was sent, and is sent the same again, is alive, but does not work.
        most = self._sent_most
        if not _is_further(sent, most):
            return
        self._sent_most = most | {key: step for key, step in sent.items() if step > most.get(key, -1)}
        if self._failures and not self.file.error():
            self._failures = 0
            if self._patient and not self._over:
                get_logger("trackers").info("the tracker %s works again", self.file.target)

    def _start(self, now: float) -> None:
        command = [sys.executable, "-m", "rlhf_ray.trackers.feeding", str(self._run.path), str(self.file.target)]
        log = self.file.log_path
        self._progressed_at, self._mark_at_start = now, self._state_mark()
        try:
            log.parent.mkdir(exist_ok=True)
            with open(log, "ab") as output:
                if output.tell() > LOG_BYTES:
                    output.truncate(0)
                self._log_from = output.seek(0, os.SEEK_END)
                self._process = subprocess.Popen(
                    [*command, *self._options],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=variables(self.file.target),
                )
        except OSError as error:
            self._failed(str(error), refused=False, now=now)

    def _failed(self, cause: str, *, refused: bool, now: float) -> None:
        self._failures += 1
        if refused or ((self._over or not self._patient) and self._failures >= LAST_TRIES):
            self.done, self.lacks = True, cause
        self._next_try = now + min(FIRST_WAIT_S * 2.0 ** min(self._failures - 1, 20), LONGEST_WAIT_S)
        if self._failures == 1 and self._patient and not self._over:
            again = "" if self.done else ", and it is tried again"
            get_logger("trackers").warning(
                "the tracker %s failed: %s. The run goes on, metrics.jsonl has everything%s (log: %s)",
                self.file.target, printable(cause), again, self.file.log_path,
            )  # fmt: skip

    def _cause(self, code: int) -> str:
        """Why the process ended: what it said, or how it ended if it did not say anything."""
        if self._state_mark() != self._mark_at_start and (said := self.file.error()):
            return said
        try:
            with open(self.file.log_path, "rb") as log:
                log.seek(self._log_from)
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            lines = []
        if code == EXIT_FAILED and any(line.startswith("Timeout (") for line in lines):
            return f"a call of it did not return in time, for which it has {CALL_S:g} s, and {OPEN_S:g} s to begin"
        last = f" ({without_secrets(lines[-1].strip())})" if code == EXIT_ERROR and lines else ""
        return f"its process {Ended(code).how}{last}"


def _is_further(sent: Mapping[str, int], than: Mapping[str, int]) -> bool:
    """Whether a curve has a step that it had not."""
    return any(step > than.get(key, -1) for key, step in sent.items())


def variables(wanted: Target) -> dict[str, str]:
    """The environment of the process that feeds a tracker, which itself drops what the tracker's package must not see."""
    own = {
        **os.environ,
        **dict.fromkeys(environment.HUB_SWITCHES, "1"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "WANDB_ERROR_REPORTING": "false",  # else offline runs send figures about themselves, and wait for an answer
        "GIT_PYTHON_REFRESH": "quiet",
    }
    if wanted.name == "trackio" and wanted.place:
        own["TRACKIO_DIR"] = wanted.place
    limits = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",
        "WANDB_SILENT": "true",
    }
    return {**environment.for_process(), **limits, **own}


def follow(
    run: RunDirectory,
    targets: Sequence[Target],
    *,
    project: str,
    live: bool,
    over: Callable[[float], bool],
    patient: bool,
) -> dict[Target, str]:
    """Have ``targets`` fed until the run is over and they have everything; returns what lacks steps, and why.

    ``over(seconds)`` waits so long, and says whether the run is over. Without ``patience`` a tracker that keeps failing is
    given up although the run is on.
    """
    options = ["--project", project, *(["--live"] if live else [])]
    fed = [Fed(run, wanted, options, patient=patient) for wanted in targets]
    try:
        is_over = False
        while not all(one.done for one in fed):
            for one in fed:
                if not one.done:
                    one.look(is_over)
            is_over = over(LOOK_S) or is_over
    finally:
        for one in fed:
            one.stop()
    return {one.file.target: one.lacks for one in fed if one.lacks}


def say_what_lacks(run: RunDirectory, lacking: dict[Target, str]) -> None:
    """Log of each tracker that lacks steps why, and how it gets them."""
    for wanted, cause in lacking.items():
        get_logger("trackers").warning(
            "the tracker %s has not got everything: %s. To send the rest: rlhf-ray track %s --to %s",
            wanted, printable(cause), run.path, wanted,
        )  # fmt: skip


def until_input_ends(run: RunDirectory, on_end: Callable[[], None]) -> Callable[[float], bool]:
    """Says whether the driver has closed its side of standard input, or ended; ``on_end`` is called once, then."""
    ended = False

    def over(seconds: float) -> bool:
        nonlocal ended
        if ended:
            time.sleep(seconds)
        else:
            readable, _, _ = select.select([0], [], [], seconds)
            ended = bool(readable) or not run.is_owned()
            if ended:
                on_end()
        return ended

    return over


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow a run for its driver, whose end of standard input says when it is over; returns the exit code."""
    parser = argparse.ArgumentParser(prog="rlhf_ray.trackers.follower")
    parser.add_argument("run_directory")
    parser.add_argument("--to", action="append", required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument("--live", action="store_true")
    options = parser.parse_args(arguments)
    yield_to_others()
    try:
        run = RunDirectory(options.run_directory)
    except RlhfRayError as error:
        get_logger("trackers").error("no tracker is fed: %s", error)
        return EXIT_FAILED
    lacking = follow(
        run,
        [target(text) for text in options.to],
        project=options.project,
        live=options.live,
        over=until_input_ends(run, lambda: log_to(follower_log(run.path))),
        patient=True,
    )
    say_what_lacks(run, lacking)
    return EXIT_FAILED if lacking else EXIT_DONE


def yield_to_others() -> None:
    """Give this process and what it starts the processors that nobody else wants."""
    with suppress(OSError):
        os.nice(19)
    with suppress(OSError):  # where a session counts as one, that of the run counts more
        Path("/proc/self/autogroup").write_text("19")


def log_to(path: Path) -> None:
    """Write to ``path`` from here on: whoever reads the output of the run waits for its end."""
    with suppress(OSError), open(path, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


if __name__ == "__main__":
    sys.exit(main())
