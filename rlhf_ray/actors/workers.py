"""Which class runs in the ranks of a group, by its name in a :class:`~rlhf_ray.actors.place.RankSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rlhf_ray.actors.critic_worker import CriticWorker
from rlhf_ray.actors.encoder_worker import EncoderRewardWorker
from rlhf_ray.actors.policy_worker import PolicyWorker, ReferenceWorker
from rlhf_ray.actors.reward_worker import RewardWorker, VllmRewardWorker
from rlhf_ray.actors.rollout_worker import RolloutWorker
from rlhf_ray.actors.trained_reward_worker import TrainedRewardWorker
from rlhf_ray.actors.worker import Worker

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
