"""The hidden states of a segment are those of the segment run alone; what cannot be packed is refused by its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    GptOssConfig,
    Llama4TextConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from rlhf_ray.errors import ModelLoadError, RequestError
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.forward.packed import packed_forward, pad_back, padded_positions, unpad
from rlhf_ray.models.weights.load import prepare_for_packs
from rlhf_ray.trajectories.packing import Packed

Make = Callable[..., PreTrainedModel]


def log_probs_alone(model: PreTrainedModel, sequences: list[Tensor]) -> Tensor:
    """One sequence at a time through transformers' eager attention: 0 at the first token, as in packs."""
    rows = []
    for sequence in sequences:
        log_p = model(input_ids=sequence[None]).logits[0].log_softmax(-1)
        rows.append(torch.cat([log_p.new_zeros(1), log_p[:-1].gather(1, sequence[1:, None])[:, 0]]))
    return torch.cat(rows)


def test_packed_padded_and_alone_agree_with_gradients(
    family: str, causal: Make, sequences: list[Tensor], packed: Packed, pad: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    alone = causal(family)
    expected = log_probs_alone(alone, sequences)
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(3))
    (expected * weights).sum().backward()
    rows = torch.repeat_interleave(torch.arange(len(sequences)), packed.lengths)

    def in_pack(actor: Actor) -> Tensor:
        return PackedPolicy(actor)(packed).log_probs

    def padded(side: str, packing: bool) -> Callable[[Actor], Tensor]:
        def run(actor: Actor) -> Tensor:
            actor.packing_samples = packing
            ids, mask = pad(sequences, side)
            whole = torch.nn.functional.pad(actor(ids, attention_mask=mask, return_logprobs=True), (1, 0))
            starts = mask.argmax(1)[rows]
            return whole[rows, starts + packed.position_ids]

        return run

    ways = {"packed": in_pack, **{f"{side} {p}": padded(side, p) for side in ("left", "right") for p in (False, True)}}
    for name, run in ways.items():
        actor = Actor(causal(family), param_dtype="fp32")
        actual = run(actor)
        torch.testing.assert_close(
            actual, expected, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        (actual * weights).sum().backward()
        theirs = dict(alone.named_parameters())
        for parameter, tensor in actor.model.named_parameters():
            gap = float((tensor.grad - theirs[parameter].grad).norm() / theirs[parameter].grad.norm().clamp(min=1e-6))
            assert gap < 1e-5, (name, parameter, gap)


def test_bf16_agrees_with_fp32(family: str, causal: Make, sequences: list[Tensor], packed: Packed) -> None:
    model = causal(family).bfloat16()
    exact = causal(family)
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    expected = log_probs_alone(exact, sequences).detach()
    actual = PackedPolicy(Actor(model))(packed).log_probs.detach()
    assert actual.dtype == torch.float32
    assert float((actual - expected).norm() / expected.norm()) < 1e-2


def test_gradient_checkpointing_changes_nothing(causal: Make, packed: Packed) -> None:
    gradients = []
    for enabled in (False, True):
        actor = Actor(causal("gemma3"), param_dtype="fp32").train()
        if enabled:
            actor.gradient_checkpointing_enable()
        PackedPolicy(actor)(packed).log_probs.sum().backward()
        gradients.append([parameter.grad for parameter in actor.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_pack_of_a_rank_without_work_runs_and_has_gradients(causal: Make) -> None:
    outputs = PackedPolicy(Actor(causal(), param_dtype="fp32"))(Packed.dummy(), with_entropy=True)
    assert outputs.log_probs.shape == (2,) and outputs.log_probs.requires_grad and outputs.entropy.requires_grad


def test_unpad_finds_positions_on_either_side(
    sequences: list[Tensor], pad: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    for side in ("left", "right"):
        ids, mask = pad(sequences, side)
        packed, places = unpad(ids, mask)
        assert torch.equal(packed.token_ids, torch.cat(sequences))
        assert packed.lengths.tolist() == [len(sequence) for sequence in sequences]
        assert torch.equal(packed.position_ids, padded_positions(mask).flatten()[places])
        back = pad_back(packed.token_ids[:, None].float(), places, *ids.shape)[..., 0]
        assert torch.equal(back, ids * mask)


def test_unpad_refuses_an_empty_row() -> None:
    with pytest.raises(RequestError, match="row 1"):
        unpad(torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 0], [0, 0, 0]]))


SMALL = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
UNPACKABLE = {
    "BloomModel": (lambda: BloomConfig(vocab_size=48, hidden_size=32, n_layer=2, n_head=4), "attention interface"),
    "Llama4TextModel": (
        lambda: Llama4TextConfig(**SMALL, intermediate_size=16, intermediate_size_mlp=16, num_local_experts=2),
        "chunked_attention",
    ),
    "Qwen3NextModel": (
        lambda: Qwen3NextConfig(**SMALL, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=2,
                                linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
                                linear_value_head_dim=8),
        "attention interface",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNPACKABLE)
def test_a_model_that_cannot_be_packed_is_refused_by_its_name(name: str) -> None:
    config, reason = UNPACKABLE[name]
    with pytest.raises(ModelLoadError, match=f"{name}.*{reason}"):
        prepare_for_packs(AutoModel.from_config(config()), "sdpa", strict=True)


def test_attention_sinks_are_refused_by_name(packed: Packed) -> None:
    config = GptOssConfig(**SMALL, num_key_value_heads=2, head_dim=8, intermediate_size=16, num_local_experts=2)
    model = AutoModel.from_config(config)
    prepare_for_packs(model, "sdpa", strict=True)
    with pytest.raises(ModelLoadError, match=r"GptOssAttention uses attention sinks"):
        packed_forward(model, packed)


def test_a_layer_that_bypasses_the_backends_is_noticed(causal: Make, packed: Packed) -> None:
    model = causal().base_model
    prepare_for_packs(model, "sdpa", strict=True)
    model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ModelLoadError, match="1 of its 2 layers"):
        packed_forward(model, packed)


def test_a_window_that_is_not_passed_on_is_noticed(causal: Make, packed: Packed) -> None:
    model = causal("gemma2").base_model
    prepare_for_packs(model, "sdpa", strict=True)
    for layer in model.layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(ModelLoadError, match="sliding window, but 0"):
        packed_forward(model, packed)


def test_logits_that_change_after_the_output_layer_are_noticed() -> None:
    config = CohereConfig(**SMALL, intermediate_size=16, logit_scale=0.1)
    with pytest.raises(ModelLoadError, match=r"CohereForCausalLM.*changes its logits"):
        Actor(AutoModelForCausalLM.from_config(config), param_dtype="fp32")
