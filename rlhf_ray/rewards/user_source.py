"""The reward source of a user's own: made from its name, and checked whenever it is asked.

Invariants:

- It answers every sample with one :class:`ScoreResult`.
- An exception that it raises is a failure of the source and never a reward. It is asked again while ``reward.hold_s`` lasts,
  unless waiting cannot mend the exception.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rlhf_ray.config.sections.rewards import RewardSourceConfig
from rlhf_ray.errors import GroupError, RequestError, ScoringError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import RewardSource, compares
from rlhf_ray.transient import may_pass
from rlhf_ray.user_code import REWARD_SOURCES, accepts, attribute_of, check_parameters, construct, load_object


class UserRewardSource:
    """A reward source of a user's own, whose results are checked."""

    def __init__(self, key: str, name: str, source: RewardSource) -> None:
        self.where = f"{key}.source {name!r}"
        self.source = source
        self.reads = source.reads
        self.compares = compares(source)

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample."""
        pending = self._ask(samples)
        return Pending(lambda: self._checked(pending, len(samples)))

    def _ask(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        with self._failures():
            pending = self.source.score(samples)
        if not isinstance(pending, Pending):
            raise RequestError(
                f"{self.where}: score returned {type(pending).__name__}, not Pending: return Pending.done(results), or "
                "Pending(function) for results that are on their way"
            )
        return pending

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Make a :class:`ScoringError` of what the user's program raises: it fails in its own ways."""
        try:
            yield
        except (ScoringError, GroupError):
            raise
        except (Exception, SystemExit) as error:
            raise ScoringError(f"{self.where} raised {error!r}", may_pass=may_pass(error)) from error

    def _checked(self, pending: Pending[list[ScoreResult]], count: int) -> list[ScoreResult]:
        with self._failures():
            results = pending.result()
        if not isinstance(results, list) or len(results) != count:
            size = f" of {len(results)}" if isinstance(results, list) else ""
            raise RequestError(
                f"{self.where}: it gave {type(results).__name__}{size} for {count} samples, not a list of {count}"
            )
        wrong = next((result for result in results if not isinstance(result, ScoreResult)), None)
        if wrong is not None:
            raise RequestError(
                f"{self.where}: {wrong!r} is not a ScoreResult: return ScoreResult.of(number) or ScoreResult.failed(reason)"
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
            f"{where} {name!r}: it makes {type(source).__name__}, which is not a reward source: give it an attribute reads (in "
            "words, what it reads of a sample) and a method score(self, samples)"
        )
    close = attribute_of(source, "close")
    if callable(close):
        cleanup.callback(close)
    return UserRewardSource(key, name, source)


def check_user_source(key: str, settings: RewardSourceConfig) -> None:
    """Refuse a source that cannot be loaded or does not take its parameters, before anything is started."""
    if settings.source is not None:
        where = f"{key}.source"
        source = _load_source(where, settings.source)
        check_parameters(where, settings.source, source, settings.parameters, ("tokenizer",))


def _load_source(where: str, name: str) -> Any:
    return load_object(where, name, group=REWARD_SOURCES, kind="class")
