"""Have the trackers of a run fed while it trains, by a process that outlives it as long as it takes.

Invariants: nothing here raises, and what trains waits at its end for a small share of its time at most. The process holds
nothing that anybody waits for once the run is over.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from rlhf_ray import environment
from rlhf_ray.config.sections.run import MonitoringConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import EXIT_DONE, EXIT_FAILED
from rlhf_ray.processes.child import Ended
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trackers.state import follower_log

LONGEST_S, SHARE = 10.0, 0.003
"""How long a run waits at its end until its trackers have everything: at most so long, and this share of its time."""


class Followed:
    """The trackers of a run from here to :meth:`close`."""

    def __init__(self, run: RunDirectory, config: MonitoringConfig) -> None:
        self._run = run
        self._began = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        if not config.trackers:
            return
        names = [word for text in config.trackers for word in ("--to", text)]
        live = ["--live"] if config.track_live else []
        try:
            self._process = _start([str(run.path.absolute()), *names, "--project", config.project, *live])
        except OSError as error:
            get_logger("trackers").warning(
                "no tracker is fed, since no process could be started (%s): rlhf-ray track %s does it", error, run.path
            )

    def close(self) -> None:
        """Say that the run is over, and give the trackers a moment to get the rest."""
        process = self._process
        if process is None:
            return
        try:
            assert process.stdin is not None, "it is a pipe"
            process.stdin.close()
            code = process.wait(min(LONGEST_S, SHARE * (time.monotonic() - self._began)))
        except subprocess.TimeoutExpired:
            get_logger("trackers").info(
                "the trackers are sent the rest in the background; where that is cut short, this goes on with it: "
                "rlhf-ray track %s",
                self._run.path,
            )
        except OSError as error:
            get_logger("trackers").warning(
                "the trackers may lack the rest (%s): rlhf-ray track %s", error, self._run.path
            )
        else:
            if code != EXIT_DONE:
                self._say_how_it_ended(code)

    def _say_how_it_ended(self, code: int) -> None:
        log = follower_log(self._run.path)
        how = "ended before they had everything" if code == EXIT_FAILED else Ended(code).how
        get_logger("trackers").warning(
            "the process that feeds the trackers %s%s. To send what they lack: rlhf-ray track %s",
            how, f" (log: {log})" if log.exists() else "", self._run.path,
        )  # fmt: skip


def _start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the follower, in a session of its own: what ends that of the run leaves it to send the rest."""
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_ray.trackers.follower", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**environment.for_process(), **os.environ},
        start_new_session=True,
    )
