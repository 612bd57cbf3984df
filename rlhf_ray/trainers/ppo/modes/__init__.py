"""How rollout and training of a PPO run follow each other in time (``rollout.mode``)."""

from rlhf_ray.trainers.ppo.modes.mode import Mode
from rlhf_ray.trainers.ppo.modes.one_step_off import OneStepOff
from rlhf_ray.trainers.ppo.modes.sync import Sync
from rlhf_ray.trainers.ppo.modes.windowed import Windowed

__all__ = ["Mode", "OneStepOff", "Sync", "Windowed"]
