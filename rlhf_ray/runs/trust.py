"""Whether a run directory may be obeyed: whoever can write to it decides what a resumed run does.

Invariant: a run whose config names code of the user's own, or whose checkpoints are read, is resumed only if nobody but this
user, root and those whom ``RLHF_RAY_TRUSTED_USERS`` names can have written the config and the checkpoints. Members of the
directory's group count as trusted where they may write.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from rlhf_ray import storage
from rlhf_ray.config.recipes import CONFIG_NAME
from rlhf_ray.errors import RequestError

TRUSTED_USERS = "RLHF_RAY_TRUSTED_USERS"
"""Names or numbers of users, with commas, whose run directories are obeyed too, such as that of a file server."""
OBEYED = (CONFIG_NAME, "inputs.json", "checkpoints")
"""What of a run decides what is run and loaded."""


def refuse_untrusted(run: str | Path) -> None:
    """Raise :class:`RequestError` if somebody else can have written what a resumed run obeys; a missing run passes."""
    run = Path(run)
    if not run.is_dir():
        return
    with storage.storage_errors(run, "read"):
        reachable = bool(os.stat(run).st_mode & stat.S_IXOTH)
        trusted = {os.geteuid(), 0, *_trusted_by_name()}
        for path in (run, *_obeyed(run)):
            found = os.stat(path)
            if found.st_uid not in trusted:
                raise RequestError(_of_another(run, path, found.st_uid))
            if found.st_mode & stat.S_IWOTH and (path == run or reachable):
                raise RequestError(
                    f"{path} can be written by every user of this machine, and a resumed run does what stands in it: look "
                    f"whether it is still what you left there, then close it with `chmod -R o-w {run}`"
                )


def _obeyed(run: Path) -> Iterator[Path]:
    for name in OBEYED:
        path = run / name
        if path.exists():
            yield path
        if path.is_dir():
            for folder, folders, files in os.walk(path):
                yield from (Path(folder, entry) for entry in (*folders, *files))


def _of_another(run: Path, path: Path, owner: int) -> str:
    """What is said of a ``path`` that belongs to another user."""
    me, other = _name(os.geteuid()), _name(owner)
    return (
        f"{path} belongs to {other}, not to {me}, and a resumed run does what stands in it: resume it as {other}, take it over "
        f"with `chown -R {me} {run}` if you trust what is there, or name {other} in {TRUSTED_USERS}"
    )


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:  # a user of another machine, or of outside of a container
        return str(user)


def _trusted_by_name() -> Iterator[int]:
    for word in filter(None, map(str.strip, os.environ.get(TRUSTED_USERS, "").split(","))):
        if word.isdecimal():
            yield int(word)
            continue
        try:
            yield pwd.getpwnam(word).pw_uid
        except KeyError:
            raise RequestError(
                f"{TRUSTED_USERS}: there is no user {word!r} here: give the number of the user"
            ) from None
