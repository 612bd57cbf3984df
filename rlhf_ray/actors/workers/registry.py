"""Which class runs in the ranks of a group, by its name in a :class:`~rlhf_ray.actors.place.RankSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rlhf_ray.actors.workers.base import Worker
from rlhf_ray.actors.workers.critic import CriticWorker
from rlhf_ray.actors.workers.encoder import EncoderRewardWorker
from rlhf_ray.actors.workers.policy import PolicyWorker, ReferenceWorker
from rlhf_ray.actors.workers.reward import RewardWorker, VllmRewardWorker
from rlhf_ray.actors.workers.rollout import RolloutWorker
from rlhf_ray.actors.workers.trained_reward import TrainedRewardWorker

WorkerKind = Literal[
    "policy", "reference", "critic", "reward", "trained_reward", "vllm_reward", "encoder_reward", "rollout"
]

WORKERS: Mapping[WorkerKind, type[Worker]] = {
    "policy": PolicyWorker,
    "reference": ReferenceWorker,
    "critic": CriticWorker,
    "reward": RewardWorker,
    "trained_reward": TrainedRewardWorker,
    "vllm_reward": VllmRewardWorker,
    "encoder_reward": EncoderRewardWorker,
    "rollout": RolloutWorker,
}
