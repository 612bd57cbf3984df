"""Requests that begin alike are scored in one pack, with the scores that each has alone, on however many threads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.reward_worker import RewardSetup, RewardWorker
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.rewards.request import ScoreRequest
from tests.serving.reward_models import save_reward_model


def reward_group(worker: RewardWorker, directory: Path, *, max_tokens: int = 4096, threads: int = 1) -> RewardGroup:
    group = RewardGroup(InProcessRanks("reward", worker))
    model, resources = ModelConfig(path=str(directory), dtype="fp32"), ResourcesConfig(threads_per_rank=threads)
    role = RoleConfig(model=model, resources=resources)
    group.setup(RewardSetup(role, seed=0, max_tokens=max_tokens), timeout_s=60.0).result()
    return group


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("items", [1, 2, 9])
def test_scores_do_not_depend_on_the_threads(tmp_path: Path, items: int, threads: None) -> None:
    directory = save_reward_model(tmp_path / "model")
    requests = [ScoreRequest(token_ids=tuple(range(20, 30 + 7 * number))) for number in range(items)]
    scored, passes = {}, Counter[int]()
    for count in (1, 3):
        worker = RewardWorker()
        group = reward_group(worker, directory, threads=count)
        worker.model.get_input_embeddings().register_forward_hook(lambda *_, count=count: passes.update([count]))
        scored[count] = torch.tensor([result.raw for result in group.score(requests).result()])
    torch.testing.assert_close(scored[3], scored[1], atol=1e-5, rtol=1e-5)
    assert passes == {1: 1, 3: min(items, 3)}, "several items run side by side, one runs alone"


def test_ranks_with_several_threads_each_score_every_item_once(tmp_path: Path, threads: None) -> None:
    """Each rank gets all items and finds its own share without asking the others."""
    directory = save_reward_model(tmp_path / "model")
    requests = [ScoreRequest(token_ids=tuple(range(20, 23 + number % 70))) for number in range(150)]
    alone = [result.raw for result in reward_group(RewardWorker(), directory).score(requests).result()]
    worker = RewardWorker()
    reward_group(worker, directory, max_tokens=512, threads=2)
    scored: dict[int, float | None] = {}
    for worker.rank, worker.world_size in ((0, 3), (1, 3), (2, 3)):
        share = dict(worker.score(requests))
        assert share.keys().isdisjoint(scored) and 30 < len(share) < 80
        scored |= {position: result.raw for position, result in share.items()}
    assert scored.keys() == set(range(150))
    torch.testing.assert_close(
        torch.tensor([scored[position] for position in range(150)]), torch.tensor(alone), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("max_tokens", [40, 4096])
def test_answers_to_one_prompt_share_it_wherever_they_stand(tmp_path: Path, max_tokens: int) -> None:
    directory = save_reward_model(tmp_path / "model")
    worker = RewardWorker()
    group = reward_group(worker, directory, max_tokens=max_tokens)
    one, other = tuple(range(40, 70)), tuple(range(80, 110))
    items = [(*one, 1), (*other, 2), (*one, 3, 4), (), (7,), (*other, 5)]
    ran: list[int] = []
    worker.model.get_input_embeddings().register_forward_hook(lambda _, __, out: ran.append(out.shape[1]))

    def score(sequences: list[tuple[int, ...]]) -> list[float | None]:
        return [result.raw for result in group.score([ScoreRequest(token_ids=ids) for ids in sequences]).result()]

    together = score(items)
    tokens = sum(ran)
    alone = [score([item])[0] for item in items]
    assert together[3] is None and alone[3] is None, "an item without tokens has an error, the others their scores"
    torch.testing.assert_close(
        *(torch.tensor([number for number in scores if number is not None]) for scores in (together, alone)),
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip
    whole = sum(map(len, items))
    assert tokens == (whole if max_tokens == 40 else whole - len(one) - len(other))
