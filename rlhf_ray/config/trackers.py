"""The trackers that metrics are sent to besides the run directory, as one text each: ``NAME`` or ``NAME:PLACE``.

Invariants: what is wrong with a text is one sentence with the way out. No place holds a password: it would stand in the config
of the run, in the list of processes and in every report.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rlhf_ray import environment

NAMES = ("tensorboard", "wandb", "mlflow", "trackio", "jsonl")
OFFLINE = "offline"
"""The place of wandb that sends nothing: files for ``wandb sync``."""
SQLITE = "sqlite:///"
DATABASE = ("sqlalchemy", "alembic")
"""What mlflow needs besides itself to write into a database."""


@dataclass(frozen=True)
class Target:
    """A tracker, and where it keeps what it is sent; an empty ``place`` is the one that it has by default."""

    name: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.place}" if self.place else self.name

    def with_absolute_place(self, directory: Path) -> Target:
        """The same, where a place that is a path is taken from ``directory``."""
        if self.name == "mlflow" and self.place.startswith(SQLITE):
            return Target(self.name, f"{SQLITE}{directory / self.place.removeprefix(SQLITE)}")
        if not self.place or self.name not in ("tensorboard", "trackio", "jsonl"):
            return self
        return Target(self.name, str(directory / environment.expand_home(self.place)))


def target(text: str) -> Target:
    """The tracker that ``text`` names, which has no :func:`problem`."""
    name, _, place = text.partition(":")
    return Target(name, place)


def problem(text: str) -> str:
    """What is wrong with a tracker, and what to write; empty if nothing is."""
    name, colon, place = text.partition(":")
    if name not in NAMES:
        close = difflib.get_close_matches(name.lower(), NAMES, n=1)
        return f"{text!r} is no tracker: {f'did you mean {close[0]}? ' if close else ''}trackers are {', '.join(NAMES)}"
    if colon and not place:
        return f"{text!r} names no place after the colon: write {name}, or {name}:{_EXAMPLES[name]}"
    if name == "jsonl" and not place:
        return (
            f"jsonl needs a file: write jsonl:{_EXAMPLES[name]} (metrics.jsonl in the run directory is always written)"
        )
    if name == "wandb" and place not in ("", OFFLINE):
        return (
            f"{text!r} has a place that is none: write wandb, or wandb:{OFFLINE}; WANDB_BASE_URL names another server"
        )
    return _uri_problem(place) if name == "mlflow" and place else ""


_EXAMPLES = {
    "tensorboard": "DIRECTORY",
    "wandb": OFFLINE,
    "mlflow": "http://HOST:5000",
    "trackio": "DIRECTORY",
    "jsonl": "FILE",
}


def _uri_problem(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        secret = parts.password is not None or (parts.scheme in ("http", "https") and parts.username is not None)
    except ValueError as error:
        return f"mlflow: its place is no URI ({error}): write mlflow:{_EXAMPLES['mlflow']}"
    if secret:
        return (
            "mlflow: a user or password in its URI would stand in every copy of the config: give them in the environment, as "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if not parts.scheme or parts.scheme == "file":
        path = parts.path or uri
        return f"mlflow:{uri}: mlflow keeps no runs in plain files any more: write mlflow:sqlite:///{path}"
    return ""


def missing(wanted: Target) -> str:
    """The command that installs what a tracker needs and this environment lacks; empty if nothing is missing."""
    packages: tuple[str, ...] = () if wanted.name == "jsonl" else (wanted.name,)
    if wanted.name == "mlflow" and not (wanted.place or os.environ.get("MLFLOW_TRACKING_URI", "")).startswith("http"):
        packages += DATABASE
    absent = [package for package in packages if not _is_installed(package)]
    are = "is" if len(absent) == 1 else "are"
    return f"{' and '.join(absent)} {are} not installed: pip install 'rlhf-ray[{wanted.name}]'" if absent else ""


def _is_installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None  # a folder of that name, such as wandb makes, is no package


def missing_packages(trackers: Sequence[str]) -> Iterator[tuple[str, str]]:
    """A problem for each tracker whose package is missing."""
    for text in trackers:
        if lacks := missing(target(text)):
            yield "monitoring.trackers", lacks


def key_of(wanted: Target) -> str:
    """Under which name a run keeps what it knows of a tracker; that of two places of one tracker differs."""
    if not wanted.place:
        return wanted.name
    # The letters are for people. The whole must fit into the name of a file.
    letters = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in wanted.place).strip("-")
    digest = hashlib.sha256(wanted.place.encode(errors="surrogatepass")).hexdigest()
    return "-".join(filter(None, (wanted.name, letters[-80:].strip("-"), digest[:12])))
