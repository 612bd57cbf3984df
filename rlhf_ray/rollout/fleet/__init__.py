"""The rollout engines of a run, used as one."""

from rlhf_ray.rollout.fleet.engines import EngineHandle, Engines
from rlhf_ray.rollout.fleet.fleet import Fleet
from rlhf_ray.rollout.fleet.pump import Pump
from rlhf_ray.rollout.fleet.shares import SetAside, cut_shares
from rlhf_ray.rollout.fleet.stream import Answered, Stream

__all__ = ["Answered", "EngineHandle", "Engines", "Fleet", "Pump", "SetAside", "Stream", "cut_shares"]
