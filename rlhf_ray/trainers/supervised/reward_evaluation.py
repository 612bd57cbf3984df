"""Score held-out pairs with a reward model or a policy in training, and show the results in the report.

Invariants: packs do not depend on the number of ranks, so no figure does, to the last bit. Every figure is computed here on
the driver, over all pairs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from rlhf_ray.actors.groups import Group, RewardGroup, SharedBatch
from rlhf_ray.algorithms.reward_losses import find_decided_pairs
from rlhf_ray.console import progress
from rlhf_ray.data.batches import make_pair_batch
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.evaluation.scored_pairs import ScoredPairs, histogram
from rlhf_ray.monitoring.report.summary import PreferencePage, Table
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import Schedule, deal_packs

SHOWN_CHARACTERS = 400
"""In the table of the worst pairs: so much of a prompt's end and of an answer's beginning."""
PAIRS_PER_CALL = 1024
"""Progress shows between calls, and each call has its own deadline."""


class PairLoss(Protocol):
    """A loss of pairs that depends on the difference of the scores of both sides."""

    def per_pair(self, difference: torch.Tensor, batch: TrajectoryBatch) -> torch.Tensor:
        """(P,) the loss of each pair of ``batch``."""


class HeldOutPairs:
    """Held-out pairs, which are scored as often as needed; their batches are made and shared with the ranks once."""

    def __init__(
        self,
        group: Group,
        pairs: Sequence[PairExample],
        loss: PairLoss,
        max_tokens: int,
        *,
        make_batch: Callable[[Sequence[PairExample]], TrajectoryBatch] = make_pair_batch,
        score: Callable[[SharedBatch, Schedule], torch.Tensor] | None = None,
    ) -> None:
        """``score`` gives (B,) scores of a batch that ``make_batch`` made; by default they are those of a reward group."""
        self.pairs, self.loss = pairs, loss
        self.batch = make_batch(pairs)
        if score is None:
            assert isinstance(group, RewardGroup), "only reward models score by themselves"
            score = _scores_of(group)
        self._score = score
        self._parts = []
        for start in range(0, len(pairs), PAIRS_PER_CALL):
            part = make_batch(pairs[start : start + PAIRS_PER_CALL])
            schedule = deal_packs(part.lengths.tolist(), ranks=group.size, max_tokens=max_tokens, unit=2)
            self._parts.append((group.share(part), schedule))
        self.scored: ScoredPairs | None = None

    def figures(self, *, show_progress: bool = False) -> dict[str, float]:
        """Score all pairs with the model as it is now; returns the figures by their metric names."""
        parts = progress(self._parts, f"scored, {PAIRS_PER_CALL} pairs a call") if show_progress else self._parts
        scores = torch.cat([self._score(*part) for part in parts]).double()
        chosen, rejected = scores[0::2], scores[1::2]
        self.scored = ScoredPairs.from_columns(
            chosen.numpy(),
            rejected.numpy(),
            loss=self.loss.per_pair(chosen - rejected, self.batch).numpy(),
            chosen_length=[len(pair.chosen) - pair.prompt_length for pair in self.pairs],
            rejected_length=[len(pair.rejected) - pair.prompt_length for pair in self.pairs],
            sources=[pair.source for pair in self.pairs],
            decided=find_decided_pairs(self.batch).numpy(),
        )
        return {f"evaluation/{name}": value for name, value in self.scored.figures().items()}

    def page(self, tokenizer: Any, worst: int, probes: Table | None) -> PreferencePage:
        """What the report shows of the last scores: charts, sources, the ``worst`` worst pairs, and ``probes``."""
        assert self.scored is not None, "call figures() before page()"
        edges, shares = histogram({"chosen": self.scored.chosen, "rejected": self.scored.rejected})
        return PreferencePage(
            calibration=tuple((bin.confidence, bin.accuracy, bin.count) for bin in self.scored.calibration()),
            edges=tuple(edges),
            histograms={side: tuple(column) for side, column in shares.items()},
            sources=source_table(self.scored),
            worst=self._worst(tokenizer, worst),
            probes=probes,
        )

    def _worst(self, tokenizer: Any, count: int) -> Table:
        assert self.scored is not None
        rows = []
        for index in self.scored.worst(count):
            pair = self.pairs[index]
            prompt = tokenizer.decode(pair.chosen[: pair.prompt_length])[-SHOWN_CHARACTERS:]
            answers = (tokenizer.decode(side[pair.prompt_length :]) for side in (pair.chosen, pair.rejected))
            scores = (self.scored.margin[index], self.scored.chosen[index], self.scored.rejected[index])
            rows.append(
                (
                    *(f"{score:.2f}" for score in scores),
                    pair.source,
                    prompt,
                    *(answer[:SHOWN_CHARACTERS] for answer in answers),
                )
            )
        headers = ("margin", "chosen", "rejected", "source", "prompt (its end)", "chosen answer", "rejected answer")
        return Table(headers, tuple(rows))


def _scores_of(group: RewardGroup) -> Callable[[SharedBatch, Schedule], torch.Tensor]:
    return lambda shared, schedule: group.scores(shared, schedule).result()


def source_table(scored: ScoredPairs) -> Table:
    """Figures of each data source, the largest first, and of all pairs."""
    headers = ("source", "pairs", "accuracy", "margin", "loss", "calibration error", "tie rate")
    keys = ("pairs", "accuracy", "margin", "loss", "calibration_error", "tie_rate")
    named = {source or "(no source)": part for source, part in scored.by_source().items()}
    parts = named if len(named) == 1 else {**named, "all": scored}
    rows = []
    for source, part in parts.items():
        figures = part.figures()
        cells = (f"{figures[key]:.0f}" if key == "pairs" else _cell(figures.get(key)) for key in keys)
        rows.append((source, *cells))
    return Table(headers, tuple(rows))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
