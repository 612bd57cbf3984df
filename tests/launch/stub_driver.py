"""A driver as the parent sees one: it notes how it was started and ends as the file ``script`` says, one line a start.

A line is a number (end with that code), ``kill`` (end as by SIGKILL), ``stop`` (stop as by SIGSTOP), ``begin`` before either
(leave a run directory behind), ``wait`` (wait for a signal and end with 75), or ``deaf`` (wait, and die of the signal).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import yaml

from rlhf_ray.processes import lifeline


def main() -> None:
    text = sys.stdin.read()
    with Path("starts").open("a") as starts:
        starts.write(f"{' '.join(sys.argv[1:]) or 'new'}\n")
    script = Path("script").read_text().splitlines()
    Path("script").write_text("\n".join(script[1:]))
    words = script[0].split()
    if words[0] == "begin":
        words.pop(0)
        run = Path("runs") / yaml.safe_load(text)["run"]["name"]
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(text)
    if words[0] == "wait":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: (Path("signal").write_text(str(number)), os._exit(75)))
    elif words[0] == "deaf":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    lifeline.connect()
    if words[0] in ("wait", "deaf"):
        Path("ready").touch()
        time.sleep(60)
    if words[0] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if words[0] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(words[0]))


main()
