"""Every cell of the table of architectures is right or refused by check, the page says of each what the code does, and the page
names every architecture that transformers knows.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker
from rlhf_ray.config.files.architectures import NOT_IN_VLLM, NOT_RUN, SERVED_BY_VLLM
from rlhf_ray.config.files.encoders import ENCODERS
from rlhf_ray.config.files.sampled import sampling_refusal
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.rewards.request import ScoreRequest
from tests.architectures.cells import Architecture, outcome
from tests.architectures.configs import POSITIONS, model_types
from tests.architectures.table import BEGIN, END, PAGE, verdict

CELLS = ("scoring", "training", "LoRA", "export")
TRIED = {
    "gpt2": ("right",) * 4,
    "opt": ("right",) * 4,
    "phi3": ("right",) * 4,
    "gemma3": ("right",) * 4,
    "gemma4_text": ("right", "right", "right", "by this project alone"),
    "qwen3_moe": ("right",) * 4,
    "phimoe": ("right",) * 4,
    "nanochat": ("right", "right", "right", "by this project alone"),
    "granitemoehybrid": ("right", "right", "right", "by this project alone"),
    "deberta-v2": ("right", "refused", "refused"),
    "modernbert": ("right", "refused", "refused"),
    "stablelm": ("refused",) * 4,
}


@pytest.mark.parametrize("model_type", TRIED)
def test_twelve_architectures(model_type: str, tmp_path: Path) -> None:
    one = Architecture(model_type, tmp_path / "model")
    cells = [cell for cell in CELLS if one.has(cell)]
    assert tuple(verdict(cell, outcome(one, cell)) for cell in cells) == TRIED[model_type]


def rows() -> dict[str, list[str]]:
    """The cells of each row of the page's tables; of the last one, the reason for each architecture that it names."""
    page = PAGE.read_text()
    between = page[page.index(BEGIN) : page.index(END)]
    table: dict[str, list[str]] = {}
    for line in between.splitlines():
        first, *cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if first.startswith("`"):
            table.setdefault(first.strip("`"), []).extend(cells)  # a mixture of experts is in two tables
        elif first in NOT_RUN:
            table |= {name.strip("` *"): [first] for name in cells[0].split(",")}
    return table


def test_the_page_names_every_architecture_and_says_what_check_does() -> None:
    table = rows()
    assert table.keys() == set(model_types())
    for reason, kinds in NOT_RUN.items():
        assert all(table[kind] == [reason] for kind in kinds)
    for kind, cells in table.items():
        assert not any(cell.startswith(("WRONG", "error", "not made")) for cell in cells), kind
        if kind in TRIED and len(cells) > 1:
            shown = cells[:4] if kind not in ENCODERS else cells[:1]
            assert tuple(shown) == TRIED[kind][: len(shown)], kind
        if kind in NOT_IN_VLLM and len(cells) > 1:
            assert cells[min(len(cells), 5) - 1] == "refused", kind
        if len(cells) == 6 and sampling_refusal({"model_type": kind}, on_cpu=True):
            assert cells[5] == "refused", kind
    assert sum(cells[5:] == ["right"] for cells in table.values()) > 12, "most mixtures of experts are sampled from"
    assert len(table) - sum(len(kinds) for kinds in NOT_RUN.values()) > 80, "most architectures of today run"
    assert {kind for kinds in NOT_RUN.values() for kind in kinds} >= SERVED_BY_VLLM


def test_an_item_beyond_learned_positions_has_an_error_and_the_others_their_scores(tmp_path: Path) -> None:
    one = Architecture("gpt2", tmp_path / "model")
    group = RewardGroup(InProcessRanks("reward", RewardWorker()))
    role = ScoringRole(model=ModelConfig(path=str(one.directory), dtype="fp32"))
    group.setup(RewardSetup(role, seed=0, max_item_tokens=4096), timeout_s=60.0).result()
    lengths = (POSITIONS, 5, POSITIONS + 1)
    results = group.score(
        [ScoreRequest(token_ids=tuple(3 + i % 50 for i in range(length))) for length in lengths]
    ).result()
    assert [result.raw is not None for result in results] == [True, True, False]
    assert results[2].fault == "item" and results[2].error == (
        f"the item has {POSITIONS + 1} tokens, the limit is {POSITIONS}: shorten it, or ask for truncate"
    )
