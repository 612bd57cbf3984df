"""What a reward model said of held-out pairs, and every figure of it.

Always true: a figure is a mean over single pairs (or, of scores, over single sequences), whoever computed the scores and in
whatever batches; pairs that are ties by their labels count in no accuracy, margin or calibration; a figure that is not
defined is left out, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_ray.errors import RequestError
from rlhf_ray.evaluation.calibration import CalibrationBin, calibration_bins, calibration_error
from rlhf_ray.evaluation.preferences import accuracy, finite_scores, tie_rate

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ScoredPairs:
    """Both scores of each pair, its loss, the lengths of its answers in tokens, where it comes from, and whether it has a
    better side at all.
    """

    chosen: Floats
    rejected: Floats
    loss: Floats
    chosen_length: Floats
    rejected_length: Floats
    sources: tuple[str, ...]
    decided: NDArray[np.bool_]

    @classmethod
    def from_columns(
        cls,
        chosen: ArrayLike,
        rejected: ArrayLike,
        *,
        loss: ArrayLike,
        chosen_length: ArrayLike,
        rejected_length: ArrayLike,
        sources: Sequence[str],
        decided: ArrayLike | None = None,
    ) -> ScoredPairs:
        """One entry a pair in each; all pairs have a better side where ``decided`` is left out."""
        scores = finite_scores(chosen, "chosen"), finite_scores(rejected, "rejected")
        columns = [np.asarray(one, dtype=np.float64) for one in (loss, chosen_length, rejected_length)]
        whole = np.ones(len(scores[0]), dtype=np.bool_) if decided is None else np.asarray(decided, dtype=np.bool_)
        sizes = {len(one) for one in (*scores, *columns, sources, whole)}
        if len(sizes) != 1:
            raise RequestError(
                f"the columns of scored pairs have {', '.join(map(str, sorted(sizes)))} entries: give one a pair"
            )
        return cls(scores[0], scores[1], columns[0], columns[1], columns[2], tuple(sources), whole)

    def __len__(self) -> int:
        return len(self.chosen)

    @cached_property
    def margin(self) -> Floats:
        """Chosen minus rejected, pair by pair."""
        return self.chosen - self.rejected

    @cached_property
    def scores(self) -> Floats:
        """The scores of all sequences."""
        return np.concatenate([self.chosen, self.rejected])

    def figures(self) -> dict[str, float]:
        """All figures, by name."""
        found = {
            "pairs": float(len(self)),
            "loss": float(self.loss.mean()),
            "tie_rate": tie_rate(self.chosen, self.rejected),
            "score_mean": float(self.scores.mean()),
            "score_std": float(self.scores.std()),
        }
        for side, scores in (("chosen", self.chosen), ("rejected", self.rejected)):
            found |= {f"{side}_mean": float(scores.mean()), f"{side}_std": float(scores.std())}
        if self.decided.any():
            chosen, rejected = self.chosen[self.decided], self.rejected[self.decided]
            found |= {
                "accuracy": accuracy(chosen, rejected),
                "margin": float((chosen - rejected).mean()),
                "calibration_error": calibration_error(chosen, rejected),
            }
        lengths = np.concatenate([self.chosen_length, self.rejected_length])
        correlations = {
            "length_correlation": correlation(self.scores, lengths),
            "length_correlation_in_pairs": correlation(self.margin, self.chosen_length - self.rejected_length),
        }
        return found | {name: value for name, value in correlations.items() if value is not None}

    def calibration(self) -> list[CalibrationBin]:
        """The bins behind the calibration error; none where no pair has a better side."""
        return calibration_bins(self.chosen[self.decided], self.rejected[self.decided]) if self.decided.any() else []

    def by_source(self) -> dict[str, ScoredPairs]:
        """The pairs of each source, the largest first."""
        places: dict[str, list[int]] = {}
        for place, source in enumerate(self.sources):
            places.setdefault(source, []).append(place)
        return {source: self.take(rows) for source, rows in sorted(places.items(), key=lambda item: -len(item[1]))}

    def worst(self, count: int) -> list[int]:
        """The pairs with a better side whose rejected side wins by most, the worst first; ones that are right are left out."""
        wrong = np.flatnonzero(self.decided & (self.margin <= 0))
        return [int(place) for place in wrong[np.argsort(self.margin[wrong], kind="stable")][:count]]

    def take(self, rows: Sequence[int]) -> ScoredPairs:
        """Some of the pairs."""
        places = np.asarray(rows, dtype=np.int64)
        return ScoredPairs(
            chosen=self.chosen[places],
            rejected=self.rejected[places],
            loss=self.loss[places],
            chosen_length=self.chosen_length[places],
            rejected_length=self.rejected_length[places],
            sources=tuple(self.sources[row] for row in rows),
            decided=self.decided[places],
        )


def correlation(one: Floats, other: Floats) -> float | None:
    """Pearson's; None where one of them never changes."""
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one * one).sum() * (other * other).sum()))
    return float((one * other).sum() / size) if size > 0.0 else None


def histogram(series: Mapping[str, Floats], bins: int = 30) -> tuple[list[float], dict[str, list[float]]]:
    """The edges of ``bins`` equal bins over all values, and for each series the share of its values in each bin."""
    values = np.concatenate(list(series.values()))
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    shares = {name: (np.histogram(own, edges)[0] / max(len(own), 1)).tolist() for name, own in series.items()}
    return edges.tolist(), shares
