#!/usr/bin/env bash
# tensorboard 2.21.0: after one write that failed, an EventFileWriter is over for good, also when there is space again.
#
# A thread of the writer does the writing. When one write fails (a full disk, a quota), the thread ends. From then on every
# call that adds or flushes raises the error of that moment, long after its cause has gone, and what is added is lost. A
# training loop that takes the error for a passing one and goes on gets it again at every step. close raises nothing. Only a
# new writer, with a file of its own, writes again. The full disk is a limit on the size of files here, which is lifted
# before the calls that are shown.
#
# Seen on 2026-11-30 (the last lines of the output):
#   add with space: OSError: [Errno 27] File too large
#   add again: OSError: [Errno 27] File too large
#   flush: OSError: [Errno 27] File too large
#   close: no error
#   steps in the file: [1]
#   steps of a new writer: [5]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check tensorboard==2.21.0
cat > "$folder/try.py" <<'PY'
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard import __version__
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter

failures = []
threading.excepthook = lambda failure: failures.append(failure.exc_value)


def attempt(call: Callable[[], None]) -> str:
    """What ``call`` raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def steps(folder: Path) -> list[int]:
    """The steps of the events in the files of ``folder``, without the first event, which names the format."""
    return [event.step for file in sorted(folder.iterdir()) for event in EventFileLoader(str(file)).Load() if event.step]


root = Path(sys.argv[1])
writer = EventFileWriter(str(root / "first"))
writer.add_event(Event(step=1))
writer.flush()
(file,) = (root / "first").iterdir()

soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, hard))
attempt(lambda: writer.add_event(Event(step=2)))
until = time.monotonic() + 60
while not failures and time.monotonic() < until:
    time.sleep(0.1)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

cases = {
    "add with space": attempt(lambda: writer.add_event(Event(step=3))),
    "add again": attempt(lambda: writer.add_event(Event(step=4))),
    "flush": attempt(writer.flush),
    "close": attempt(writer.close),
}
cases["steps in the file"] = str(steps(root / "first"))
other = EventFileWriter(str(root / "second"))
other.add_event(Event(step=5))
other.close()
cases["steps of a new writer"] = str(steps(root / "second"))
expected = {
    "add with space": "OSError: [Errno 27] File too large",
    "add again": "OSError: [Errno 27] File too large",
    "flush": "OSError: [Errno 27] File too large",
    "close": "no error",
    "steps in the file": "[1]",
    "steps of a new writer": "[5]",
}
print("tensorboard", __version__)
for name, found in cases.items():
    print(f"{name}: {found}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
