"""Collect the samples of a step: take prompts, have the rollout engines answer them, and choose what to learn from.

Invariants:
- Each epoch gives out every prompt exactly once, or as often as the weight of its file says, in an order that depends on the
  seed alone. The state of the stream is all that a resumed run needs to go on with the very next prompt.
- No two requests of a call share a name, even if an epoch ends inside a step and a prompt comes twice.
- Requests have seeds in deterministic mode only, because a seed costs the engine its fast sampler.
- The ledger counts every prompt that was taken once, also one whose samples are left out.
- No token is older than the bound (``PpoConfig.max_staleness``), and a step has samples of at most ``batch.prompts_per_step``
  prompts.
- A collector of a user's own is held to all of this at every step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from rlhf_ray.algorithms.group_baselines import without_signal
from rlhf_ray.algorithms.masked import count_actions
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.data.order import Part, ShuffledOrder
from rlhf_ray.environments.episodes import EpisodePlayer
from rlhf_ray.errors import MissingColumnError, RequestError, StaleWeightsError
from rlhf_ray.rollout.fleet import Fleet, Pump
from rlhf_ray.rollout.requests import NO_VERSION, GenerationRequest, make_requests
from rlhf_ray.runs.ledger import Ledger
from rlhf_ray.trainers.ppo.experience import Experience, ScoredSamples
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.user_code import COLLECTORS, accepts, attribute_of, check_parameters, construct, load_object

COLLECTOR_KEY = "algorithm.collector"
COLLECTED_COLUMNS = (
    "action_mask", "weight_version", "rollout_log_probs", "prompt_id", "sample_index", "finish_reason",
)  # fmt: skip
"""Columns that the samples of a step must have, beside their tokens."""
FROM_THE_RUN = ("config", "prompts", "sampler", "experience")
"""Parameters of a constructor that the run fills in."""

HELD_OUT = -1
"""Stands for the step in the seeds of held-out samples; no training step has this number."""

Phase = Callable[[str], AbstractContextManager[None]]
"""Times a ``with`` block under a name."""


class PromptStream:
    """All training prompts, shuffled anew for each epoch, without end."""

    def __init__(self, prompts: Sequence[TokenizedPrompt], parts: Sequence[Part], seed: int) -> None:
        self._prompts = prompts
        self._parts = parts
        self._order = ShuffledOrder(seed, parts)

    def take(self, count: int) -> list[TokenizedPrompt]:
        """The next ``count`` prompts; no prompt is among them twice unless an epoch ends in between."""
        return [self._prompts[index] for index in self._order.take(count)]

    def peek(self, count: int) -> list[TokenizedPrompt]:
        """The first ``count`` prompts of the data; they do not count as used."""
        return list(self._prompts[:count])

    def account(self, ledger: Ledger) -> int:
        """The number of complete epochs; raises :class:`IntegrityError` if one used a prompt more often than it should."""
        return ledger.verify([prompt.prompt_id for prompt in self._prompts], self._parts)

    def state(self) -> dict[str, Any]:
        """The position in the stream as plain JSON, for a checkpoint."""
        return self._order.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a position that :meth:`state` returned."""
        self._order = ShuffledOrder.from_state(state, self._parts)


