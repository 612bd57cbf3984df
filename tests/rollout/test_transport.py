"""Weights go from GPU to GPU where every engine can take part, and through the object store everywhere else."""

from __future__ import annotations

import pytest

from rlhf_ray.rollout.transport import choose_transport

CASES = {
    "one GPU for both": ((["a"], [["a"]]), "ipc"),
    "eight GPUs, each for a rank and an engine": ((list("abcdefgh"), [[gpu] for gpu in "abcdefgh"]), "ipc"),
    "fewer engines than ranks, on their GPUs": ((list("abcd"), [["b"], ["d"]]), "ipc"),
    "an engine over the GPUs of two ranks": ((list("ab"), [["a", "b"]]), "ipc"),
    "GPUs of their own": ((list("ab"), [["c"], ["d"]]), "nccl"),
    "engines over several GPUs, on any node": ((list("ab"), [["c", "d"], ["e", "f"]]), "nccl"),
    "an engine shares with a rank that sends nothing": ((list("ab"), [["b"], ["c"]]), "nccl"),
    "only one of the engines shares with rank 0": ((list("ab"), [["a"], ["c"]]), "object_store"),
    "an engine reaches beyond the GPU of rank 0": ((["a"], [["a", "c"]]), "object_store"),
    "two engines share a GPU": ((list("ab"), [["c"], ["c"]]), "object_store"),
    "all on CPU": (([None], [[]]), "object_store"),
    "a policy on CPU": (([None], [["a"]]), "object_store"),
    "an engine on CPU, or one that is not vLLM": ((["a"], [["b"], []]), "object_store"),
    "nothing is known": (([], []), "object_store"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_way_follows_from_the_placement(name: str) -> None:
    placement, expected = CASES[name]
    assert choose_transport(*placement) == expected
