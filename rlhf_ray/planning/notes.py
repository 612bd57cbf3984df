"""What the comment of a recipe says about memory and time: one function writes it, and a test holds the recipes against it.

Invariant: every figure is computed from shapes and from the recipe's own values; none is written by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rlhf_ray.config.jobs.base import Job
from rlhf_ray.planning.job_memory import GB, Files, RoleMemory, gpu_needed, job_memory, weights_here
from rlhf_ray.planning.memory import Where, peak
from rlhf_ray.planning.object_store import store_bytes
from rlhf_ray.planning.step_time import step_seconds

TITLE = "# Computed from shapes, has not run on a GPU. GB of a rank at its peak:"
SMALL = 0.05 * GB
WIDTH = 128


def recipe_note(config: Job, files: Files = weights_here) -> list[str]:
    """Lines of the comment: memory of every role by part, what a GPU and the hosts must have, and the time of a step."""
    memory, store = job_memory(config, files), store_bytes(config, files)
    lines = [TITLE]
    for one in memory:
        lines += _role_lines(one)
    hosts = sum(one.ranks * one.host for one in memory)
    samples = config.sampling() is not None
    needs = f"#   every GPU needs {gpu_needed(memory) / GB:.0f}; the hosts of all ranks {hosts / GB:.0f}"
    if samples and store is not None:
        needs += f"; Ray's object store, on the nodes of policy and engines, {store / GB:.1f}"
    times = step_seconds(config, files)
    kind, all_of_it = "a step" if samples else "an update", f"{sum(times.values()):.1f}"
    if len(times) > 1:
        all_of_it += " = " + " + ".join(f"{name} {seconds:.1f}" for name, seconds in times.items())
    return [*lines, needs, f"# Seconds of {kind} at the rates of an H100: {all_of_it}"]


def _role_lines(one: RoleMemory) -> Iterator[str]:
    ranks = f"{one.ranks} {'rank' if one.ranks == 1 else 'ranks'}"
    yield from _wrapped(f"#   {one.role} ({ranks}), GPU {one.gpu / GB:.1f} =", _sums(one, "GPU"))
    host = _sums(one, "host")
    if len(host) > 1:
        yield from _wrapped(f"#     host {one.host / GB:.1f} =", host)


def _sums(one: RoleMemory, where: Where) -> list[str]:
    """The parts of a peak, largest first."""
    parts = sorted(peak(one.parts, where)[1], key=lambda part: part.what)
    sums = [(what, sum(part.bytes for part in same)) for what, same in groupby(parts, key=lambda part: part.what)]
    return [f"{what} {count / GB:.1f}" for what, count in sorted(sums, key=lambda one: -one[1]) if count >= SMALL]


def _wrapped(start: str, sums: list[str]) -> Iterator[str]:
    line = f"{start} {sums[0]}"
    for term in sums[1:]:
        if len(line) + len(term) + 3 > WIDTH:
            yield f"{line} +"
            line = f"#       {term}"
        else:
            line += f" + {term}"
    yield line
