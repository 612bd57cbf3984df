"""Every kind of job by its name. A new kind is a module of its own and one line here.

Invariant: classes are named as text and imported on demand, so that a command line can list the kinds at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

from rlhf_ray.imports import import_object

if TYPE_CHECKING:
    from rlhf_ray.config.jobs.base import Job


class JobKind(NamedTuple):
    """Where the class of a kind stands, and whether ``rlhf-ray train`` runs it."""

    path: str
    """``module:class``."""
    trains: bool = True


KINDS: dict[str, JobKind] = {
    "sft": JobKind("rlhf_ray.config.jobs.sft:SftConfig"),
    "rm": JobKind("rlhf_ray.config.jobs.reward_model:RewardModelConfig"),
    "distill": JobKind("rlhf_ray.config.jobs.distill:DistillConfig"),
    "dpo": JobKind("rlhf_ray.config.jobs.dpo:DpoConfig"),
    "ppo": JobKind("rlhf_ray.config.jobs.ppo:PpoConfig"),
    "generate": JobKind("rlhf_ray.config.jobs.generate:GenerateConfig", trains=False),
    "serve": JobKind("rlhf_ray.config.jobs.serve:ServeConfig", trains=False),
}


def trained_kinds() -> tuple[str, ...]:
    """The kinds that ``rlhf-ray train`` runs."""
    return tuple(name for name, kind in KINDS.items() if kind.trains)


def job_class(kind: str) -> type[Job]:
    """The class of a kind of job."""
    return cast("type[Job]", import_object(KINDS[kind].path))


def job_classes() -> dict[str, type[Job]]:
    """The class of every kind of job."""
    return {kind: job_class(kind) for kind in KINDS}
