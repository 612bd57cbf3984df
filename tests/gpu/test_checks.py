"""What the checks see: on the CPU what is right passes, and what is wrong is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from rlhf_ray.models.actor import Actor
from rlhf_ray.models.disk_names import to_disk_names
from rlhf_ray.models.forward.segments import Group, Segments
from rlhf_ray.planning.flops import training_flops
from tests.gpu import agreement, shapes, throughput
from tests.gpu.sizes import SIZES

TINY = SIZES["cpu"]


def test_attention_that_looks_past_its_segment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_the_mask(self: Segments, group: Group, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(group.longest, group.context + group.longest, dtype=dtype)

    monkeypatch.setattr(Segments, "mask", forgets_the_mask)
    monkeypatch.setattr("rlhf_ray.models.actor.check_packing", lambda *models: None)
    with pytest.raises(AssertionError, match="hidden states of packs"):
        agreement.attention_agrees("cpu", TINY, attention="sdpa", dtype_name="bfloat16")


def test_four_bit_weights_that_are_others_than_those_written_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    write = agreement.save_pretrained

    def write_another(actor: Actor, tokenizer: None, directory: str) -> None:
        write(actor, tokenizer, directory, state={name: 1.1 * tensor for name, tensor in to_disk_names(actor.model)})

    monkeypatch.setattr(agreement, "save_pretrained", write_another)
    with pytest.raises(AssertionError, match="NF4 and its dequantised weights differ"):
        agreement.four_bit_agrees("cpu", dataclasses.replace(TINY, sequences=2, longest=30))


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_a_known_model_are_counted(tied: bool) -> None:
    config = shapes.config_of("tiny")
    config.tie_word_embeddings = tied
    model = throughput.Actor(shapes.AutoModelForCausalLM.from_config(config), attn_implementation="sdpa").model
    # Of 2 layers: queries, keys, values and outputs of 2, 1, 1 and 2 heads of 32, and three matrices of 32 times 64.
    weights = 2 * (6 * 32 * 32 + 3 * 32 * 64) + 128 * 32
    assert shapes.compute_shape(model).parameters == weights == shapes.compute_shape(model).trained
    # One token attends to itself, in 2 layers of 2 heads, at 2 operations a number of a head; the head's share included.
    assert shapes.scoring_flops(shapes.compute_shape(model), [1]) == 2 * weights + 2 * 2 * 2 * 32
    model.requires_grad_(False)
    frozen = shapes.compute_shape(model)
    assert training_flops(frozen, [1]) == 4 * weights + 6 * 2 * 2 * 32


def test_the_shapes_have_as_many_weights_as_their_names_say() -> None:
    for name, billions in (("qwen3-0.6b", 0.596), ("qwen3-8b", 8.19)):
        with torch.device("meta"):
            model = shapes.AutoModelForCausalLM.from_config(shapes.config_of(name))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=2e-3)
    assert len(shapes.config_of("qwen3-8b", layers=3).layer_types) == 3


def test_what_takes_the_time_is_listed_where_the_share_is_low(monkeypatch: pytest.MonkeyPatch) -> None:
    work: Callable[[], throughput.Findings] = lambda: throughput.policy_scoring_of_large_model("cpu", TINY)  # noqa: E731
    assert "aten::mm" in work()[1]
    monkeypatch.setattr(throughput, "GOOD_SHARE", 0.0)
    assert work()[1] == ""
