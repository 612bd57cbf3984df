"""What a PPO step logs beside the objective and the losses.

Always true: every number is of this step's batch; the gold score is shown and never trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from rlhf_ray.algorithms.kl import sequence_kl
from rlhf_ray.errors import StaleWeightsError
from rlhf_ray.trainers.experience import TERM, Experience, TextSample, TokenizedPrompt
from rlhf_ray.trainers.gold import gold_function, world_gold
from rlhf_ray.trainers.ppo_progress import PpoProgress
from rlhf_ray.trainers.self_check import log_prob_difference
from rlhf_ray.trajectories.batch import TrajectoryBatch


def step_metrics(
    experience: Experience,
    progress: PpoProgress,
    batch: TrajectoryBatch,
    samples: Sequence[TextSample],
    prompts: Mapping[int, TokenizedPrompt],
) -> dict[str, float]:
    """Scores, lengths, staleness, the difference between rollout and trainer, and what survives decode and encode."""
    mask, offsets = batch["action_mask"], batch.offsets
    kl = sequence_kl(batch["log_probs"], batch["reference_log_probs"], mask, offsets, "k3")
    prompt_tokens = sum(len(prompts[prompt_id].token_ids) for prompt_id in batch["prompt_id"].tolist())
    versions = batch["weight_version"][mask]
    metrics = {
        "kl/k3": float(kl.mean()),
        "kl/coefficient": progress.kl.coefficient,
        "reward/learned": float(batch["score"].mean()),
        "length/prompt": prompt_tokens / len(batch),
        "rollout/log_prob_difference": float(log_prob_difference(batch).max()),
        "rollout/staleness": float(progress.weight_version - versions.min()),
        "round_trip/failed_share": failed_round_trips(experience, samples, prompts, batch),
        "prompts/dropped": float(len(prompts) - len(set(batch["prompt_id"].tolist()))),
    }
    terms = [name for name in batch.columns if name.startswith(TERM)]
    metrics |= {f"reward_term/{name.removeprefix(TERM)}": float(batch[name].mean()) for name in terms}
    gold = world_gold(experience.config)
    if gold is not None:
        scores = gold_function(gold, ExitStack())(samples)
        metrics["gold/mean"] = sum(scores) / len(scores)
    return metrics


def refuse_stale(batch: TrajectoryBatch, version: int, bound: int) -> None:
    """Raise :class:`StaleWeightsError` where a token was sampled by weights more than ``bound`` versions old."""
    oldest = int(batch["weight_version"][batch["action_mask"]].min())
    if version - oldest > bound:
        raise StaleWeightsError(f"a token was sampled by weight version {oldest}, now is {version}, and "
                                f"algorithm.max_staleness is {bound}: raise it, or sample again")  # fmt: skip


def failed_round_trips(
    experience: Experience,
    samples: Sequence[TextSample],
    prompts: Mapping[int, TokenizedPrompt],
    batch: TrajectoryBatch,
) -> float:
    """Share of samples whose ids are not what their text encodes to: a reward by text then reads other tokens."""
    failed = 0
    for sample, prompt_id in zip(samples, batch["prompt_id"].tolist(), strict=True):
        answer = list(sample.token_ids[len(prompts[prompt_id].token_ids) :])
        text = experience.tokenizer.decode(answer, skip_special_tokens=False)
        failed += experience.tokenizer(text, add_special_tokens=False)["input_ids"] != answer
    return failed / len(samples)


def sample_rows(samples: Sequence[TextSample], batch: TrajectoryBatch) -> list[dict[str, object]]:
    """Samples of a step as they are kept in ``samples/``."""
    return [
        {"prompt": sample.prompt, "response": sample.response, "finished": sample.finished, "score": round(score, 4)}
        for sample, score in zip(samples, batch["score"].tolist(), strict=True)
    ]
