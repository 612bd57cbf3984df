"""The arithmetic of batches: how many updates follow from the few sizes that a config sets.

Invariant: the counts are those a run makes; what depends on lengths that are not known yet is a bound and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import floor
from typing import Any

from rlhf_ray.config.facts import Role, Size


def updates(items: int, items_per_update: int) -> int:
    """Optimizer steps that go once through ``items``; the last may be smaller."""
    return -(-items // items_per_update)


def training_items(rows: int, epochs: float) -> int:
    """Demonstrations or pairs that ``epochs`` over ``rows`` train on."""
    return floor(rows * epochs + 1e-9)  # in floating point 0.29 * 100 is below 29


def epochs_done(state: Mapping[str, Any]) -> float:
    """The epochs behind the driver's state in a checkpoint of a job that goes through its rows."""
    epoch = sum(int(per_epoch) for _, per_epoch in state["order"]["parts"])
    return int(state["progress"]["examples"]) / epoch


def epoch_sizes(items: str, per_update: int, rows: int | None, epochs: float) -> Iterator[Size]:
    """The sizes of a job that goes through its rows ``epochs`` times; ``items`` is the plural of what a row makes."""
    yield Size(f"{items} per update", str(per_update), "batch")
    if rows is not None:
        total = training_items(rows, epochs)
        yield Size(f"{items} in all", str(total), f"at most {rows} rows x {epochs:g} epochs")
        yield Size("updates in all", str(updates(total, per_update)), f"{items} in all / {items} per update")


def role_sizes(name: str, role: Role, items: str) -> Iterator[Size]:
    """What an update brings to each rank of a trained role."""
    if role.work is None:
        return
    ranks, per_update = role.config.ranks, role.work.items().value
    share = -(-per_update // ranks)
    budget = role.config.training_tokens(role.work.budget())
    most = -(-share // max(1, budget // role.work.longest().value))
    yield Size(
        f"{name}: {items} per rank and update",
        shares(per_update, ranks),
        f"{ranks} {'rank' if ranks == 1 else 'ranks'}",
    )
    yield Size(
        f"{name}: micro-batches per rank and update",
        f"at most {most}",
        f"if all {items} were the longest, with {budget} tokens per micro-batch",
    )


def shares(count: int, parts: int) -> str:
    """How many of ``count`` items each of ``parts`` gets, as text: one number, or the smallest and the largest."""
    low, high = count // parts, -(-count // parts)
    return str(low) if low == high else f"{low} to {high}"
