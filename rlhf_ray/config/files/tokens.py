"""Files of tokens: one a line, bare or as ``name:token``; ``#`` begins a comment.

Invariants: a line is read, or refused by its number; no message shows a token; a byte order mark and spaces around a name and
its token change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from rlhf_ray.errors import RequestError

SHORTEST_TOKEN = 16
VISIBLE = re.compile(r"[!-~]*")
"""What a header can carry as it is: visible ASCII."""
MAKE_ONE = "make one with: python -c 'import secrets; print(secrets.token_hex())'"

Keys = Mapping[str, str]
"""Names of keys, by their tokens."""


def parse_tokens(content: bytes) -> tuple[Keys, list[str]]:
    """The keys in the bytes of a file, in its order, and by its number what is wrong with each line that holds none."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return {}, ["it is not a text of UTF-8"]
    keys: dict[str, str] = {}
    problems: list[str] = []
    count = 0
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        count += 1
        name, _, token = (part.strip() for part in line.rpartition(":"))
        if not VISIBLE.fullmatch(token):
            problems.append(f"line {number}: token {count} holds a space or a letter that no header carries")
        elif len(token) < SHORTEST_TOKEN:
            problems.append(f"line {number}: token {count} is shorter than {SHORTEST_TOKEN} characters")
        else:
            keys[token] = name or f"key {count}"
    return keys, problems


def read_tokens(path: str | None) -> Keys:
    """The keys of a file; no path, no keys. Raises :class:`RequestError` for a file without a token, or with a bad line."""
    if path is None:
        return {}
    try:
        keys, problems = parse_tokens(Path(path).expanduser().read_bytes())
    except (OSError, RuntimeError) as error:  # the second: there is no such home directory
        raise RequestError(f"token_file {path} cannot be read ({error}): write one token a line into it") from error
    if problems or not keys:
        raise RequestError(f"token_file {path}: {problems[0] if problems else 'there is no token in it'}; {MAKE_ONE}")
    return keys
