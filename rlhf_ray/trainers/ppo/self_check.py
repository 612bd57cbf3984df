"""Check a PPO run before its first step, on a few samples of its own, and once more on the first that new weights sampled.

Invariants: the checks use the same calls as training, and change nothing: the update that they accumulate is dropped. Each
says what it measured and what it allows, and one that fails says what to look at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_ray.algorithms.denominators import denominator
from rlhf_ray.config.files.models import model_config_file
from rlhf_ray.config.files.sampled import is_mixture
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.console import get_logger, table
from rlhf_ray.errors import NumericalError
from rlhf_ray.evaluation.agreement import LOG_PROB_BOUNDS, SCORE_BOUNDS, Bounds, Spread, loosest
from rlhf_ray.monitoring.report.summary import Check
from rlhf_ray.rewards.mixture import EnsembleSource, MixedResult, MixtureSource
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import ModelSource, RewardSource
from rlhf_ray.trainers.ppo.experience import Experience
from rlhf_ray.trainers.ppo.roles import Schedules
from rlhf_ray.trainers.ppo.update import Learner
from rlhf_ray.trajectories.batch import TrajectoryBatch

CHECKED_ALONE = 4
"""So many samples are scored again, one by one."""


CHECKED_PROMPTS = 8
"""Answers to so many prompts are checked at most."""


LOG_PROBS, FIRST_RATIO, SCORE_ALONE = "trainer and rollout log-probs", "first ratio", "reward alone and in a batch"
UPDATED_LOG_PROBS = "trainer and rollout log-probs after an update"
SAME_FORM = "reward of the ids and of their text"
WAYS_OUT = {
    FIRST_RATIO: "log-probs and training must run the same packs in the same precision, without dropout",
    SCORE_ALONE: "the reward source must score each sample by itself",
    SAME_FORM: "the reward model encodes a conversation in another way than the policy, so the ids that were sampled are not "
    "what it was trained on: compare its chat template and template variables with the policy's, and data.template_variables",
}
"""What to do where a check fails whose causes do not depend on the config."""
ENGINE_CAUSES = {
    LOG_PROBS: "vLLM computes this model in another way than transformers, which trains it (a layer, or a value of its "
    "config.json that only one of them knows): set rollout.backend to transformers, which samples with the trainer's own model",
    UPDATED_LOG_PROBS: "vLLM does not compute with the weights that it was sent (layers that it packs when it starts, such as "
    "experts or a tied output layer): set rollout.backend to transformers, which samples with the trainer's own model",
}
OTHER_EXPERTS = (
    "rounding sends tokens to other experts in the engine than in the trainer: set rollout.routing_replay to true"
)
"""Why they differ in a mixture of experts in half precision."""
SAME_LIBRARY = "both run the model of transformers, so that the engine has not the weights of the policy: report it"
"""Why an engine gives other log-probs than the trainer, where both compute in one dtype."""


class SelfCheck:
    """The start-up checks of a PPO run."""

    def __init__(self, config: PpoConfig, experience: Experience, learner: Learner) -> None:
        self.config = config
        self.experience = experience
        self.learner = learner
        self._update_checked = False

    def run(self, batch: TrajectoryBatch, schedules: Schedules, samples: Sequence[TextSample]) -> list[Check]:
        """Check a batch with all its columns; raises :class:`NumericalError`, with the table of all checks, if one fails."""
        checks = [
            self.same_log_probs(batch),
            self.first_ratio(batch, schedules),
            *self.score_alone(batch, samples),
            *self.same_form(samples),
            self.tokenizers(),
        ]
        rows = [(check.name, check.value, check.bound, "yes" if check.passed else "NO") for check in checks]
        sheet = table("start-up self-check", ("what", "measured", "wanted", "holds"), rows)
        failed = [check for check in checks if not check.passed]
        if failed:
            ways = "\n".join(f"{check.name}: {way_out(check.name, self.config)}" for check in failed)
            raise NumericalError(f"the start-up self-check failed\n{sheet}\n{ways}")
        get_logger("ppo").info("\n%s", sheet)
        return checks

    def after_update(self, batch: TrajectoryBatch, version: int) -> list[Check]:
        """Check the first batch that was sampled by other weights than the engines started from: by ``version`` alone, above 0.

        It costs nothing, since the batch has its log-probs already. Every other batch has no check, nor has one whose
        log-probs are not finite, which the update will skip. Raises :class:`NumericalError` if trainer and rollout disagree.
        """
        few = batch.select(range(min(len(batch), CHECKED_PROMPTS * self.config.batch.samples_per_prompt)))
        versions = few["weight_version"][few["action_mask"]]
        if self._update_checked or version == 0 or not bool((versions == version).all()):
            return []
        if not bool(log_prob_difference(few).isfinite().all()):
            return []
        self._update_checked = True
        check = self.same_log_probs(few, UPDATED_LOG_PROBS)
        if not check.passed:
            raise NumericalError(
                f"{check.name} {check.value}, wanted {check.bound}: {way_out(check.name, self.config)}"
            )
        get_logger("ppo").info("%s %s (wanted %s)", check.name, check.value, check.bound)
        return [check]

    def same_log_probs(self, batch: TrajectoryBatch, name: str = LOG_PROBS) -> Check:
        """Trainer and rollout give the same log-probs to the same tokens."""
        spread, bounds = Spread(log_prob_difference(batch)), log_prob_bounds(self.config)
        return Check(name, f"differ by {spread} nats over {spread.count} tokens", str(bounds), spread.within(bounds))

    def first_ratio(self, batch: TrajectoryBatch, schedules: Schedules) -> Check:
        """The first update sees ratios of exactly 1, although the old log-probs come from a call of their own."""
        update = schedules["policy"].updates[0]
        # Any advantage but 0 would do: it makes every action count. The update is dropped below.
        neutral = batch.with_columns(advantages=torch.ones(batch.num_tokens))
        policy = self.learner.groups.policy
        shared = policy.share(neutral)
        loss = self.learner.policy_loss
        count = denominator(loss.denominator, batch, update.sequences)
        report = policy.accumulate(shared, update, loss, count).result()
        policy.apply(True).result()
        total, actions = report.metrics["ratio/mean"]
        divergence = report.metrics["approximate_kl"][0]
        exact = total == actions and divergence == 0.0
        return Check(
            FIRST_RATIO,
            f"mean {total / actions:.9g}, divergence {divergence:.1e}",
            "exactly 1 and 0",
            exact,
        )

    def score_alone(self, batch: TrajectoryBatch, samples: Sequence[TextSample]) -> list[Check]:
        """The reward of a text does not depend on the batch it is scored in; none with a judge, which may vary."""
        if any(source.judge is not None for source in self.config.reward.sources.values()):
            return []
        few = list(samples[:CHECKED_ALONE])
        together = batch["score"][: len(few)]
        results = [self.experience.require_rewards([sample])[0] for sample in few]
        spread = Spread(together - torch.tensor([result.reward for result in results]))
        bounds = self._score_bounds([together.abs().max(), *map(size, results)])
        return [Check(SCORE_ALONE, f"differ by {spread}", str(bounds), spread.within(bounds))]

    def same_form(self, samples: Sequence[TextSample]) -> list[Check]:
        """A reward model that is asked about ids gives them the score of their text, which it encodes as in its training.

        None where no reward model is asked about the ids of conversations.
        """
        models = [source for source in model_sources(self.experience.rewards) if source.policy is not None]
        talks = [sample for sample in samples if sample.messages is not None]
        if not models or not talks:
            return []
        forms = [form for model in models for form in model.compare_forms(talks)]
        failed = next((each.error for form in forms for each in form[1:] if each.error is not None), None)
        if failed is not None:
            return [Check(SAME_FORM, f"no score: {failed}", "a score in both forms", False)]
        scores = torch.tensor([[form.by_ids.raw, form.by_text.raw] for form in forms], dtype=torch.float64).view(-1, 2)
        spread = Spread(scores[:, 0] - scores[:, 1] if forms else torch.zeros(1))
        cut = sum(not form.sample.finished for form in forms)
        measured = f"{len(forms)} of {len(talks) * len(models)} answers ({cut} cut) differ by {spread}"
        bounds = self._score_bounds(scores.abs().flatten().tolist())
        return [Check(SAME_FORM, measured, str(bounds), spread.within(bounds))]

    def _score_bounds(self, sizes: Sequence[float | torch.Tensor]) -> Bounds:
        """What differences of scores of these sizes keep to."""
        dtypes = [role.model.dtype for role in self.config.reward.roles.values()]
        return loosest(SCORE_BOUNDS[dtype] for dtype in [*dtypes, "fp32"]).times(max(1.0, *map(float, sizes)))

    def tokenizers(self) -> Check:
        """States what the reward sources read: ids only if they have the policy's tokenizer. It cannot fail."""
        return Check("what the reward reads", self.experience.rewards.reads, "ids, or text", True)


