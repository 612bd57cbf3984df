#!/usr/bin/env bash
# rich 15.0.0: a log line that nobody can read any more ends the program, and turns its standard output off as well.
#
# The standard library's StreamHandler carries on when the reader of its stream has gone: a lost log line is no reason to
# stop. RichHandler is meant as its replacement, but a Console answers a broken pipe with SystemExit(1), also when the
# Console writes to standard error or to a pipe of its own. SystemExit is no Exception, so neither the handler nor a caller's
# "except Exception" stops it. Before it leaves, the Console points the standard output at the null device, although that one
# was sound: a program that catches SystemExit goes on, and what it prints is gone. The way out is a subclass of Console with
# an on_broken_pipe of its own.
#
# Seen on 2026-11-30 (the last lines of the output; each list is what reached the standard output):
#   StreamHandler: ['begun', 'done'], status 0
#   RichHandler: ['begun'], status 1
#   RichHandler on standard error: ['begun'], status 1
#   RichHandler, except Exception: ['begun'], status 1
#   RichHandler, except SystemExit: ['begun'], status 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check rich==15.0.0
cat > "$folder/try.py" <<'PY'
import os
import subprocess
import sys
from importlib.metadata import version

HEAD = """
import logging
import os

from rich.console import Console
from rich.logging import RichHandler

reader, writer = os.pipe()
os.close(reader)
log = logging.getLogger("run")
logging.raiseExceptions = False
"""
PLAIN = 'log.addHandler(logging.StreamHandler(open(writer, "w", buffering=1)))'
RICH = 'log.addHandler(RichHandler(console=Console(file=open(writer, "w", buffering=1))))'
STANDARD_ERROR = "os.dup2(writer, 2)\nlog.addHandler(RichHandler(console=Console(stderr=True)))"
BODY = """
print("begun", flush=True)
{line}
print("done", flush=True)
os._exit(0)
"""
BARE = 'log.warning("one line")'
GUARDED = "try:\n    {line}\nexcept {error}:\n    print('caught', flush=True)"


def seen(handler: str, line: str) -> str:
    """What reaches the standard output of a program that logs one line, and the status that the program ends with."""
    program = HEAD + handler + BODY.format(line=line)
    ran = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    return f"{ran.stdout.split()}, status {ran.returncode}"


cases = {
    "StreamHandler": seen(PLAIN, BARE),
    "RichHandler": seen(RICH, BARE),
    "RichHandler on standard error": seen(STANDARD_ERROR, BARE),
    "RichHandler, except Exception": seen(RICH, GUARDED.format(line=BARE, error="Exception")),
    "RichHandler, except SystemExit": seen(RICH, GUARDED.format(line=BARE, error="SystemExit")),
}
expected = {
    "StreamHandler": "['begun', 'done'], status 0",
    "RichHandler": "['begun'], status 1",
    "RichHandler on standard error": "['begun'], status 1",
    "RichHandler, except Exception": "['begun'], status 1",
    "RichHandler, except SystemExit": "['begun'], status 0",
}
print("rich", version("rich"))
for name, found in cases.items():
    print(f"{name}: {found}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
"$folder/venv/bin/python" "$folder/try.py"
