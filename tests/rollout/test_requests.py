"""Requests are named by prompt and sample; seeds are a pure function; a generation has a number for every token."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.errors import RequestError
from rlhf_ray.rollout.requests import (
    Generation,
    GenerationRequest,
    check_requests,
    gather,
    make_requests,
    request_seed,
)
from rlhf_ray.trajectories.columns import FinishReason


def test_seeds_are_the_same_everywhere_and_differ_wherever_anything_differs() -> None:
    assert request_seed(0, 0, 0, 0) == 5809880761037817570  # fixed: a new value would change every resumed run
    seeds = {
        request_seed(*numbers)
        for numbers in [(a, b, c, d) for a in (0, 1) for b in (0, 7) for c in range(50) for d in (0, 3)]
    }
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_requests_come_in_prompt_order_with_samples_together() -> None:
    requests = make_requests([(9, [1, 2]), (4, [3])], samples_per_prompt=2, max_new_tokens=5, run_seed=3, step=8)
    assert [request.key for request in requests] == [(9, 0), (9, 1), (4, 0), (4, 1)]
    assert [request.token_ids for request in requests] == [(1, 2), (1, 2), (3,), (3,)]
    assert [request.seed for request in requests] == [request_seed(3, 8, *request.key) for request in requests]
    assert {request.seed for request in make_requests([(9, [1])], samples_per_prompt=2, max_new_tokens=5)} == {None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": ()}, "no tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 9}, "2 prompt tokens and 9 new ones are 11"),
        ({"token_ids": (1, 50)}, "token 50 is not in the model's vocabulary of 50"),
        ({"token_ids": (1, -1)}, "token -1 is not"),
        ({"seed": None}, "has no seed"),
        ({"prompt_id": 1}, "asked for twice"),
        ({"prompt_id": 2}, "asked for twice"),
    ],
)
def test_one_bad_request_refuses_all_and_is_named(change: dict[str, object], message: str) -> None:
    good = {"prompt_id": 7, "sample_index": 0, "token_ids": (1, 49), "seed": 0, "max_new_tokens": 8}
    first = GenerationRequest(**(good | {"prompt_id": 1}))
    limits = {"vocabulary": 50, "max_model_tokens": 10, "seeded": True, "unfinished": {(2, 0)}}
    check_requests([first, GenerationRequest(**good)], **limits)
    with pytest.raises(RequestError, match=message) as caught:
        check_requests([first, GenerationRequest(**(good | change))], **limits)
    assert "sample 0" in str(caught.value)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=6), st.integers(0, 99))
def test_the_batch_puts_every_number_at_the_token_it_is_about(lengths: list[tuple[int, int]], seed: int) -> None:
    draw = random.Random(seed)
    requests = [
        GenerationRequest(draw.randrange(9), row, tuple(draw.randrange(50) for _ in range(prompt)), None, new)
        for row, (prompt, new) in enumerate(lengths)
    ]
    generations = [
        Generation(
            *request.key,
            tuple(draw.randrange(50) for _ in range(new)),
            tuple(-draw.random() for _ in range(new)),
            tuple(draw.randrange(4) for _ in range(new)),
            draw.choice(list(FinishReason)),
        )
        for request, (_, new) in zip(requests, lengths, strict=True)
    ]
    batch = gather(requests, generations)
    for row, (request, generation) in enumerate(zip(requests, generations, strict=True)):
        one, prompt = batch.select([row]), len(request.token_ids)
        assert one["token_ids"].tolist() == [*request.token_ids, *generation.token_ids]
        assert one["action_mask"].tolist() == [False] * prompt + [True] * len(generation.token_ids)
        assert one["weight_version"].tolist() == [-1] * prompt + list(generation.weight_versions)
        assert torch.equal(one["rollout_log_probs"][prompt:], torch.tensor(generation.log_probs))
        assert one["rollout_log_probs"][:prompt].tolist() == [0.0] * prompt
        assert (one["prompt_id"].item(), one["sample_index"].item()) == request.key
        assert one["finish_reason"].item() == generation.finish_reason


def test_no_requests_make_an_empty_batch() -> None:
    assert len(gather([], [])) == 0
