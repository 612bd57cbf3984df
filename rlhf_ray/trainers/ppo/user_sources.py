"""The reward source and the collector of a user's own: made from their names, and checked whenever they are asked.

Invariants:

- A source answers every sample with one :class:`ScoreResult`; an exception that it raises is a failure of the source, which
  is asked again while ``reward.hold_s`` lasts, and never a reward.
- A collector names every prompt that it took from the stream, each as often as it took it, so that an epoch uses every prompt
  once also after a resume; its samples answer those prompts only, and none of their tokens is too old.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.config.sections.rewards import RewardSourceConfig
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.errors import MissingColumnError, RequestError, RlhfRayError, ScoringError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import RewardSource
from rlhf_ray.trainers.ppo.experience import Experience
from rlhf_ray.trainers.ppo.sampling import Collected, Collector, Phase, PromptStream, Sampler, refuse_stale
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.user_code import COLLECTORS, REWARD_SOURCES, accepts, check_parameters, construct, load_object

COLLECTOR_KEY = "algorithm.collector"
COLLECTED_COLUMNS = (
    "action_mask", "weight_version", "rollout_log_probs", "prompt_id", "sample_index", "finish_reason",
)  # fmt: skip


class UserRewardSource:
    """A reward source of a user's own, whose results are checked."""

    def __init__(self, key: str, name: str, source: RewardSource) -> None:
        self.where = f"{key}.source {name!r}"
        self.source = source
        self.reads = source.reads

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample."""
        pending = self._ask(samples)
        return Pending(lambda: self._checked(pending, len(samples)))

    def _ask(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        try:
            pending = self.source.score(samples)
        except RlhfRayError:
            raise
        except Exception as error:  # the source is the user's program, and fails in its own ways
            raise ScoringError(f"{self.where} raised {error!r}") from error
        if not isinstance(pending, Pending):
            raise RequestError(
                f"{self.where}: score returned {type(pending).__name__}, not Pending: return Pending.done(results), or "
                "Pending(function) for results that are on their way"
            )
        return pending

    def _checked(self, pending: Pending[list[ScoreResult]], count: int) -> list[ScoreResult]:
        try:
            results = pending.result()
        except RlhfRayError:
            raise
        except Exception as error:
            raise ScoringError(f"{self.where} raised {error!r}") from error
        if not isinstance(results, list) or len(results) != count:
            size = f" of {len(results)}" if isinstance(results, list) else ""
            raise RequestError(
                f"{self.where}: it gave {type(results).__name__}{size} for {count} samples, not a list of {count}"
            )
        wrong = next((result for result in results if not isinstance(result, ScoreResult)), None)
        if wrong is not None:
            raise RequestError(
                f"{self.where}: {wrong!r} is no ScoreResult: return ScoreResult.of(number) or ScoreResult.failed(reason)"
            )
        return results


def make_user_source(key: str, settings: RewardSourceConfig, tokenizer: Any, cleanup: ExitStack) -> UserRewardSource:
    """The source that ``settings.source`` names, made with ``tokenizer`` where it asks for it; ``cleanup`` closes it."""
    name = str(settings.source)
    where = f"{key}.source"
    source = construct(where, name, _load_source(where, name), settings.parameters, tokenizer=tokenizer)
    reads, score = (attribute_of(source, word) for word in ("reads", "score"))
    if not isinstance(reads, str) or not accepts(score, "samples"):
        raise RequestError(
            f"{where} {name!r}: it makes {type(source).__name__}, which is no reward source: give it an attribute reads (in "
            "words, what it reads of a sample) and a method score(self, samples)"
        )
    close = attribute_of(source, "close")
    if callable(close):
        cleanup.callback(close)
    return UserRewardSource(key, name, source)


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
        refuse_stale(collected.trajectories, version, self.config.algorithm.max_staleness)
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
            f"{COLLECTOR_KEY} {name!r}: it makes {type(collector).__name__}, which is no collector: give it a method "
            "collect(self, step, version, phase)"
        )
    return UserCollector(config, collector, recorded)


def check_user_sources(config: PpoConfig) -> None:
    """Refuse a source or a collector that cannot be loaded or does not take its parameters, before anything is started."""
    for key, settings in config.reward.sources.items():
        if settings.source is not None:
            where = f"{key}.source"
            check_parameters(
                where, settings.source, _load_source(where, settings.source), settings.parameters, ("tokenizer",)
            )
    if config.algorithm.collector is not None:
        name = config.algorithm.collector
        provided = ("config", "prompts", "sampler", "experience")
        check_parameters(COLLECTOR_KEY, name, _load_collector(name), config.algorithm.parameters.collector, provided)


def attribute_of(value: Any, name: str) -> Any:
    """The attribute ``name`` of a user's object; None where it has none."""
    return getattr(value, name, None)


def _load_source(where: str, name: str) -> Any:
    return load_object(where, name, group=REWARD_SOURCES, kind="class")


def _load_collector(name: str) -> Any:
    return load_object(COLLECTOR_KEY, name, group=COLLECTORS, kind="class")
