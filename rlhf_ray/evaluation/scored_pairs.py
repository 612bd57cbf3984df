"""The scores of a reward model on held-out pairs, and every figure that is computed from them.

Invariants:

- A figure is a mean over single pairs, or for scores over single sequences, however the scores were batched.
- Pairs that are ties by their labels count in no accuracy, margin or calibration.
- A figure that is undefined is left out, never 0.
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
    """One entry per pair in every field.

    ``chosen`` and ``rejected`` are scores, ``chosen_length`` and ``rejected_length`` count the tokens of the answers,
    ``sources`` says where a pair comes from, and ``decided`` whether one of its sides is better at all.
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
        """Check and convert the columns; without ``decided`` every pair has a better side.

        Raises ``RequestError`` where their sizes differ, and ``NumericalError`` for a score that is not finite.
        """
        scores = finite_scores(chosen, "chosen"), finite_scores(rejected, "rejected")
        columns = [np.asarray(one, dtype=np.float64) for one in (loss, chosen_length, rejected_length)]
        has_better_side = (
            np.ones(len(scores[0]), dtype=np.bool_) if decided is None else np.asarray(decided, dtype=np.bool_)
        )
        sizes = {len(one) for one in (*scores, *columns, sources, has_better_side)}
        if len(sizes) != 1:
            raise RequestError(
                f"the columns of scored pairs have {', '.join(map(str, sorted(sizes)))} entries: give one per pair"
            )
        return cls(scores[0], scores[1], columns[0], columns[1], columns[2], tuple(sources), has_better_side)

    def __len__(self) -> int:
        return len(self.chosen)

    @cached_property
    def margin(self) -> Floats:
        """Chosen minus rejected score of each pair."""
        return self.chosen - self.rejected

    @cached_property
    def scores(self) -> Floats:
        """The scores of all sequences."""
        return np.concatenate([self.chosen, self.rejected])

    def figures(self) -> dict[str, float]:
        """Return all figures, by name."""
        figures = {
            "pairs": float(len(self)),
            "loss": float(self.loss.mean()),
            "tie_rate": tie_rate(self.chosen, self.rejected),
            "score_mean": float(self.scores.mean()),
            "score_std": float(self.scores.std()),
        }
        for side, scores in (("chosen", self.chosen), ("rejected", self.rejected)):
            figures |= {f"{side}_mean": float(scores.mean()), f"{side}_std": float(scores.std())}
        if self.decided.any():
            chosen, rejected = self.chosen[self.decided], self.rejected[self.decided]
            figures |= {
                "accuracy": accuracy(chosen, rejected),
                "margin": float((chosen - rejected).mean()),
                "calibration_error": calibration_error(chosen, rejected),
            }
        lengths = np.concatenate([self.chosen_length, self.rejected_length])
        correlations = {
            "length_correlation": correlation(self.scores, lengths),
            "length_correlation_in_pairs": correlation(self.margin, self.chosen_length - self.rejected_length),
        }
        return figures | {name: value for name, value in correlations.items() if value is not None}

    def calibration(self) -> list[CalibrationBin]:
        """Return the bins behind the calibration error; none where no pair has a better side."""
        return calibration_bins(self.chosen[self.decided], self.rejected[self.decided]) if self.decided.any() else []

    def by_source(self) -> dict[str, ScoredPairs]:
        """Return the pairs of each source, the largest source first."""
        places: dict[str, list[int]] = {}
        for place, source in enumerate(self.sources):
            places.setdefault(source, []).append(place)
        return {source: self.take(rows) for source, rows in sorted(places.items(), key=lambda item: -len(item[1]))}

    def worst(self, count: int) -> list[int]:
        """Return the rows of the pairs that are most wrong, the worst first; ties and pairs that are right are left out."""
        wrong = np.flatnonzero(self.decided & (self.margin <= 0))
        return [int(place) for place in wrong[np.argsort(self.margin[wrong], kind="stable")][:count]]

    def take(self, rows: Sequence[int]) -> ScoredPairs:
        """Return the pairs of these rows."""
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
    """Return Pearson's correlation, or None where one of the two never changes."""
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one * one).sum() * (other * other).sum()))
    return float((one * other).sum() / size) if size > 0.0 else None


def histogram(series: Mapping[str, Floats], bins: int = 30) -> tuple[list[float], dict[str, list[float]]]:
    """Return the edges of ``bins`` equal bins over all values, and for each series the share of its values in each bin."""
    values = np.concatenate(list(series.values()))
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    shares = {name: (np.histogram(own, edges)[0] / max(len(own), 1)).tolist() for name, own in series.items()}
    return edges.tolist(), shares
