"""The sizes that follow from the few that are set: steps, updates, sequences a rank, micro-batches.

Always true: the counts are those a run makes; what depends on lengths that are not known yet is a bound and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor

from rlhf_ray.config.schema import (
    JobConfig,
    PpoConfig,
    RewardModelConfig,
    RoleConfig,
    ServeConfig,
    SftConfig,
    TokenBudget,
)
from rlhf_ray.console import table


def updates(items: int, items_per_update: int) -> int:
    """Optimizer steps that go once through ``items``; the last may be smaller."""
    return -(-items // items_per_update)


def updates_per_step(config: PpoConfig) -> int:
    """Optimizer steps of the policy (and of the critic) in one PPO step."""
    return config.batch.passes_per_step * updates(config.batch.sequences_per_step, config.batch.sequences_per_update)


def training_items(rows: int, epochs: float) -> int:
    """Demonstrations or pairs that ``epochs`` over ``rows`` train on."""
    return floor(rows * epochs + 1e-9)


@dataclass(frozen=True)
class Line:
    """One size: what it is, its value, and what it follows from."""

    what: str
    value: str
    follows: str = ""


def batch_table(config: JobConfig, rows: int | None = None) -> str:
    """The batch arithmetic of a job as text; ``rows`` is the number of training rows where it is known."""
    return table(
        "sizes", ("what", "size", "from"), [(line.what, line.value, line.follows) for line in lines(config, rows)]
    )


def lines(config: JobConfig, rows: int | None = None) -> list[Line]:
    """The batch arithmetic of a job, line by line."""
    if isinstance(config, PpoConfig):
        return list(_ppo(config))
    if isinstance(config, ServeConfig):
        return [
            Line("tokens a batch", str(config.max_batch_tokens), "max_batch_tokens"),
            Line("items that may wait", str(config.max_queue_items), "max_queue_items"),
        ]
    return list(_epochs(config, rows if rows is not None else _world_rows(config)))


def _ppo(config: PpoConfig) -> Iterator[Line]:
    batch = config.batch
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    yield Line(
        "sequences a step",
        str(batch.sequences_per_step),
        f"{batch.prompts_per_step} prompts x {batch.samples_per_prompt} samples of each",
    )
    yield Line(
        "updates a step",
        str(updates_per_step(config)),
        f"{batch.passes_per_step} passes over updates of {batch.sequences_per_update} sequences",
    )
    yield Line("updates in all", str(config.steps * updates_per_step(config)), f"{config.steps} steps")
    yield Line("prompts in all", str(config.steps * batch.prompts_per_step), f"{config.steps} steps")
    yield Line(
        "prompts an engine and step",
        _share(batch.prompts_per_step, config.rollout.engines),
        f"{config.rollout.engines} engines",
    )
    yield Line("longest sequence", f"{longest} tokens", "max_prompt_tokens + max_new_tokens")
    for name, role in (("policy", config.policy), ("critic", config.critic)):
        if role is not None:
            yield from _trained(name, role, batch, batch.sequences_per_update, longest, "sequences")


def _epochs(config: SftConfig | RewardModelConfig, rows: int | None) -> Iterator[Line]:
    if isinstance(config, SftConfig):
        name, role, each, what, longest = "policy", config.policy, config.batch.sequences_per_update, "sequences", 1
    else:
        name, role, each, what, longest = "reward", config.reward, config.batch.pairs_per_update, "pairs", 2
    longest *= config.data.max_tokens
    yield Line(f"{what} an update", str(each), "batch")
    if rows is not None:
        items = training_items(rows, config.epochs)
        yield Line(f"{what} in all", str(items), f"at most {rows} rows x {config.epochs:g} epochs")
        yield Line("updates in all", str(updates(items, each)), f"{what} in all / {what} an update")
    yield Line(f"longest of the {what}", f"{longest} tokens", "data.max_tokens" + (" x 2" if what == "pairs" else ""))
    yield from _trained(name, role, config.batch, each, longest, what)


def _trained(name: str, role: RoleConfig, batch: TokenBudget, each: int, longest: int, what: str) -> Iterator[Line]:
    ranks = "rank" if role.ranks == 1 else "ranks"
    share = -(-each // role.ranks)
    budget = role.training_tokens(batch)
    most = -(-share // max(1, budget // longest))
    yield Line(f"{name}: {what} a rank and update", _share(each, role.ranks), f"{role.ranks} {ranks}")
    yield Line(
        f"{name}: micro-batches a rank and update",
        f"at most {most}",
        f"were all {what} the longest, {budget} tokens a micro-batch",
    )


def _share(count: int, parts: int) -> str:
    low, high = count // parts, -(-count // parts)
    return str(low) if low == high else f"{low} to {high}"


def _world_rows(config: SftConfig | RewardModelConfig) -> int | None:
    world = config.data.world
    if world is None:
        return None
    return world.demonstrations if isinstance(config, SftConfig) else world.pairs
