"""How a training run survives the loss of groups of ranks while its driver and the other groups go on."""

from rlhf_ray.trainers.recovery.decision import Plan, decide
from rlhf_ray.trainers.recovery.recovery import Recoverable, Recovery

__all__ = ["Plan", "Recoverable", "Recovery", "decide"]
