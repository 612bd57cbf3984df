"""``rlhf-ray score``: score a file of items with a reward model on Ray.

Invariants: running the same command again continues an interrupted run; the exit code is 0 only when every row has its line.
A row that kills its reward group gets an error, and the others their scores. Whatever is wrong with the files is told before
Ray starts, and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.ranks import RayRanks
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import EXIT_DONE, ResumableStop
from rlhf_ray.launch.lasting_group import LastingGroup
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.offline import check_rows, input_identity, score_file, score_rows
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rewards.source import Scorer
from rlhf_ray.storage.growing import GrowingFile

if TYPE_CHECKING:
    from rlhf_ray.actors.groups import RewardGroup

ROWS_PER_CALL = 512


def score(config: ServeConfig, source: Path, target: Path, *, truncate: bool) -> int:
    """Score every row of ``source`` with ``config.reward`` into ``target``."""
    model = config.reward.model
    about = {
        "model": model.model_dump(),
        "files": model_files(model.path),
        "form": config.reward.form,
        "scored_token": config.reward.scored_token,
        "max_tokens": config.max_tokens,
        "truncate": truncate,
    }
    with _resumable(target), GrowingFile(target, {**input_identity(source), **about}, [source]) as output:
        if output.done:
            get_logger().info("%s: %d rows are scored already; continuing after them", target, output.done)
        check_rows(source)
        with Cluster.for_job(config, together=True) as cluster, _resumable(target):
            scorer = load_scorer(cluster, config)
            failed = score_file(source, output, scorer, chunk=ROWS_PER_CALL, truncate=truncate)
    if failed.rows:
        get_logger().warning(
            "%s: %d rows have an error instead of a score, such as %s", target, failed.rows, failed.first
        )
    return EXIT_DONE


@contextmanager
def _resumable(target: Path) -> Iterator[None]:
    """Turn an interrupt into a :class:`ResumableStop`: each line is on disk as soon as it is written."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise ResumableStop(
            f"stopped on request; the rows that have their scores are kept in {target}, and the same command goes on after them"
        ) from error


def score_items(config: ServeConfig, rows: Sequence[Mapping[str, Any]], *, truncate: bool) -> list[ScoreResult]:
    """The result of every row, in order; nothing is written."""
    results: list[ScoreResult] = []
    with Cluster.for_job(config, together=True) as cluster:
        scorer = load_scorer(cluster, config)
        for start in range(0, len(rows), ROWS_PER_CALL):
            results += score_rows(rows[start : start + ROWS_PER_CALL], scorer, truncate=truncate).result()
    return results


def model_files(model: str | None) -> Mapping[str, Any]:
    """Sizes and times of the model's files: they change when other files take the same names."""
    directory = Path(model or "")
    files = sorted(directory.iterdir()) if model and directory.is_dir() else []
    statuses = {file.name: file.stat() for file in files if file.exists()}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in statuses.items()}


def load_scorer(cluster: Cluster, config: ServeConfig) -> Scorer:
    from rlhf_ray.actors.place import place_scoring_group

    numbers = count(1)

    def start(failed: RewardGroup | None) -> RewardGroup:
        if failed is not None:
            assert isinstance(failed.ranks, RayRanks), "the cluster started them"
            cluster.stop(failed.ranks)
        number = next(numbers)  # names of actors that end are free only a moment later
        name = None if number == 1 else f"reward-{number}"
        return place_scoring_group(cluster, config, config.reward, name=name).load().result()

    lasting = LastingGroup(start)
    return _Normalising(lasting, lasting.group.describe().result())


class _Normalising:
    """A reward group that also normalises its results if the model's directory has a mean and a std."""

    def __init__(self, group: Scorer, described: Mapping[str, Any]) -> None:
        mean, std = described["mean"], described["std"]
        self._group, self._statistics = group, (0.0, 1.0) if mean is None else (mean, std)

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        """Return one result per request, in order."""
        return self._group.score(requests).then(
            lambda results: [result.normalised(*self._statistics) for result in results]
        )
