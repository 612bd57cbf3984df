"""The driver's loop of PPO (proximal policy optimisation, Schulman et al. 2017) for language models.

Invariants: a step is sampled by one version of the weights, and scored, valued and learned from as one batch. One schedule a
step serves log-probs, values and the first pass, so that the first ratio is exactly 1. All ranks of policy and critic apply
an update, or none does. A step counts only once its prompts are in the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import NumericalError, ResumableStop
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.checkpointing import Checkpointer
from rlhf_ray.trainers.journal import Journal
from rlhf_ray.trainers.ppo.comparison_table import show_samples, summarize_comparison
from rlhf_ray.trainers.ppo.evaluation import Comparison, PpoEvaluation
from rlhf_ray.trainers.ppo.experience import Experience
from rlhf_ray.trainers.ppo.metrics import StepMetrics, sample_rows
from rlhf_ray.trainers.ppo.progress import PpoProgress
from rlhf_ray.trainers.ppo.roles import Groups
from rlhf_ray.trainers.ppo.sampling import Collector, PromptStream, Sampler
from rlhf_ray.trainers.ppo.self_check import SelfCheck
from rlhf_ray.trainers.ppo.update import Learner
from rlhf_ray.trainers.stopping import steps_begin, stop_requested

CHECKED_PROMPTS = 8
"""The self-check samples answers to at most so many prompts."""


@dataclass
class PpoTrainer:
    """Runs the remaining steps of a PPO run."""

    config: PpoConfig
    run_directory: RunDirectory
    groups: Groups
    sampler: Sampler
    prompts: PromptStream
    collector: Collector
    experience: Experience
    learner: Learner
    metrics: StepMetrics
    evaluation: PpoEvaluation
    self_check: SelfCheck
    checkpoints: Checkpointer
    journal: Journal
    progress: PpoProgress

    def start(self) -> None:
        """Load the last checkpoint if there is one, give the engines the weights, check the set-up, and measure the start."""
        state = self.checkpoints.restore()
        if state is not None:
            self.progress.restore(state["progress"])
            self.prompts.restore(state["prompts"])
            self.prompts.account(self.run_directory.ledger)
        self.publish(self.progress.weight_version)
        with self.journal.phase("evaluation"):
            if state is None:
                self.check()
            self.evaluation.measure_start(resumed=state is not None)

    def run(self) -> None:
        """Run all remaining steps; raises :class:`ResumableStop` if the process is asked to stop between two of them."""
        steps_begin()
        self.journal.clock.take()  # the time that starting took belongs to no step
        while self.progress.step < self.config.steps:
            self.step()
            if stop_requested() and self.progress.step < self.config.steps:
                self.save_checkpoint()
                raise ResumableStop(f"stopped on request after step {self.progress.step} of {self.config.steps}; go on "
                                    f"with: rlhf-ray resume {self.run_directory.path}")  # fmt: skip

    def step(self) -> None:
        """One step of PPO, in the order in which the data moves: sample, score, learn, publish, record."""
        phase, progress = self.journal.phase, self.progress
        collected = self.collector.collect(progress.step, progress.weight_version, phase)
        batch, schedules, samples = self.experience.gather(
            collected.trajectories, collected.by_id, step=progress.step, phase=phase, scored=collected.scored
        )
        progress.observe_scores(batch)
        batch, objective = self.experience.advantages(batch, progress.kl.coefficient, progress.moments)
        measured = self.metrics.measure(batch, samples, collected, weight_version=progress.weight_version)
        with phase("update"):
            train_policy = progress.step >= self.config.algorithm.critic_warmup_steps
            outcome = self.learner.learn(
                batch, schedules, train_policy=train_policy, kl_coefficient=progress.kl.coefficient
            )
        if outcome.policy_applied:
            with phase("weights"):
                self.publish(progress.weight_version + 1)

        progress.finish_step(outcome, objective, sequences=len(batch))
        self.run_directory.ledger.append(progress.step, [prompt.prompt_id for prompt in collected.prompts])
        if self.checkpoints.is_due(progress.step):
            with phase("checkpoint"):
                self.save_checkpoint()
        self.journal.write_samples(progress.step, sample_rows(samples, batch))
        metrics = measured | objective | outcome.metrics | progress.metrics()
        self.journal.log_step(progress.step, self.config.steps, metrics, batch)
        self.after_step()

    def after_step(self) -> None:
        """Evaluate if it is due; raises :class:`NumericalError` if too many updates in a row were skipped."""
        step, every = self.progress.step, self.config.evaluation.every_steps
        if every and step % every == 0 and step < self.config.steps:
            self.compare()
        if self.progress.consecutive_skips >= self.config.run.max_consecutive_skips:
            raise NumericalError(f"{self.progress.consecutive_skips} updates in a row had NaN or Inf and were skipped: look "
                                 "at the last metrics, lower the learning rate, or resume an earlier checkpoint")  # fmt: skip

    def publish(self, version: int) -> None:
        """Send the policy's weights to every rollout engine as ``version``."""
        self.progress.weight_version = version
        self.sampler.update_weights(version, self.groups.policy.publish_weights(version).result())

    def save_checkpoint(self) -> None:
        """Save everything up to the last step, so that it survives a kill."""
        state = {"progress": self.progress.state(), "prompts": self.prompts.state()}
        self.checkpoints.save(self.progress.step, state)

    def check(self) -> None:
        """Run the start-up self-check on a few training prompts, which do not count as used."""
        prompts = self.prompts.peek(min(CHECKED_PROMPTS, self.config.batch.prompts_per_step))
        trajectories = self.sampler.generate(prompts, 0)
        by_id = {prompt.prompt_id: prompt for prompt in prompts}
        batch, schedules, samples = self.experience.gather(trajectories, by_id, step=0)
        self.journal.keep_checks(self.self_check.run(batch, schedules, samples))

    def compare(self) -> Comparison | None:
        """Measure and log the current policy against the start; nothing where there are no held-out prompts."""
        if not self.evaluation.possible:
            return None
        with self.journal.phase("evaluation"):
            comparison = self.evaluation.compare()
        self.journal.log_evaluation(self.progress.step, comparison.figures)
        show_samples(comparison, self.config.algorithm.name, self.config.evaluation.samples_shown)
        return comparison

    def finish(self) -> None:
        """Check the ledger, compare a last time, write ``final/`` (the critic in ``final/critic``) and the report."""
        epochs = self.prompts.account(self.run_directory.ledger)
        get_logger("ppo").info("prompts: %d epochs complete, each prompt used once in each", epochs)
        comparison = self.compare()
        if comparison is not None:
            self.journal.keep_comparison(
                *summarize_comparison(comparison, self.config.algorithm.name, self.config.evaluation.pass_at)
            )
        self.checkpoints.save_final(self.groups.results)
        self.journal.finish()
        get_logger("ppo").info("done: %s", self.run_directory.path)
