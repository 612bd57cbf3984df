"""The rollout engines of a run, used as one."""

from rlhf_ray.rollout.fleet.engines import EngineHandle, Engines
from rlhf_ray.rollout.fleet.fleet import Fleet
from rlhf_ray.rollout.fleet.shares import SetAside, cut_shares

__all__ = ["EngineHandle", "Engines", "Fleet", "SetAside", "cut_shares"]
