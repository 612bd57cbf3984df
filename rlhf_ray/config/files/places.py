"""Whether the other places that a config names can be used: the directory of its runs, files with tokens, keys of judges."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rlhf_ray.config.files.tokens import MAKE_ONE, VISIBLE, parse_tokens
from rlhf_ray.config.problems import Problem
from rlhf_ray.config.sections.rewards import JudgeConfig
from rlhf_ray.config.sections.run import RunConfig
from rlhf_ray.environment import expand_home


def root_problems(run: RunConfig) -> Iterator[Problem]:
    """Run directories can be made."""
    if Path(run.root).is_file():
        yield "run.root", f"{run.root} is a file, but runs are written under a directory: name another"
    path = Path(run.root).absolute()
    if marks := pattern_marks(path):
        yield (
            "run.root",
            f"{path} holds {marks}, which DeepSpeed takes for a pattern, so that no checkpoint could be read: name another",
        )


def pattern_marks(path: Path) -> str:
    """What makes a pattern of a folder's name where DeepSpeed reads a checkpoint, as words; empty where nothing does.

    DeepSpeed 0.19.8 looks for weights with ``glob``, so that it reads "run1" where it is asked for "run[1]".
    """
    return " and ".join(mark for mark in "*?[" if mark in str(path))


def token_problems(key: str, name: str | None) -> Iterator[Problem]:
    """The file of tokens at ``key`` is there, and each of its lines holds a token."""
    if name is None:
        return
    path = expand_home(name)
    try:
        if not path.is_file():
            yield key, f"{path} does not exist: write a token into it, readable for you alone"
            return
        keys, problems = parse_tokens(path.read_bytes())
    except OSError as error:
        yield key, f"{path} cannot be read ({error.strerror or error}): name a file with one token a line"
        return
    yield from ((key, f"{path}: {problem}; {MAKE_ONE}") for problem in problems)
    if not keys and not problems:
        yield key, f"{path} is empty: write a token into it"


def key_problems(key: str, judge: JudgeConfig, token_file: str | None) -> Iterator[Problem]:
    """The key of the judge at ``key`` is in its environment variable, where no file holds it, and can be sent."""
    name = judge.key_variable
    if token_file is not None or name is None:
        return
    found = os.environ.get(name, "").strip()
    if not VISIBLE.fullmatch(found):  # the value is not repeated: it would stand in logs
        yield f"{key}.key_variable", f"{name} holds a space or a letter that no header carries: set it to the key alone"
    if not found:
        yield (
            f"{key}.key_variable",
            f"{name} is not set where this runs, so the judge has no key: export it, name a file with the key in token_file "
            "beside judge, or set key_variable to null if the endpoint asks for none",
        )