class Sampler:
    """Has the rollout engines of a run answer prompts."""

    def __init__(self, config: PpoConfig, fleet: Fleet, player: EpisodePlayer | None = None) -> None:
        """``player`` plays on after the first answer, where the run has an environment."""
        self.config = config
        self.fleet = fleet
        self.player = player

    def generate(self, prompts: Sequence[TokenizedPrompt], step: int) -> TrajectoryBatch:
        """``batch.samples_per_prompt`` answers to each prompt, for training step ``step``; none to one that was set aside."""
        return self._generate(prompts, self.config.batch.samples_per_prompt, step)

    def pump(self) -> Pump:
        """What keeps the engines sampling, in the place of calls for whole steps."""
        rollout = self.config.rollout
        return Pump(self.fleet, timeout_s=rollout.timeout_s, at_once=rollout.max_num_seqs)

    def requests(self, prompt: TokenizedPrompt, number: int) -> list[GenerationRequest]:
        """Requests for ``batch.samples_per_prompt`` answers to the prompt that is taken as ``number``."""
        samples = self.config.batch.samples_per_prompt
        requests = make_requests(
            [(prompt.prompt_id, prompt.token_ids)],
            samples_per_prompt=samples,
            max_new_tokens=self.config.rollout.max_new_tokens,
        )
        return [replace(request, sample_index=number * samples + request.sample_index) for request in requests]

    def held_out(self, prompts: Sequence[TokenizedPrompt], samples: int, greedy: bool) -> TrajectoryBatch:
        """``samples`` answers to each held-out prompt, sampled, or greedy ones: the likeliest token each time."""
        trajectories = self._generate(prompts, samples, HELD_OUT, greedy=greedy)
        self.fleet.refuse_empty(trajectories)
        return trajectories

    def _generate(
        self, prompts: Sequence[TokenizedPrompt], samples: int, step: int, *, greedy: bool = False
    ) -> TrajectoryBatch:
        times = Counter(prompt.prompt_id for prompt in prompts)
        unique = {prompt.prompt_id: prompt for prompt in prompts}
        requests = [
            request
            for prompt_id, prompt in unique.items()
            for request in make_requests(
                [(prompt_id, prompt.token_ids)],
                samples_per_prompt=samples * times[prompt_id],
                max_new_tokens=self.config.rollout.max_new_tokens,
                run_seed=self.config.run.seed if self.config.run.deterministic else None,
                step=step,
                greedy=greedy,
            )
        ]
        generate = partial(self.fleet.generate, deadline_s=self.config.rollout.timeout_s)
        if self.player is None:
            return generate(requests)
        return self.player.play(requests, unique, generate, run_seed=self.config.run.seed, step=step)


