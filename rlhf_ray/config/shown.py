"""The config of a run as others are shown it, trackers and readers of a report: plain, and without secrets.

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


def without_secrets_in(config: Mapping[str, Any], variables: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """``config`` with all that is withheld replaced; ``variables`` are those of the environment."""
    shown: dict[str, Any] = _shown(config, _secrets(variables), free=False)
    return shown


def shown_config(config: Mapping[str, Any], variables: Mapping[str, str] = os.environ) -> dict[str, Scalar]:
    """What is shown of the values of ``config``, by dotted keys; lists are numbered from 0."""
    return flat(without_secrets_in(config, variables))


def shown_value(key: str, value: Any, variables: Mapping[str, str] = os.environ) -> Any:
    """What is shown of the value of one dotted key."""
    names = key.split(".")
    for name in reversed(names):
        value = {name: value}
    value = without_secrets_in(value, variables)
    for name in names:
        if value == WITHHELD:  # as a whole, with a key above this one
            break
        value = value[name]
    return value


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config by dotted keys; lists are numbered from 0."""
    return dict(_flat(config, ""))


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


def _shown(value: Any, secrets: Sequence[str], *, free: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            str(name): WITHHELD if inner is not None and _SECRET.search(str(name).lower().replace("-", "_"))
            else _shown(inner, secrets, free=free or name in FREE)
            for name, inner in value.items()
        }  # fmt: skip
    if isinstance(value, list | tuple):
        return [_shown(inner, secrets, free=free) for inner in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if free or any(secret in str(value) for secret in secrets):
        return WITHHELD
    return _URL.sub(r"\g<scheme>\g<place>", str(value))


def _flat(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        entries = [(str(name), inner) for name, inner in value.items()]
    elif isinstance(value, list | tuple):
        entries = [(str(place), inner) for place, inner in enumerate(value)]
    else:
        yield at, value
        return
    for name, inner in entries:
        yield from _flat(inner, f"{at}.{name}" if at else name)
