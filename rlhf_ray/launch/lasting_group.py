"""A reward group that scores to the end: another takes its place where its processes die.

Invariants: every request ends in one result, in order; an item that kills its group wherever it is scored costs only itself
its score; a group that fails on everything is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from rlhf_ray.console import get_logger
from rlhf_ray.errors import GroupError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import PROBE, ScoreRequest, ScoreResult


class LastingGroup:
    """Scores with a group, and with others after it.

    ``start`` makes one ready, in the place of the one that failed if that is given.
    """

    def __init__(self, start: Callable[[Any], Any]) -> None:
        self._start = start
        self.group: Any = start(None)

    def describe(self) -> Pending[dict[str, Any]]:
        """What the reward model says of itself."""
        described: Pending[dict[str, Any]] = self.group.describe()
        return described

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        """Return one result per request, in order."""
        group = self.group
        scored = group.score(requests)
        return Pending(lambda: self._outcome(requests, group, scored.result))

    def _outcome(
        self, requests: Sequence[ScoreRequest], group: Any, wait: Callable[[], list[ScoreResult]]
    ) -> list[ScoreResult]:
        """What ``wait`` returns; where ``group`` fails, what others give, to the whole once more and then to halves."""
        try:
            return wait()
        except GroupError as error:
            get_logger().error("%s: it is started again", str(error).partition("\n")[0])
            self._replace(group)
            if len(requests) == 1:
                return [self._alone(requests[0], error)]
        middle = len(requests) // 2
        return [*self._again(requests[:middle]), *self._again(requests[middle:])]

    def _again(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        group = self.group
        return self._outcome(requests, group, lambda: group.score(requests).result())

    def _alone(self, request: ScoreRequest, before: GroupError) -> ScoreResult:
        """The result of an item that a group died with: another one decides whether it died of it."""
        try:
            (result,) = self.group.score([request]).result()
            return cast(ScoreResult, result)
        except GroupError as error:
            self._replace(self.group)
            self.group.score([PROBE]).result()  # raises where the group fails on everything
            return ScoreResult.failed(f"the reward group fails on this item: {error.cause.partition(chr(10))[0]}")

    def _replace(self, failed: Any) -> None:
        if self.group is failed:  # else another chunk has had it replaced meanwhile
            self.group = self._start(failed)