@dataclass(frozen=True)
class Collected:
    """The samples of one step, with their scores if these were needed to choose them."""

    prompts: list[TokenizedPrompt]
    """All prompts that were taken from the stream, also those whose samples are left out."""
    trajectories: TrajectoryBatch
    scored: ScoredSamples | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the mode of the run measured while it collected them."""

    @property
    def by_id(self) -> dict[int, TokenizedPrompt]:
        """The prompts by their ids."""
        return {prompt.prompt_id: prompt for prompt in self.prompts}


class Collector(Protocol):
    """A way to collect the samples of a step."""

    def collect(self, step: int, version: int, phase: Phase) -> Collected:
        """The samples of ``step``, counted from 0; ``version`` is that of the current weights."""


@dataclass(frozen=True)
class FixedSampling:
    """Take the prompts of a step, sample answers to each, and learn from all of them."""

    config: PpoConfig
    prompts: PromptStream
    sampler: Sampler

    def collect(self, step: int, version: int, phase: Phase) -> Collected:
        """Samples of ``batch.prompts_per_step`` prompts."""
        return self.take(self.config.batch.prompts_per_step, step, version, phase)

    def take(self, count: int, step: int, version: int, phase: Phase) -> Collected:
        """Samples of the next ``count`` prompts."""
        prompts = self.prompts.take(count)
        with phase("rollout"):
            trajectories = self.sampler.generate(prompts, step)
            refuse_stale(trajectories, version, self.config)
        return Collected(prompts, trajectories)


@dataclass(frozen=True)
class DynamicSampling:
    """Dynamic sampling (DAPO, Yu et al. 2025): replace prompts whose answers all score the same by further prompts.

    It does so at most ``algorithm.dynamic_sampling`` times, and then learns from what it has. If the answers to no prompt
    differ in score, the step learns from its last samples, by what shaping (DAPO's penalty on long answers, say) and KL make of
    them. Samples without a score are kept: ``reward.on_failure`` decides about them once, at the end.
    """

    fixed: FixedSampling
    experience: Experience

    def collect(self, step: int, version: int, phase: Phase) -> Collected:
        """Samples of up to ``batch.prompts_per_step`` prompts whose answers differ in score."""
        wanted, taken, kept = self.fixed.config.batch.prompts_per_step, list[TokenizedPrompt](), list[Collected]()
        sampled = last = None
        for _ in range(1 + self.fixed.config.algorithm.dynamic_sampling):
            missing = wanted - sum(len(part.prompts) for part in kept)
            if missing == 0:
                break
            sampled = self.fixed.take(missing, step, version, phase)
            taken += sampled.prompts
            if len(sampled.trajectories) == 0:  # each of its prompts was set aside
                continue
            with phase("scoring"):
                scored = self.experience.score_trajectories(sampled.trajectories, sampled.by_id)
            last = replace(sampled, scored=scored)
            kept += [part for part in [keep_informative(last)] if part.prompts]
        assert sampled is not None, "a step has at least one prompt"
        if last is None:
            return replace(sampled, prompts=taken)
        if not kept:
            get_logger("ppo").warning("step %d: all answers to each of %d prompts score the same", step + 1, len(taken))
        return join_collected(taken, kept or [last])


def refuse_stale(batch: TrajectoryBatch, version: int, config: PpoConfig) -> None:
    """Raise :class:`StaleWeightsError` if a token's weights are more than ``config.max_staleness`` versions old."""
    if not bool(batch["action_mask"].any()):
        return
    oldest = int(batch["weight_version"][batch["action_mask"]].min())
    age, bound = version - oldest, config.max_staleness
    if age > bound:
        rollout, key = config.rollout, "algorithm.max_staleness"
        mode = "rollout.window" if rollout.mode == "windowed" else f"rollout.mode {rollout.mode}"
        limit = (
            f"{key} is {bound}"
            if config.algorithm.max_staleness is not None
            else f"{mode} allows {bound}, as {key} is not set"
        )
        raise StaleWeightsError(
            f"a token was sampled by weight version {oldest}, {age} publication(s) ago, and {limit}: set {key} to {age} or "
            "more, or sample again"
        )


def keep_informative(sampled: Collected) -> Collected:
    """The samples of the prompts whose answers differ in score, or of which one has no score."""
    assert sampled.scored is not None
    trajectories, scored = sampled.trajectories, sampled.scored
    rewards = torch.tensor([math.nan if result.reward is None else result.reward for result in scored.results])
    acted = count_actions(trajectories["action_mask"], trajectories.offsets) > 0
    silent = without_signal(rewards, trajectories["prompt_id"], acted)
    rows = (~silent).nonzero()[:, 0].tolist()
    kept = set(trajectories["prompt_id"][~silent].tolist())
    prompts = [prompt for prompt in sampled.prompts if prompt.prompt_id in kept]
    return Collected(prompts, trajectories.select(rows), scored.select(rows))


def join_collected(taken: list[TokenizedPrompt], parts: list[Collected]) -> Collected:
    """The samples of all parts as one step; all prompts of ``taken`` count as used."""
    trajectories = TrajectoryBatch.concatenate([part.trajectories for part in parts])
    return Collected(
        taken, trajectories, ScoredSamples.join([part.scored for part in parts if part.scored is not None])
    )


def make_collector(config: PpoConfig, prompts: PromptStream, sampler: Sampler, experience: Experience) -> Collector:
    """The collector that the config names, which may be a user's own."""
    if config.algorithm.collector is not None:
        return make_user_collector(config, prompts, sampler, experience)
    fixed = FixedSampling(config, prompts, sampler)
    return DynamicSampling(fixed, experience) if config.algorithm.dynamic_sampling else fixed


class RecordedPrompts:
    """The stream of prompts as a user's collector sees it: every prompt that is taken is remembered."""

    def __init__(self, stream: PromptStream) -> None:
        self._stream = stream
        self.taken: list[TokenizedPrompt] = []

    def take(self, count: int) -> list[TokenizedPrompt]:
        """The next ``count`` prompts."""
        prompts = self._stream.take(count)
        self.taken += prompts
        return prompts


class UserCollector:
    """A collector of a user's own, whose samples are checked."""

    def __init__(self, config: PpoConfig, collector: Collector, prompts: RecordedPrompts) -> None:
        self.config = config
        self.collector = collector
        self.prompts = prompts

    def collect(self, step: int, version: int, phase: Phase) -> Collected:
        """One step's samples, checked."""
        self.prompts.taken.clear()
        collected = self.collector.collect(step, version, phase)
        if not isinstance(collected, Collected):
            raise self._refusal(f"collect returned {type(collected).__name__}, not Collected")
        self._check_prompts(collected)
        self._check_samples(collected)
        refuse_stale(collected.trajectories, version, self.config)
        return collected

    def _check_prompts(self, collected: Collected) -> None:
        taken, named = (
            Counter(prompt.prompt_id for prompt in prompts) for prompts in (self.prompts.taken, collected.prompts)
        )
        if taken != named:
            raise self._refusal(
                f"it took {taken.total()} prompts from the stream, but names {named.total()} or others in Collected.prompts: "
                "name every prompt that was taken, also one whose samples are left out"
            )

    def _check_samples(self, collected: Collected) -> None:
        batch = collected.trajectories
        if not isinstance(batch, TrajectoryBatch) or len(batch) == 0:
            raise self._refusal("Collected.trajectories must be a TrajectoryBatch with one sequence or more")
        try:
            batch.require(*COLLECTED_COLUMNS)
        except MissingColumnError as error:
            raise self._refusal(str(error)) from error
        answered = set(batch["prompt_id"].tolist())
        strangers = answered - {prompt.prompt_id for prompt in collected.prompts}
        if strangers:
            raise self._refusal(f"a sample answers prompt {min(strangers)}, which is not among Collected.prompts")
        most = self.config.batch.prompts_per_step
        if len(answered) > most:
            raise self._refusal(f"the samples answer {len(answered)} prompts, more than batch.prompts_per_step {most}")
        if not bool(batch["action_mask"].any()):
            raise self._refusal("no token of its samples is an action, so there is nothing to learn from")
        if bool((batch["weight_version"][batch["action_mask"]] == NO_VERSION).any()):
            raise self._refusal(
                "an action has weight_version -1, which says that no weights sampled it: give it the version of those that "
                "did, or make it no action"
            )
        if collected.scored is not None and len(collected.scored.results) != len(batch):
            raise self._refusal(
                f"Collected.scored has {len(collected.scored.results)} results for {len(batch)} samples"
            )

    def _refusal(self, text: str) -> RequestError:
        return RequestError(f"{COLLECTOR_KEY} {self.config.algorithm.collector!r}: {text}")


def make_user_collector(
    config: PpoConfig, prompts: PromptStream, sampler: Sampler, experience: Experience
) -> UserCollector:
    """The collector that ``algorithm.collector`` names, made with those of ``config``, ``prompts``, ``sampler`` and
    ``experience`` that it asks for.
    """
    name = str(config.algorithm.collector)
    recorded = RecordedPrompts(prompts)
    collector = construct(
        COLLECTOR_KEY,
        name,
        _load_collector(name),
        config.algorithm.parameters.collector,
        config=config,
        prompts=recorded,
        sampler=sampler,
        experience=experience,
    )
    if not accepts(attribute_of(collector, "collect"), "step", "version", "phase"):
        raise RequestError(
            f"{COLLECTOR_KEY} {name!r}: it makes {type(collector).__name__}, which is not a collector: give it a method "
            "collect(self, step, version, phase)"
        )
    return UserCollector(config, collector, recorded)


def check_user_collector(config: PpoConfig) -> None:
    """Refuse a collector that cannot be loaded or does not take its parameters, before anything is started."""
    name = config.algorithm.collector
    if name is not None:
        check_parameters(
            COLLECTOR_KEY, name, _load_collector(name), config.algorithm.parameters.collector, FROM_THE_RUN
        )


def _load_collector(name: str) -> Any:
    return load_object(COLLECTOR_KEY, name, group=COLLECTORS, kind="class")
