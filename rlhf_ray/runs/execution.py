"""How a run's processes compute log-probs, kept in its directory and compared when it goes on.

Invariant: a run goes on after a checkpoint only if what must be equal over time still is (:mod:`rlhf_ray.rollout.execution`);
what may differ is said once. The file holds the records of the last attempt that started.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rlhf_ray import storage
from rlhf_ray.console import get_logger
from rlhf_ray.errors import IntegrityError, RequestError
from rlhf_ray.rollout.execution import Execution, differences
from rlhf_ray.storage.reading import read_bytes

FORMAT = 1
Records = Mapping[str, Execution]
"""By role: that of rank 0 of the policy, and that of the first rollout engine."""


def keep_execution(path: Path, now: Records, *, goes_on: bool) -> None:
    """Write ``now`` to the file ``path`` of a run directory.

    Of a run that ``goes_on`` it is compared with what lies there first: raises :class:`RequestError` with every field that must
    be equal and is not.
    """
    known = read_execution(path) if goes_on and path.exists() else {}
    broken: list[str] = []
    for role, record in now.items():
        if role in known:
            sides = {"here": f"{role} now", "there": "this run before"}
            refused, noted = differences(record, known[role], "over_time", **sides)
            broken += refused
            for text in noted:
                get_logger("runs").warning("%s", text)
    if broken:
        raise RequestError(f"{path.parent} cannot go on, its log-probs would be others: {'; '.join(broken)}")
    records = {role: record.to_json() for role, record in now.items()}
    storage.write_file(path, json.dumps({"format": FORMAT, "records": records}, indent=1) + "\n")


def read_execution(path: Path) -> Records:
    """What :func:`keep_execution` wrote."""
    raw = read_bytes(path)
    try:
        return {str(role): Execution.from_json(record) for role, record in json.loads(raw)["records"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is damaged ({type(error).__name__}): restore it from a backup, or remove it to go on without knowing "
            "whether log-probs are computed as before"
        ) from error
