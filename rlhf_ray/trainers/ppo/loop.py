"""The driver's loop of PPO (proximal policy optimisation, Schulman et al. 2017) for language models.

Invariants: a step is scored, valued and learned from as one batch; which weights sampled it is its mode's affair
(``trainers/ppo/modes``): while weights are sent its engines stand still, and while answers are compared they have nothing in
work. One schedule a step serves log-probs, values and the first pass, so that the first ratio is exactly 1 where the policy
computes the old log-probs. All ranks of policy and critic apply an update, or none does. A step counts only once its prompts
are in the ledger. What fails after a step does not cost it: the step is committed before the run ends, and the last one before
anything else is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from rlhf_ray.actors.publisher import Publisher
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.checkpointing import Checkpointer
from rlhf_ray.trainers.closing import closing
from rlhf_ray.trainers.journal import Journal
from rlhf_ray.trainers.ppo.comparison_table import show_samples, summarize_comparison
from rlhf_ray.trainers.ppo.evaluation import Comparison, PpoEvaluation
from rlhf_ray.trainers.ppo.experience import Experience
from rlhf_ray.trainers.ppo.metrics import StepMetrics, sample_rows
from rlhf_ray.trainers.ppo.modes import Mode
from rlhf_ray.trainers.ppo.progress import PpoProgress
from rlhf_ray.trainers.ppo.roles import Groups, Schedules
from rlhf_ray.trainers.ppo.sampling import Collected, PromptStream, Sampler
from rlhf_ray.trainers.ppo.self_check import CHECKED_PROMPTS, SelfCheck
from rlhf_ray.trainers.ppo.update import Learner, StepOutcome
from rlhf_ray.trainers.rollback import SkipPolicy
from rlhf_ray.trainers.stopping import steps_begin, stop_requested, stopped
from rlhf_ray.trajectories.batch import TrajectoryBatch


@dataclass(frozen=True)
class Prepared:
    """The batch of a step, ready to learn from, and what is known of it."""

    collected: Collected
    batch: TrajectoryBatch
    schedules: Schedules
    samples: Sequence[TextSample]
    metrics: Mapping[str, float]
    objective: Mapping[str, float]
    """Metrics of rewards and advantages."""


@dataclass
class PpoTrainer:
    """Runs the remaining steps of a PPO run."""

    config: PpoConfig
    run_directory: RunDirectory
    groups: Groups
    sampler: Sampler
    publisher: Publisher
    prompts: PromptStream
    mode: Mode
    experience: Experience
    learner: Learner
    metrics: StepMetrics
    evaluation: PpoEvaluation
    self_check: SelfCheck
    checkpoints: Checkpointer
    journal: Journal
    progress: PpoProgress
    state: dict[str, Any] = field(default_factory=dict)
    """The driver's part of a checkpoint after the last finished step: a step that has begun has moved the prompts on."""
    newest_compared: bool = False
    """Whether this attempt has compared log-probs on answers of weights that it had sent."""

    def start(self) -> None:
        """Load the last checkpoint if there is one, give the engines the weights, check the set-up, and measure the start."""
        state = self.checkpoints.restore()
        if state is not None:
            self.progress.restore(state["progress"])
            self.prompts.restore(state["prompts"])
            self.prompts.account(self.run_directory.ledger)
            self.mode.restore(self.checkpoints.path)
        self.remember()
        self.publish(self.progress.weight_version)
        with self.journal.phase("evaluation"):
            if state is None:
                self.check()
            self.evaluation.measure_start(resumed=state is not None)

    def run(self) -> None:
        """Run all remaining steps; raises :class:`ResumableStop` if the process is asked to stop between two of them."""
        steps_begin()
        self.journal.clock.take()  # the time that starting took belongs to no step
        self.stop_if_asked()
        while self.progress.step < self.config.steps:
            self.step()
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Commit and raise :class:`ResumableStop` if the process was asked to stop; before the first step nothing is lost."""
        if not stop_requested():
            return
        if self.progress.step > 0:
            self.save_checkpoint()
        raise stopped("step", self.progress.step, self.config.steps, self.run_directory.path)

    def step(self) -> None:
        """One step of PPO, in the order in which the data moves: sample, score, learn, record, publish."""
        progress = self.progress
        with self.checkpoints.committing_on_failure(progress.step, self.state):
            prepared = self.prepare()
        with self.journal.phase("update"):
            train_policy = progress.step >= self.config.algorithm.critic_warmup_steps
            outcome = self.learner.learn(
                prepared.batch,
                prepared.schedules,
                train_policy=train_policy,
                kl_coefficient=progress.kl.coefficient,
                guards=progress.guards,
                step=progress.step + 1,
            )
        progress.finish_step(outcome, prepared.objective, sequences=len(prepared.batch))
        went_back = self.go_back_if_needed(outcome)
        progress.weight_version += outcome.policy_applied or went_back
        self.run_directory.ledger.append(progress.step, [prompt.prompt_id for prompt in prepared.collected.prompts])
        self.remember()
        with self.checkpoints.committing_on_failure(progress.step, self.state):
            self.commit_if_due(at_once=went_back)
            if outcome.policy_applied or went_back:
                with self.journal.phase("weights"):
                    self.publish(progress.weight_version)
                self.compare_newest()
            self.journal.write_samples(progress.step, sample_rows(prepared.samples, prepared.batch))
            self.run_directory.engines.write(self.sampler.fleet.health.plain())
            metrics = {**prepared.metrics, **prepared.objective, **outcome.metrics, **progress.metrics()}
            metrics |= self.publisher.figures
            self.journal.log_step(progress.step, self.config.steps, metrics, prepared.batch)
            every = self.config.evaluation.every_steps
            if every and progress.step % every == 0 and progress.step < self.config.steps:
                self.compare()
        self.skips.refuse(progress.guards, progress.consecutive_skips, progress.step, self.state)

    @cached_property
    def skips(self) -> SkipPolicy:
        """What is done about skipped updates."""
        advice = "look at the last metrics, and lower the learning rate"
        return SkipPolicy(self.checkpoints, self.config.run.max_consecutive_skips, advice)

    def go_back_if_needed(self, outcome: StepOutcome) -> bool:
        """After the updates of a step: whether the trained groups took up earlier weights, since too many were skipped."""
        progress = self.progress
        self.skips.report("policy", progress.step, outcome.skipped, outcome.stood_out)
        went_back = self.skips.go_back(progress.guards, progress.consecutive_skips, "policy", progress.step)
        if went_back:
            progress.consecutive_skips = 0
        return went_back

    def prepare(self) -> Prepared:
        """Sample and score the batch of the next step; this changes no weight."""
        phase, progress = self.journal.phase, self.progress
        collected = self.mode.collect(progress.step, progress.weight_version, phase)
        self.sampler.fleet.refuse_empty(collected.trajectories)
        batch, schedules, samples = self.experience.gather(
            collected.trajectories,
            collected.by_id,
            step=progress.step,
            phase=phase,
            scored=collected.scored,
            old_log_probs=self.config.algorithm.old_log_probs,
        )
        if self.config.algorithm.old_log_probs == "policy":
            self.journal.keep_checks(self.self_check.after_update(batch, progress.weight_version))
        progress.observe_scores(batch)
        batch, objective = self.experience.advantages(batch, progress.kl.coefficient, progress.moments)
        measured = self.metrics.measure(batch, samples, collected, weight_version=progress.weight_version)
        metrics = {**measured, **self.sampler.fleet.figures()}
        metrics |= collected.metrics
        return Prepared(collected, batch, schedules, samples, metrics, objective)

    def publish(self, version: int) -> None:
        """Send the policy's weights to every rollout engine as ``version``."""
        self.mode.pause()
        self.publisher.publish(version)

    def remember(self) -> None:
        """Keep the driver's state as it is now, after a finished step, for its checkpoint."""
        self.state = {"progress": self.progress.state(), "prompts": self.mode.position(self.progress.step)}

    def commit_if_due(self, *, at_once: bool = False) -> None:
        """Commit the step that was just finished if it is due, or ``at_once``; after the last one, write ``final/`` too."""
        step = self.progress.step
        if at_once or step == self.config.steps or self.checkpoints.schedule.is_due(step):
            with self.journal.phase("checkpoint"):
                self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Save everything up to the last step, so that it survives a kill; after the last one, ``final/`` too.

        The critic is in ``final/critic``.
        """
        self.mode.before_checkpoint()
        step = self.progress.step
        if step < self.config.steps:
            self.checkpoints.save(step, self.state)
        else:
            write = partial(self.checkpoints.save_final, step, self.groups.results)
            self.checkpoints.keep_result(step, self.state, write)

    def check(self) -> None:
        """Run the start-up self-check on a few training prompts, which do not count as used."""
        prompts = self.checked_prompts()
        trajectories = self.sampler.generate(prompts, 0)
        self.sampler.fleet.refuse_empty(trajectories)
        by_id = {prompt.prompt_id: prompt for prompt in prompts}
        batch, schedules, samples = self.experience.gather(trajectories, by_id, step=0)
        self.journal.keep_checks(self.self_check.run(batch, schedules, samples))

    def compare_newest(self) -> None:
        """Once, where no step compares them: the log-probs of trainer and rollout on a few answers of the newest weights.

        Steps do where they train on answers of the newest weights, and the policy computes their log-probs.
        """
        in_steps = self.mode.trains_on_newest and self.config.algorithm.old_log_probs == "policy"
        if in_steps or self.newest_compared:
            return
        self.mode.settle()
        with self.journal.phase("evaluation"):
            trajectories = self.sampler.generate(self.checked_prompts(), 0)
            if len(trajectories) == 0:  # its prompts were set aside
                return
            self.newest_compared = True
            shared = self.groups.policy.share(trajectories)
            schedule = self.groups.schedules(trajectories, 0)["policy"]
            batch = trajectories.with_columns(log_probs=self.groups.policy.log_probs(shared, schedule).result())
            self.journal.keep_checks(self.self_check.after_update(batch, self.progress.weight_version))

    def checked_prompts(self) -> list[TokenizedPrompt]:
        """A few training prompts, which do not count as used."""
        return self.prompts.peek(min(CHECKED_PROMPTS, self.config.batch.prompts_per_step))

    def compare(self) -> Comparison | None:
        """Measure and log the current policy against the start; nothing where there are no held-out prompts."""
        if not self.evaluation.possible:
            return None
        self.mode.settle()
        with self.journal.phase("evaluation"):
            comparison = self.evaluation.compare()
        self.journal.log_evaluation(self.progress.step, comparison.figures)
        show_samples(comparison, self.config.algorithm.name, self.config.evaluation.samples_shown)
        return comparison

    def finish(self) -> None:
        """Check the ledger, compare a last time, and write the report; a run that was killed may lack ``final/`` too."""
        self.save_checkpoint()
        run, step = self.run_directory, self.progress.step
        with closing(run, step, "the last evaluation"):
            epochs = self.prompts.account(run.ledger)
            get_logger("ppo").info("prompts: %d epochs complete, each prompt used once in each", epochs)
            comparison = self.compare()
            if comparison is not None:
                self.journal.keep_comparison(
                    *summarize_comparison(comparison, self.config.algorithm.name, self.config.evaluation.pass_at)
                )
        with closing(run, step, "the report"):
            self.journal.finish()
        get_logger("ppo").info("done: %s", run.path)
