#!/usr/bin/env bash
# setproctitle 1.3.8 (Linux): a process that was started with an empty environment never gets a title.
#
# Programs name their processes with setproctitle, so that ps and top show which worker is which. On Linux the new title is
# written over the command line and the environment that the process was started with, and it is cut to that room, as the
# documentation says. So with a small environment one expects a short title. With none at all (env -i, subprocess with env={})
# there is no title: setproctitle, whatever is given to it, does nothing and raises nothing, ps shows the command line as
# before, and getproctitle returns an empty string instead of that command line. One variable is enough to have the whole
# room of the command line too; its value may be empty, but it must be there at the start: to set it in os.environ is too
# late. setthreadtitle in the main thread, which has no such need, names the process in top, in up to 15 characters.
#
# Seen on 2026-11-30 (the last lines of the output):
#   no variable: before '', after '', ps shows the old command line
#   one set after the start: before '', after '', ps shows the old command line
#   one, empty: before the command line, after a part of the title, ps shows a part of the title
#   one of 100 characters: before the command line, after the title, ps shows the title
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check setproctitle==1.3.8
cat > "$folder/named.py" <<'PY'
import json
import os
import sys

TITLE = "training of the policy, rank 3 of 8, on the fourth node of the second cluster"
if sys.argv[1:] == ["late"]:
    os.environ["NAME"] = "x" * 100

from setproctitle import getproctitle, setproctitle  # After the environment, so that it could find it.

with open("/proc/self/cmdline") as file:
    command = file.read().rstrip("\0").replace("\0", " ")


def which(text: str) -> str:
    if text in ("", TITLE, command):
        return {"": "''", TITLE: "the title", command: "the command line"}[text]
    return "a part of the title" if TITLE.startswith(text) else repr(text)


before = getproctitle()
setproctitle(TITLE)
with open("/proc/self/cmdline") as file:
    shown = file.read().rstrip("\0").replace("\0", " ")
shows = "the old command line" if shown == command else which(shown)
print(json.dumps(f"before {which(before)}, after {which(getproctitle())}, ps shows {shows}"))
PY
cat > "$folder/try.py" <<'PY'
import json
import subprocess
import sys
from importlib.metadata import version


def seen(environment: dict[str, str], *arguments: str) -> str:
    """What a program sees of its title that was started with ``environment`` and nothing else."""
    command = [sys.executable, sys.argv[1], *arguments]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


cases = {
    "no variable": seen({}),
    "one set after the start": seen({}, "late"),
    "one, empty": seen({"NAME": ""}),
    "one of 100 characters": seen({"NAME": "x" * 100}),
}
none = "before '', after '', ps shows the old command line"
expected = {
    "no variable": none,
    "one set after the start": none,
    "one, empty": "before the command line, after a part of the title, ps shows a part of the title",
    "one of 100 characters": "before the command line, after the title, ps shows the title",
}
print("setproctitle", version("setproctitle"))
for name, found in cases.items():
    print(f"{name}: {found}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder/named.py"
