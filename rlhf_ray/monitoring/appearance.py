"""Which metrics are there only with an option, in one kind of job, or after an event: why a panel may be empty.

Invariant: every pattern matches a registered metric; a metric that none matches is there in every PPO run, in every training of
a reward model, or on the page of every service that has answered a request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from rlhf_ray.monitoring.registry import Metric

WHEN: Mapping[str, str] = {
    "updates/skipped": "after an update that was skipped",
    "updates/stood_out": "after an update that stood out",
    "(evaluation/prompts_|prompts/)dropped": "after a prompt whose answer has no reward",
    "groups/lost": "after the loss of a group of ranks",
    "reward/failed_tries": "after a reward source that failed",
    "rollout/engine_deaths": "after the death of a rollout engine",
    "reward_term/.*": "with reward.mixture, reward.ensemble or reward.judge.parts",
    "judge/.*": "with a judge",
    "gold/.*|evaluation/(gold|habit).*": "in the generated world",
    "weights/sent_share": "with rollout.weight_delta, or rollout.lora adapter",
    "kl/k[13]": "with a reference",
    "(loss|clip_fraction)/value|(returns|values)/mean|explained_variance|(grad_norm|learning_rate)/critic": "with a critic",
    "loss/sft": "in supervised fine-tuning",
    "loss/dpo|log_prob/.*": "in a policy's training on pairs",
    "loss/kto|kl/baseline": "with loss.name kto",
    "loss/kl": "with algorithm.kl.applied_to loss",
    "loss/centering": "with loss.centering",
    "loss/router_balance": "with loss.router_balance, of a model with experts",
    "length/turns": "with an environment",
    "importance/.*": "with algorithm.importance",
    "rollout/(seconds|engines_idle)": "with rollout.mode one_step_off or windowed",
    "rollout/(in_flight|buffered)": "with rollout.mode windowed",
    "(age|limit)/commit": "with checkpoint.every_steps other than 0",
    "(memory|rank)/gpu_.*": "on GPUs",
}
"""By a pattern of names."""
GPU = "on a node with a GPU"


def when(metric: Metric) -> str | None:
    """When a metric of runs is there; None where nothing special is needed."""
    return next((reason for pattern, reason in WHEN.items() if re.fullmatch(pattern, metric.name)), None)
