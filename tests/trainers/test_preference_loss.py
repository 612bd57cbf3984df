"""The loss of a config is made for pairs that have what it reads, and says what they lack."""

from __future__ import annotations

import pytest

from rlhf_ray.algorithms.rankings import Focal, Hinge, LogExp, Ordinal, Scaled, Sigmoid
from rlhf_ray.config.sections.reward_training import RewardLossConfig
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.errors import DataError
from rlhf_ray.trainers.supervised.preference_loss import make_loss


def pairs(*, margins: tuple[float | None, ...] = (None, None), grades: tuple[float | None, ...] = (None, None)):
    return [PairExample([1, 2], [1, 3], margin, grade) for margin, grade in zip(margins, grades, strict=True)]


@pytest.mark.parametrize(
    ("keys", "ranking"),
    [
        ({}, Sigmoid()),
        ({"name": "logexp"}, LogExp()),
        ({"name": "hinge", "hinge_margin": 0.5}, Hinge(0.5)),
        ({"name": "focal", "focal_gamma": 3.0}, Focal(3.0)),
        ({"name": "scaled"}, Scaled()),
        ({"name": "ordinal"}, Ordinal((0.5, 1.5, 2.5))),
        ({"name": "ordinal", "thresholds": [1.0, 2.0, 5.0, 6.0]}, Ordinal((1.0, 2.0, 5.0, 6.0))),
    ],
)
def test_every_key_of_the_section_reaches_the_loss(keys, ranking) -> None:
    shared = {"label_smoothing": 0.1, "centering": 0.01, "router_balance": 0.02}
    loss = make_loss(RewardLossConfig.model_validate(keys | shared), pairs(margins=(1.0, 2.0), grades=(0.0, 3.0)))
    assert loss.ranking == ranking
    assert {name: getattr(loss, name) for name in shared} == shared


@pytest.mark.parametrize(
    ("keys", "columns", "message"),
    [
        ({"name": "scaled"}, {}, "loss.name scaled reads the margin of each pair, but the rows have none"),
        ({"name": "scaled"}, {"margins": (1.0, -1.0)}, "some are negative"),
        ({"name": "ordinal"}, {"margins": (1.0, 2.0)}, "reads the grade of each pair"),
        ({"name": "ordinal"}, {"grades": (1.0, 0.5)}, r"the grade 0.5 of a pair is not one of 0, 1, 2"),
        ({"name": "ordinal"}, {"grades": (1.0, -1.0)}, r"the grade -1 of a pair is not one of 0, 1, 2"),
        ({"name": "ordinal", "thresholds": [1.0]}, {"grades": (1.0, 2.0)}, "the highest grade of the pairs is 2, but"),
    ],
)
def test_what_the_pairs_lack_is_told_with_the_way_out(keys, columns, message) -> None:
    with pytest.raises(DataError, match=message):
        make_loss(RewardLossConfig.model_validate(keys), pairs(**columns))
