"""The config of a run as trackers are given it: flat, plain, and without secrets.

Invariants: of values that no schema knows (``parameters`` and others of a user's own) no text is handed over, only numbers,
truth values and null. Nothing under a key whose name is that of a secret is handed over, no user, password, query or fragment
of a URL, and no text that holds a secret of the environment.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Scalar = str | int | float | bool | None
WITHHELD = "(withheld)"
FREE = frozenset({"parameters", "template_variables", "rename_columns", "labels"})
"""Sections whose keys no schema knows."""
_SECRET = re.compile(
    r"(^|_)(token_file|secrets?|passwords?|passwd|passphrase|credentials?|api_?keys?|access_?keys?|private_?keys?|auth"
    r"|authorization|bearer|cookies?)($|_)"
)
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|AUTH)(_|$)")
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:[^/?#\s@]*@)?(?P<place>[^?#\s]*)(?:[?#]\S*)?")
SHORTEST = 6
"""A shorter value of an environment variable says nothing: it would be found in half of all texts."""


def shown_config(config: Mapping[str, Any], variables: Mapping[str, str] = os.environ) -> dict[str, Scalar]:
    """The values of ``config`` by dotted keys; lists are numbered from 0. ``variables`` are those of the environment."""
    return dict(_flat(config, "", _secrets(variables), free=False))


def without_secrets(text: str, variables: Mapping[str, str] = os.environ) -> str:
    """``text`` without the secrets of the environment, and without what URLs in it hold beside their place."""
    for secret in _secrets(variables):
        text = text.replace(secret, WITHHELD)
    return _URL.sub(r"\g<scheme>\g<place>", text)


def _secrets(variables: Mapping[str, str]) -> list[str]:
    return [
        value
        for name, value in variables.items()
        if len(value) >= SHORTEST and _SECRET_VARIABLE.search(name.upper()) and not value.isdecimal()
    ]


def _flat(value: Any, at: str, secrets: Sequence[str], *, free: bool) -> Iterator[tuple[str, Scalar]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            key = f"{at}.{name}" if at else str(name)
            if inner is not None and _SECRET.search(str(name).lower().replace("-", "_")):
                yield key, WITHHELD
            else:
                yield from _flat(inner, key, secrets, free=free or name in FREE)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{at}.{number}", secrets, free=free)
    elif value is None or isinstance(value, bool | int):
        yield at, value
    elif isinstance(value, float):
        yield at, value if math.isfinite(value) else str(value)
    elif free or any(secret in str(value) for secret in secrets):
        yield at, WITHHELD
    else:
        yield at, _URL.sub(r"\g<scheme>\g<place>", str(value))
