"""Requests that begin alike are scored in one pack, with the scores that each has alone, on however many threads. An item that
the model fails on costs only itself its score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.request_scoring import score_apart
from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.errors import GroupError, RequestError
from rlhf_ray.rewards.request import ScoreRequest
from tests.serving.reward_models import save_reward_model


def reward_group(worker: RewardWorker, directory: Path, *, max_tokens: int = 4096, threads: int = 1) -> RewardGroup:
    group = RewardGroup(InProcessRanks("reward", worker))
    model, resources = ModelConfig(path=str(directory), dtype="fp32"), ResourcesConfig(threads_per_rank=threads)
    role = RoleConfig(model=model, resources=resources)
    group.setup(RewardSetup(role, seed=0, max_tokens=max_tokens), timeout_s=60.0).result()
    return group


@pytest.fixture
def threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("items", [1, 2, 9])
def test_scores_do_not_depend_on_the_threads(tmp_path: Path, items: int, threads_kept: None) -> None:
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


def test_ranks_with_several_threads_each_score_every_item_once(tmp_path: Path, threads_kept: None) -> None:
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


@pytest.mark.parametrize(("place", "threads"), [(0, 1), (5, 1), (8, 3)])
def test_an_item_that_the_model_fails_on_costs_no_other_its_score(
    tmp_path: Path, place: int, threads: int, threads_kept: None
) -> None:
    worker = RewardWorker()
    group = reward_group(worker, save_reward_model(tmp_path / "model"), threads=threads)
    requests = [ScoreRequest(token_ids=tuple(range(20, 30 + number))) for number in range(9)]
    before = [result.raw for result in group.score(requests).result()]
    poison = 250

    def fail(_: object, arguments: tuple[torch.Tensor]) -> None:
        if (arguments[0] == poison).any():
            raise IndexError("index out of range in self")

    embedding = worker.model.get_input_embeddings()
    embedding.register_forward_pre_hook(fail)
    worker.streams = worker._make_streams(worker.settings)  # anew, since each stream has a copy of the modules
    requests[place] = ScoreRequest(token_ids=(20, poison, 21))
    results = group.score(requests).result()
    assert results[place].fault == "item" and results[place].tokens == 3
    assert results[place].error == "the model fails on this item (IndexError: index out of range in self)"
    others = [number for number in range(9) if number != place]
    torch.testing.assert_close(
        torch.tensor([results[number].raw for number in others]), torch.tensor([before[number] for number in others]),
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_a_model_that_fails_on_everything_is_an_error_of_its_group(tmp_path: Path) -> None:
    worker = RewardWorker()
    group = reward_group(worker, save_reward_model(tmp_path / "model"))

    def fail(*_: object) -> None:
        raise RuntimeError("the device is lost")

    worker.model.get_input_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(GroupError, match="the device is lost"):
        group.score([ScoreRequest(token_ids=(1, 2)), ScoreRequest(token_ids=(3,))]).result()


@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=6), st.sets(st.integers(0, 35))
)
def test_every_sequence_is_scored_once_or_has_one_reason(sizes: list[list[int]], bad: set[int]) -> None:
    count = iter(range(1000))
    packs = [tuple(next(count) for _ in size) for size in sizes]
    everything = [index for pack in packs for index in pack]

    def score(some: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], np.ndarray]]:
        if any(index in bad for pack in some for index in pack):
            raise ValueError("no")
        return [(pack, np.array(pack, dtype=np.float32)) for pack in some]

    parts, failures = score_apart(packs, score, lambda: None)
    scored = [index for indices, values in parts for index in indices]
    assert sorted([*scored, *failures]) == everything and set(failures) == bad & set(everything)
    assert all(list(indices) == values.tolist() for indices, values in parts)


def test_a_model_with_fewer_positions_than_the_job_brings_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    """The config of a model that comes from a hub is first seen by its ranks."""
    directory = save_reward_model(tmp_path / "model", positions=64)
    role = RoleConfig(model=ModelConfig(path=str(directory), dtype="fp32"))
    with pytest.raises(RequestError, match=r"65 is more than .* \(reward\) reads: lower it to 64"):
        RewardWorker().setup(RewardSetup(role, seed=0, longest=65))
    RewardWorker().setup(RewardSetup(role, seed=0, longest=64))
