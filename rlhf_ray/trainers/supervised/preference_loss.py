"""Build the preference loss that the config names, for the pairs at hand.

Invariants: a loss is built only if every pair has the numbers that it reads. If the pairs have a number that the loss does
not read, the log says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.algorithms.rankings import Focal, Hinge, LogExp, Ordinal, Ranking, Scaled, Sigmoid
from rlhf_ray.algorithms.reward_losses import RewardLoss
from rlhf_ray.config.sections.reward_training import RewardLossConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.errors import DataError
from rlhf_ray.rows.preferences import PAIR_NUMBERS


def make_loss(config: RewardLossConfig, examples: Sequence[PairExample]) -> RewardLoss:
    """The loss over ``examples``, which include the held-out ones.

    Raises :class:`DataError` if the pairs lack a number that the loss reads, or have one that it cannot use.
    """
    problem = config.number_problem([pair.margin for pair in examples], [pair.grade for pair in examples])
    if problem:
        raise DataError(problem)
    ranking = _ranking(config, examples)
    present = [name for name in PAIR_NUMBERS if all(getattr(pair, name) is not None for pair in examples)]
    unread = [name for name in present if name != ranking.reads]
    if unread:
        get_logger("data").info("the loss %s does not read the pairs' %s", config.name, " and ".join(unread))
    return RewardLoss(ranking, config.label_smoothing, config.centering, config.router_balance)


def _ranking(config: RewardLossConfig, examples: Sequence[PairExample]) -> Ranking:
    if config.name == "ordinal":
        return Ordinal(_thresholds(config, [pair.grade for pair in examples if pair.grade is not None]))
    plain: dict[str, Ranking] = {
        "sigmoid": Sigmoid(),
        "logexp": LogExp(),
        "hinge": Hinge(config.hinge_margin),
        "focal": Focal(config.focal_gamma),
        "scaled": Scaled(),
    }
    return plain[config.name]


def _thresholds(config: RewardLossConfig, grades: Sequence[float]) -> tuple[float, ...]:
    """One threshold for each grade: those of the config, or 0.5, 1.5, ... below the highest grade."""
    if config.thresholds is not None:
        return tuple(config.thresholds)
    return tuple(grade + 0.5 for grade in range(max(int(max(grades, default=1)), 1)))
