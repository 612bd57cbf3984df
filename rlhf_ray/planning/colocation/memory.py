"""The memory of GPUs on which all roles take turns, phase by phase.

Invariants: what counts in a phase is what ``colocation/phases.py`` lets be there, and beside it what cannot leave: the CUDA
context of every process, and the shards of a frozen model at ZeRO-3. The GPU that is looked at holds a rank of every role, so
no other one holds more. Has not been measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from rlhf_ray.config.facts import Role
from rlhf_ray.config.jobs.base import Job
from rlhf_ray.console import table
from rlhf_ray.errors import CapacityError
from rlhf_ray.planning.colocation.phases import WANTED, Kind, Level, Phase
from rlhf_ray.planning.job_memory import GB, RoleMemory, require_memory
from rlhf_ray.planning.memory import UPDATE, Part

STAYS = "CUDA context"
STATES = ("optimizer", "gradients", "gradients of a sub-group", "bucket")
"""Parts of a role that trains which leave before it sends its weights."""
KINDS = {"policy": Kind.POLICY, "critic": Kind.CRITIC}


@dataclass(frozen=True)
class PhaseMemory:
    """What one GPU holds in a phase."""

    phase: Phase
    roles: tuple[tuple[str, float | None], ...]
    """Bytes of each role, None where its model is not known; of the engine that generates, what it needs at least."""
    utilization: float = 0.0
    """The share of the GPU that the engine takes instead, while it generates."""

    @property
    def least(self) -> float:
        """Bytes that a GPU must have, as far as they are known."""
        needed = sum(count or 0.0 for _, count in self.roles)
        if self.utilization:
            others = sum(count or 0.0 for role, count in self.roles if role != "rollout")
            engine = needed - others
            needed = max(engine / self.utilization, others / (1 - self.utilization) if self.utilization < 1 else needed)
        return needed


def phases_memory(config: Job, memory: Sequence[RoleMemory]) -> list[PhaseMemory]:
    """What a GPU holds in each phase of a step, as far as the sizes of its models are known."""
    roles, sampling = config.roles(), config.sampling()
    assert sampling is not None, "only a job that samples takes turns"
    here = [one for one in memory if one.share]
    return [
        PhaseMemory(
            phase,
            tuple((one.role, _held(one, roles.get(one.role), phase) if one.parts else None) for one in here),
            sampling.config.gpu_memory_utilization if phase is Phase.GENERATE else 0.0,
        )
        for phase in Phase
    ]


def _held(one: RoleMemory, role: Role | None, phase: Phase) -> float:
    """Bytes that a role holds of its GPU in a phase."""
    parts = [part for part in one.parts if part.where == "GPU"]
    kind = Kind.ENGINE if role is None else KINDS[one.role] if role.trained else Kind.FROZEN
    level, stays = WANTED[phase][kind], [part for part in parts if part.what == STAYS]
    if role is not None and not role.trained and role.config.engine.zero == 3:
        stays += [part for part in parts if part.what == "weights" and level is Level.AWAY]
    if level is Level.AWAY:
        return _sum(stays)
    if kind is Kind.ENGINE:
        return _sum(part for part in parts if level is Level.ALL or part.what in ("weights", STAYS))
    if level is Level.WEIGHTS:
        return _sum(part for part in parts if "publish" in part.phases and part.what not in STATES)
    names = ("score",) if phase is Phase.SCORE else UPDATE
    return max(_sum(part for part in parts if name in part.phases) for name in names)


def _on_host(one: RoleMemory, role: Role | None) -> float:
    """Bytes of the host that a role takes while it is away; a cache is thrown away."""
    parts = [part for part in one.parts if part.where == "GPU" and part.what not in (STAYS, "KV cache")]
    if role is None:
        return _sum(part for part in parts if part.what == "weights")
    if not role.trained and role.config.engine.zero == 3:
        return 0.0
    return _sum(part for part in parts if "rest" in part.phases)


def _sum(parts: Iterable[Part]) -> float:
    return sum(part.bytes for part in parts)


def colocated_gpu_needed(config: Job, memory: Sequence[RoleMemory]) -> float:
    """Bytes that every GPU of the job must have."""
    return max(one.least for one in phases_memory(config, memory))


def requirement(config: Job, memory: Sequence[RoleMemory]) -> Callable[[float], None]:
    """What raises :class:`CapacityError` where GPUs of so many bytes do not hold the job, by turns or by shares."""
    return partial(_require, config, memory) if config.cluster.colocate else partial(require_memory, list(memory))


def _require(config: Job, memory: Sequence[RoleMemory], gpu_bytes: float) -> None:
    short = [one for one in phases_memory(config, memory) if one.least > gpu_bytes]
    if short:
        raise CapacityError(f"the job does not fit: {'; '.join(_shortage(one, gpu_bytes) for one in short)}")


def _shortage(one: PhaseMemory, gpu_bytes: float) -> str:
    named = ", ".join(f"{role} {_gb(count)}" for role, count in one.roles)
    ways = {
        Phase.GENERATE: f"change rollout.gpu_memory_utilization, which is {one.utilization:g}",
        Phase.PUBLISH: "raise policy.ranks with policy.engine.zero 3",
    }.get(one.phase, "raise ranks with engine.zero 3, lower max_tokens_per_micro_batch")
    return (
        f"in the phase {one.phase.value} roles that take turns need a GPU of {one.least / GB:.1f} GB ({named}), but it has "
        f"{gpu_bytes / GB:.0f} GB: {ways}, take larger GPUs, or set cluster.colocate to false"
    )


def phases_table(config: Job, memory: Sequence[RoleMemory]) -> str:
    """What each role holds of a GPU in each phase of a step, in GB, and what a GPU must have; computed, not measured.

    The last line is what a rank takes of the host while it is away, besides what it takes there anyhow.
    """
    phases, roles = phases_memory(config, memory), config.roles()
    names = [role for role, _ in phases[0].roles]
    known = any(count is not None for _, count in phases[0].roles)
    rows = [
        (one.phase.value, *(_gb(count) for _, count in one.roles), _gb(one.least if known else None)) for one in phases
    ]
    away = [_on_host(one, roles.get(one.role)) if one.parts else None for one in memory if one.share]
    rows.append(("host, away", *map(_gb, away), ""))
    return table("one GPU by turns, GB", ("phase", *names, "GPU needed"), rows)


def _gb(count: float | None) -> str:
    return "not known yet" if count is None else f"{count / GB:.1f}"
