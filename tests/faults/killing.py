"""Starting a run and killing one of its processes at a chosen moment.

Always true: only processes that descend from the run's own parent are killed; a run that outlasts its deadline ends with
all of its processes, and is said to hang.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil

Victim = Literal["driver", "actor", "parent"]
VICTIMS: tuple[Victim, ...] = ("driver", "actor", "parent")
DRIVER = "rlhf_ray.launch.driver"
ACTOR, IDLE = "ray::", "ray::IDLE"
LOOK_EVERY_S = 0.02


class HangError(Exception):
    """A run did not end by its deadline."""


class StartedRun:
    """One ``rlhf-ray`` command under way; what it says goes to the end of ``log``."""

    def __init__(self, command: Sequence[str], log: Path, deadline_s: float) -> None:
        self.began = time.monotonic()
        self.deadline = self.began + deadline_s
        with log.open("ab") as stream:
            self._popen = subprocess.Popen(command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL)
        self.parent = psutil.Process(self._popen.pid)
        self._driver: psutil.Process | None = None

    def __enter__(self) -> StartedRun:
        return self

    def __exit__(self, *error: object) -> None:
        """A campaign that is stopped takes its run along."""
        if error[0] is not None and not isinstance(error[1], HangError):
            self._end()

    def wait(self) -> int:
        """The exit code, once the driver too has ended: it may outlive a parent that was killed."""
        try:
            code = self._popen.wait(timeout=max(0.0, self.deadline - time.monotonic()))
            while self._driver is not None and not _has_ended(self._driver):
                if time.monotonic() > self.deadline:
                    raise subprocess.TimeoutExpired(self._popen.args, self.deadline - self.began)
                time.sleep(LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            self._end()
            raise HangError(f"no end within {self.deadline - self.began:.0f} s") from None
        return code

    def kill(self, victim: Victim, after_s: float, rng: random.Random) -> str | None:
        """SIGKILL to the victim as soon as it is there and ``after_s`` have passed; what it was, None if the run ended.

        Of the actors that are there then, ``rng`` draws one.
        """
        while self._popen.poll() is None:
            if time.monotonic() > self.deadline:
                self._end()
                raise HangError(f"no {victim} to kill within {self.deadline - self.began:.0f} s")
            target = self._find(victim, rng) if time.monotonic() - self.began >= after_s else None
            if target is not None:
                title = _process_title(target)
                if title is not None:
                    target.kill()
                    return title
            time.sleep(LOOK_EVERY_S)
        return None

    def _find(self, victim: Victim, rng: random.Random) -> psutil.Process | None:
        driver = self._find_driver()
        if victim == "parent":
            return self.parent
        if victim == "driver" or driver is None:
            return driver
        actors = [process for process in _descendants(driver) if _is_actor(process)]
        return rng.choice(sorted(actors, key=lambda process: process.pid)) if actors else None

    def _find_driver(self) -> psutil.Process | None:
        drivers = [child for child in _descendants(self.parent, deep=False) if DRIVER in (_process_title(child) or "")]
        self._driver = drivers[0] if drivers else self._driver
        return self._driver

    def _end(self) -> None:
        """Kill the run's own processes, the driver first: its parent must not restart it."""
        driver = self._driver
        below = _descendants(self.parent) + ([*_descendants(driver), driver] if driver is not None else [])
        for process in {*below, self.parent}:
            if process.is_running():
                process.kill()
        self._popen.wait()


def _descendants(process: psutil.Process, *, deep: bool = True) -> list[psutil.Process]:
    try:
        return process.children(recursive=deep)
    except psutil.NoSuchProcess:
        return []


def _has_ended(process: psutil.Process) -> bool:
    """An orphan stays a zombie where nobody asks for its end."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _process_title(process: psutil.Process) -> str | None:
    """The command line of a process, None of one that has ended."""
    try:
        return " ".join(process.cmdline()) or None
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None


def _is_actor(process: psutil.Process) -> bool:
    title = _process_title(process) or ""
    return title.startswith(ACTOR) and not title.startswith(IDLE)
