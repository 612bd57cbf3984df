"""The driver's loop of PPO (proximal policy optimisation, Schulman et al. 2017) for language models.

Invariants: a step is scored, valued and learned from as one batch; its mode says which weights sampled it
(``trainers/ppo/modes``): while weights are sent its engines stand still, and while answers are compared they have nothing in
work. One schedule a step serves log-probs, values and the first pass, so that the first ratio is exactly 1 where the policy
computes the old log-probs. All ranks of a role apply an update, or none does; policy and critic both, but for a gradient norm
of the policy alone that stands out (``trainers/ppo/update``). A step counts only once its prompts are in the ledger. What fails
after a step does not cost it: the step is committed before the run ends, and the last one before anything else is done. The
loss of a group of ranks ends nothing (``trainers/recovery``): where no trained group was lost and none had begun to learn, what
was under way is done again with the samples that are there; else the run goes on from its last commit, as a resumed one does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from rlhf_ray.actors.publisher import Publisher
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.errors import GroupError, ResumableStop, RlhfRayError
from rlhf_ray.processes import spans
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
from rlhf_ray.trainers.recovery import Plan, Recovery
from rlhf_ray.trainers.rollback import SkipPolicy
from rlhf_ray.trainers.stopping import Grace, steps_begin, stop_requested, stopped
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
    recovery: Recovery
    state: dict[str, Any] = field(default_factory=dict)
    """The driver's part of a checkpoint after the last finished step: a step that has begun has moved the prompts on."""
    unit: str = "step"
    grace: Grace = field(default_factory=Grace)
    """Whether a step still ends in time after a request to stop."""
    newest_compared: bool = False
    """Whether this attempt has compared log-probs on answers of weights that it had sent."""
    touched: bool = False
    """Whether policy or critic may hold something else than the weights of ``state``."""
    collected: Collected | None = None
    """The samples of the step that is under way, once they are there."""
    to_do: deque[Callable[[], None]] = field(default_factory=deque)
    """What is under way, and what follows from it, in order; each can be done again where it failed."""
    beginning: dict[str, Any] = field(default_factory=dict)
    """The driver's state before the first step of the run, where this attempt began there."""

    def start(self) -> None:
        """Load the last checkpoint if there is one, give the engines the weights, check the set-up, and measure the start."""
        self.remember()
        self.beginning = self.state
        resumed = self.checkpoints.checkpoint is not None
        self.touched = resumed
        self.carry_on_with(self.restore, self.send_weights, *[self.check] * (not resumed), self.measure_start)

    def restore(self) -> None:
        """Load the checkpoint that the run goes on from, if there is one."""
        state = self.checkpoints.restore()
        if state is not None:
            self.progress.restore(state["progress"])
            self.prompts.restore(state["prompts"])
            self.prompts.account(self.run_directory.ledger)
            self.mode.restore(self.checkpoints.path)
        self.remember()
        self.touched = False

    def run(self) -> None:
        """Run all remaining steps; raises :class:`ResumableStop` if the process is asked to stop between two of them."""
        steps_begin()
        self.journal.clock.take()  # the time that starting took belongs to no step
        self.carry_on_with(self.stop_if_asked)
        while self.progress.step < self.config.steps:
            with self.grace.step(self.progress.step + 1):
                self.carry_on_with(self.step)
            if stop_requested():
                self.to_do.clear()  # the rest of a step that was broken off
            self.carry_on_with(self.stop_if_asked)

    def carry_on_with(self, *work: Callable[[], None]) -> None:
        """Do ``work`` and all that follows from it, over the loss of groups.

        Any other error ends the run, once what is finished is committed.
        """
        self.to_do += work
        while self.to_do:
            with self.checkpoints.committing_on_failure(self.progress.step, self.state, unless=self.commits_nothing):
                try:
                    if not stop_requested():
                        self.checkpoints.raise_failure()
                    self.to_do[0]()
                except GroupError as error:
                    with self.journal.clock.part("recovery"):
                        self.recovery.survive(error, self)
                else:
                    self.to_do.popleft()

    def commits_nothing(self, error: Exception) -> bool:
        """Whether ``error`` commits nothing: it left half a step, or came from what sees to it by itself."""
        seen_to = isinstance(error, ResumableStop) or self.to_do[0] in (self.refuse_skips, self.compare_last)
        return self.touched or seen_to

    # What recovery asks of a trainer

    @property
    def finished_step(self) -> int:
        """The last finished step; 0 before the first. A step that is under way may have been counted."""
        return int(self.state["progress"]["step"])

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.steps

    def finished_state(self) -> Mapping[str, Any]:
        """The driver's part of a checkpoint of that step."""
        return self.state

    def come_back(self, plan: Plan, state: Mapping[str, Any] | None) -> None:
        """Have the driver and the engines go on from where ``plan`` has brought the trained groups."""
        if plan.back_to < self.finished_step:
            if self.to_do[0] in (self.save_checkpoint, self.compare_last):  # of finish
                raise RlhfRayError(f"the last step is not committed, and only step {plan.back_to} could be evaluated")
            self.go_back(plan.back_to, self.beginning if state is None else dict(state))
        elif self.collected is None and self.step in self.to_do:
            self.mode.go_back(self.state["prompts"], None)  # some were taken for samples that did not come
        self.progress.restore(self.state["progress"])
        if self.groups.policy.role in plan.restart | plan.load:
            self.publisher.forget()
            if self.restore not in self.to_do:  # it says of which version the weights are
                self.publish(self.progress.weight_version)

    def go_back(self, step: int, state: dict[str, Any]) -> None:
        """Forget all that came after ``step``, at which the driver's state was ``state``."""
        self.to_do.clear()
        self.collected = None
        self.state = state
        self.run_directory.go_back(step)
        self.mode.go_back(state["prompts"], self.checkpoints.path if step else None)
        self.prompts.account(self.run_directory.ledger)

    def stop_if_asked(self) -> None:
        """Commit and raise :class:`ResumableStop` if the process was asked to stop; before the first step nothing is lost."""
        if not stop_requested():
            return
        if self.progress.step > 0:
            self.checkpoints.close()  # a commit that fails now is made up for by that of the last finished one
            self.save_checkpoint()
            self.checkpoints.settle()
        raise stopped("step", self.progress.step, self.config.steps, self.run_directory.path)

    def step(self) -> None:
        """One step of PPO, in the order in which the data moves: sample, score, learn, record; publishing is left to do."""
        progress = self.progress
        with self.grace.part_without_learning():
            prepared = self.prepare()
        self.touched = True
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
        with spans.span("log"):
            progress.weight_version += outcome.policy_applied or went_back
            self.run_directory.ledger.append(progress.step, [prompt.prompt_id for prompt in prepared.collected.prompts])
            self.collected = None
            self.remember()
            self.touched = False
            self.to_do += self.after_step(prepared, outcome, went_back)

    def after_step(self, prepared: Prepared, outcome: StepOutcome, went_back: bool) -> list[Callable[[], None]]:
        """What is to be done once a step is learned, in this order."""
        every, step = self.config.evaluation.every_steps, self.progress.step
        publishing = [self.send_weights, self.compare_newest] if outcome.policy_applied or went_back else []
        evaluating = [self.evaluate] if every and step % every == 0 and step < self.config.steps else []
        return [
            partial(self.commit_if_due, at_once=went_back),
            *publishing,
            partial(self.log_step, prepared, outcome),
            *evaluating,
            self.refuse_skips,
        ]

    def log_step(self, prepared: Prepared, outcome: StepOutcome) -> None:
        """Write the samples and the metrics of the step that was just finished."""
        step, journal = self.progress.step, self.journal
        with spans.span("log"):
            tokenizer, count = self.metrics.tokenizer, self.config.monitoring.samples_per_log
            journal.write_samples(step, sample_rows(prepared.samples, prepared.batch, tokenizer, count))
            self.run_directory.engines.write(self.sampler.fleet.health.plain())
        metrics = {**prepared.metrics, **prepared.objective, **outcome.metrics, **self.progress.metrics()}
        journal.log_step(step, self.config.steps, metrics | self.publisher.figures, prepared.batch)

    def refuse_skips(self) -> None:
        """Raise :class:`NumericalError` if too many updates were skipped."""
        self.skips.refuse(self.progress.guards, self.progress.consecutive_skips, self.progress.step, self.state)

    @cached_property
    def skips(self) -> SkipPolicy:
        """What is done about skipped updates."""
        advice = "look at the last metrics, and lower the learning rate"
        return SkipPolicy(self.checkpoints, self.config.run.max_consecutive_skips, advice)

    def go_back_if_needed(self, outcome: StepOutcome) -> bool:
        """After the updates of a step: whether the trained groups took up earlier weights, since too many were skipped."""
        progress = self.progress
        self.skips.report(progress.guards, "policy", progress.step, outcome.skipped, outcome.stood_out)
        went_back = self.skips.go_back(progress.guards, progress.consecutive_skips, "policy", progress.step)
        if went_back:
            progress.consecutive_skips = 0
        return went_back

    def prepare(self) -> Prepared:
        """Sample and score the batch of the next step; this changes no weight."""
        phase, progress = self.journal.phase, self.progress
        if self.collected is None:
            self.collected = self.mode.collect(progress.step, progress.weight_version, phase)
        collected = self.collected
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
        with spans.span("advantages"):
            progress.observe_scores(batch)
            batch, objective = self.experience.advantages(batch, progress.kl.coefficient, progress.moments)
        with spans.span("metrics"):
            measured = self.metrics.measure(batch, samples, collected, weight_version=progress.weight_version)
            metrics = {**measured, **self.sampler.fleet.figures(), **collected.metrics}
        return Prepared(collected, batch, schedules, samples, metrics, objective)

    def publish(self, version: int) -> None:
        """Send the policy's weights to every rollout engine as ``version``."""
        self.mode.pause()
        self.publisher.publish(version)

    def send_weights(self) -> None:
        """Send the newest weights."""
        with self.journal.phase("weights"):
            self.publish(self.progress.weight_version)

    def remember(self) -> None:
        """Keep the driver's state as it is now, after a finished step, for its checkpoint."""
        self.state = {"progress": self.progress.state(), "prompts": self.mode.position(self.progress.step)}

    def commit_if_due(self, *, at_once: bool = False) -> None:
        """Commit the step that was just finished if it is due, or ``at_once``; after the last one, write ``final/`` too."""
        step = self.progress.step
        if at_once or step == self.config.steps or self.checkpoints.schedule.is_due(step):
            with self.journal.phase("checkpoint"):
                self.save_checkpoint()
                if at_once:
                    self.checkpoints.settle()

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

    def measure_start(self) -> None:
        """Take the answers of the starting policy, or read them where the run had begun before."""
        with self.journal.phase("evaluation", "first evaluation"):
            self.evaluation.measure_start(resumed=self.progress.step > 0)

    def check(self) -> None:
        """Run the start-up self-check on a few training prompts, which do not count as used."""
        prompts = self.checked_prompts()
        with self.journal.phase("evaluation", "self-check"):
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
        with self.journal.phase("evaluation", "self-check"):
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

    def evaluate(self) -> None:
        """Measure and log the policy on the way."""
        self.compare()

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
        self.carry_on_with(self.save_checkpoint)
        run, step = self.run_directory, self.progress.step
        with closing(run, step, "the last evaluation"):
            epochs = self.prompts.account(run.ledger)
            get_logger("ppo").info("prompts: %d epochs complete, each prompt used once in each", epochs)
            self.carry_on_with(self.compare_last)
        with closing(run, step, "the report"):
            self.journal.finish()
        get_logger("ppo").info("done: %s", run.path)

    def compare_last(self) -> None:
        """Measure, log and keep the final policy against the start."""
        comparison = self.compare()
        if comparison is not None:
            self.journal.keep_comparison(
                *summarize_comparison(comparison, self.config.algorithm.name, self.config.evaluation.pass_at)
            )
