"""The command ``rlhf-ray``, with one module for each of its subcommands.

Invariants: ``--help`` loads nothing of a subcommand but its arguments. A user's mistake ends in one message and exit code
2, a cluster that is too small in 3, a run that can be resumed in 75. Whatever the system says of a path or a stream that the
user named is such a message too. Only a real failure shows a stack trace. Signals are handled before anything else is imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from rlhf_ray import __version__
from rlhf_ray.errors import Interrupted, RlhfRayError, StorageError
from rlhf_ray.processes.interrupts import interruptible

COMMANDS = (
    "train",
    "check",
    "plan",
    "submit",
    "resume",
    "status",
    "report",
    "compare",
    "samples",
    "track",
    "trace",
    "serve",
    "generate",
    "rescore",
    "score",
    "evaluate",
    "export",
    "doctor",
    "demo",
)

OF_RUNS = ("resume", "status", "report", "compare", "samples", "track", "trace")
"""Those of them that are about a run directory."""

OF_SAMPLING = ("generate", "rescore")
"""Those about answers that are sampled apart from training."""

EPILOG = (
    "exit codes: 0 done; 2 the request is wrong; 3 the cluster cannot hold it; 75 stopped but resumable; 1 failed; "
    "128+N stopped by signal N"
)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="rlhf-ray",
        description="Reinforcement learning from human feedback as a service on a Ray cluster.",
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"rlhf-ray {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(module_of(name)).add_arguments(commands)
    return top


def module_of(command: str) -> str:
    """The module of a command."""
    wing = "runs." if command in OF_RUNS else "sampling." if command in OF_SAMPLING else ""
    return f"rlhf_ray.cli.{wing}{command}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; ``key=value`` counts wherever it stands, even after an option, where argparse does not read it.

    A flag of OpenRLHF, with the words after it as its values, becomes an override too, where it is answered with our key.
    """
    top = parser()
    options, left = top.parse_known_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    words = _with_values(left) if "overrides" in options else left
    unknown = [word for word in words if "overrides" not in options or not _is_override(word)]
    if unknown:
        top.error(f"unrecognized arguments: {' '.join(unknown)}")
    if words:
        has_flag = any(word.startswith("-") for word in words)  # then a single word that argparse took is a value of it
        options.overrides = [*(word for word in options.overrides if "=" in word or not has_flag), *words]
    return options


def _is_override(word: str) -> bool:
    from rlhf_ray.config.openrlhf.answers import is_flag

    return is_flag(word.partition("=")[0]) if word.startswith("-") else "=" in word


def _with_values(words: Sequence[str]) -> list[str]:
    """The words of a command line, each flag of OpenRLHF joined with its values: ``--flag a b`` becomes ``--flag=a b``."""
    from rlhf_ray.config.openrlhf.answers import is_flag

    joined: list[str] = []
    takes_values = False
    for word in words:
        is_option = word.startswith("--")
        if takes_values and not is_option and "=" not in word:
            joined[-1] += f"{' ' if '=' in joined[-1] else '='}{word}"
            continue
        takes_values = is_option and is_flag(word.partition("=")[0])
        joined.append(word)
    return joined


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _occupy_closed_streams()
    try:
        with interruptible():
            code = _run(parse(arguments))
    except Interrupted as error:
        _show(error)
        code = error.exit_code
    from rlhf_ray import environment
    from rlhf_ray.processes import lifeline

    if environment.SAYS_EXIT_CODE in os.environ and not lifeline.is_child():
        sys.stderr.write(f"{environment.EXIT_CODE_LINE}{code}\n")
    return code


def _run(options: argparse.Namespace) -> int:
    from rlhf_ray import environment
    from rlhf_ray.processes import lifeline

    hub = "source" in options and environment.is_hub_id(options.source)
    environment.prepare(environment.for_process(hub=hub) | environment.RAY_WHEN_ASKED)
    lifeline.connect()
    try:
        return int(options.run(options))
    except RlhfRayError as error:
        if not error.is_told:
            _show(error)
        return error.exit_code
    except OSError as error:
        about_path = path_error(error)
        if about_path is None:
            raise
        _show(about_path)
        return about_path.exit_code


def _occupy_closed_streams() -> None:
    """Open the null device in the place of standard streams that are closed: the next file would take their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    sys.stdout = sys.stdout or open(os.devnull)  # noqa: SIM115 (for reading: a result is not lost without a word)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def path_error(error: OSError) -> StorageError | None:
    """A sentence about the path that the system refused; none where it names no path, so that the error is one of ours."""
    from rlhf_ray.storage.failures import translate

    if not isinstance(error.filename, str | bytes):
        return None
    place = os.fsdecode(error.filename)
    is_there = os.path.lexists(place)
    folder, wanted = os.path.dirname(place) or ".", os.R_OK if is_there else os.R_OK | os.X_OK
    reads = not os.access(place if is_there else folder, wanted, effective_ids=True)
    return translate(error, place, "read" if reads else "write")


def _show(error: BaseException) -> None:
    from rlhf_ray.console import printable

    sys.stderr.write(f"rlhf-ray: {printable(str(error))}\n")


if __name__ == "__main__":
    sys.exit(main())
