"""After an update vLLM computes with the new weights, whatever it packs; and what we do for that is still needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from rlhf_ray.rollout import weight_transfer
from rlhf_ray.rollout.errors import WeightUpdateError
from rlhf_ray.rollout.weight_sender import Route, WeightSender
from tests.architectures.configs import small_config, small_model
from tests.architectures.rollout import Sampled
from tests.rollout.sender_program import source_of
from tests.rollout.stand_ins import on_cpu

pytestmark = pytest.mark.vllm
TOLERANCE, OTHER_MODEL = 1e-4, 1e-2
"""Nats: what rounding explains in fp32, and less than what weights of before make of log-probs."""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampled]:
    """A mixture whose experts are padded (48 is no multiple of 32), with a head that is its embedding."""
    directory = tmp_path_factory.mktemp("mixture") / "model"
    config = small_config("qwen3_moe")
    assert config.moe_intermediate_size == 48
    model, _ = small_model("qwen3_moe", policy=True, tie_word_embeddings=True)
    model.save_pretrained(directory)
    sampled = Sampled(directory)
    yield sampled
    sampled.engine.shutdown()


def test_a_mixture_of_experts_agrees_with_its_trainer_before_and_after_each_update(mixture: Sampled) -> None:
    assert mixture.difference() < TOLERANCE
    for version in range(1, 4):
        try:
            mixture.update(version)
        except WeightUpdateError as error:
            raise AssertionError(f"experts that were padded take no new weights: {error}") from error
        assert mixture.difference() < TOLERANCE, f"after update {version}"


def test_what_vllms_own_transfer_engine_brings_is_loaded_as_what_the_object_store_brings(mixture: Sampled) -> None:
    """Experts that are padded and a tied head included."""

    def call_engine(method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        (own,) = arguments
        getattr(mixture.engine, method)(*own)

    assert mixture.engine.gpus() == []
    with on_cpu():
        source = source_of(mixture.policy.actor.model)
        sender = WeightSender(Route("ipc", 0, 1, 1, "127.0.0.1", 0), source, call_engine)
        for version in (21, 22):
            mixture.policy.change(version)
            sender.send(version)
        sender.close()
    assert mixture.engine.weight_version == 22
    assert mixture.difference() < TOLERANCE


def agrees_without(mixture: Sampled, repair: str, version: int) -> bool:
    """Whether an update without a repair is right all the same; one that vLLM cannot do at all is not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_transfer, repair, lambda model: None)
        try:
            mixture.update(version)
        except WeightUpdateError:
            return False
    difference = mixture.difference()
    assert difference < TOLERANCE or difference > OTHER_MODEL
    return difference < TOLERANCE


def test_vllm_still_needs_each_repair(mixture: Sampled) -> None:
    assert not agrees_without(mixture, "repack_tied_heads", 11), "vLLM packs tied heads itself now: drop the repair"
    mixture.update(12)
    assert mixture.difference() < TOLERANCE, "one update with the repair mends it"
    assert not agrees_without(mixture, "forget_packed_experts", 13), "vLLM packs experts itself now: drop the repair"
