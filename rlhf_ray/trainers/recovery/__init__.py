"""How a training run survives the loss of groups of ranks while its driver and the other groups go on."""

from rlhf_ray.trainers.recovery.decision import Plan, decide, loads_again
from rlhf_ray.trainers.recovery.recovery import Recoverable, Recovery
from rlhf_ray.trainers.recovery.starting import Starting

__all__ = ["Plan", "Recoverable", "Recovery", "Starting", "decide", "loads_again"]