def way_out(name: str, config: PpoConfig) -> str:
    """What to do where the check of this name fails."""
    if name not in ENGINE_CAUSES:
        return WAYS_OUT[name]
    policy, rollout = config.policy.model.dtype, config.rollout
    cause = ENGINE_CAUSES[name] if rollout.backend == "vllm" else SAME_LIBRARY
    rounds = "fp32" not in (policy, rollout.dtype)
    if rounds and not rollout.routing_replay and is_mixture(model_config_file(config.policy.model)):
        cause = f"{OTHER_EXPERTS}; or {cause}"
    if policy == rollout.dtype:
        return cause
    return f"policy.model.dtype is {policy} and rollout.dtype {rollout.dtype}: set both to one of them; or {cause}"


def model_sources(source: RewardSource) -> list[ModelSource]:
    """The reward models behind a source: itself, or those among its terms."""
    if isinstance(source, MixtureSource):
        return [model for term in source.terms.values() for model in model_sources(term.source)]
    if isinstance(source, EnsembleSource):
        return [model for one in source.models.values() for model in model_sources(one)]
    return [source] if isinstance(source, ModelSource) else []


def log_prob_bounds(config: PpoConfig) -> Bounds:
    """What differences of log-probs between trainer and rollout keep to in sound runs of these dtypes."""
    policy, rollout = config.policy.model.dtype, config.rollout.dtype
    if rollout == "fp32" and config.rollout.resources.gpus_per_rank > 0:
        rollout = "fp16"  # kernels on a GPU multiply fp32 as TF32, which has as many bits; not measured by us yet
    return loosest(LOG_PROB_BOUNDS[dtype] for dtype in (policy, rollout))


def size(result: ScoreResult) -> float:
    """How large the numbers were of which a reward was made: rounding is relative to them."""
    terms = result.terms if isinstance(result, MixedResult) else None
    return max(abs(number) for number in (result.raw, result.reward, *(terms or {}).values()) if number is not None)


def log_prob_difference(batch: TrajectoryBatch) -> torch.Tensor:
    """(actions,) absolute differences between the log-probs of trainer and rollout, in nats."""
    mask = batch["action_mask"]
    return (batch["log_probs"][mask] - batch["rollout_log_probs"][mask]).abs()
