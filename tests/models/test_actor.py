"""An Actor takes padded batches with OpenRLHF's conventions; a PackedPolicy follows this project's alignment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.errors import ModelLoadError, RequestError
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.description import describe
from rlhf_ray.trajectories.packing import Packed

Make = Callable[..., PreTrainedModel]
Pad = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def actor(causal: Make) -> Actor:
    return Actor(causal(), param_dtype="fp32", temperature=0.7)


def openrlhf_log_probs(model: PreTrainedModel, ids: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """All (batch, length - 1) predictions with the formulas of the published conventions."""
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float() / temperature
    return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_log_probs_of_the_last_predictions_times_the_mask(
    actor: Actor, causal: Make, sequences: list[Tensor], pad: Pad, side: str, packing: bool
) -> None:
    actor.packing_samples = packing
    ids, mask = pad(sequences, side)
    action_mask = mask[:, 1:][:, -8:].clone()
    action_mask[:, 3] = 0
    expected = (openrlhf_log_probs(causal(), ids, mask, 0.7)[:, -8:] * action_mask).masked_fill(mask[:, -9:-1] == 0, 0)
    torch.testing.assert_close(actor(ids, action_mask, mask), expected, atol=1e-5, rtol=1e-5)


def test_all_predictions_output_and_entropy(actor: Actor, causal: Make, sequences: list[Tensor], pad: Pad) -> None:
    ids, mask = pad(sequences)
    real = mask[:, 1:].bool()
    expected = openrlhf_log_probs(causal(), ids, mask, 0.7)
    log_probs, output = actor(ids, attention_mask=mask, return_logprobs=True, return_output=True, return_entropy=True)
    torch.testing.assert_close(log_probs[real], expected[real], atol=1e-5, rtol=1e-5)
    assert torch.equal(log_probs, actor(ids, attention_mask=mask, return_logprobs=True)) and not log_probs[~real].any()
    assert output.logits.shape == (*ids.shape, 48)
    log_p = (output.logits[:, :-1].float() / 0.7).log_softmax(-1)
    torch.testing.assert_close(output.entropy[real], -(log_p.exp() * log_p).sum(-1)[real], atol=1e-5, rtol=1e-5)


def test_with_neither_mask_nor_log_probs_it_is_the_output(actor: Actor) -> None:
    ids = torch.arange(3, 9)[None]
    assert actor(ids, return_output=True).logits.shape == (1, 6, 48)
    for wrong in ({}, {"return_logprobs": True, "return_entropy": True}):
        with pytest.raises(RequestError, match="return_output=True"):
            actor(ids, **wrong)
    with pytest.raises(RequestError, match="ring attention"):
        actor(ids, torch.ones(1, 2), ring_attn_group=object())


def test_packed_alignment_temperature_entropy_and_wanted(causal: Make, sequences: list[Tensor], packed: Packed) -> None:
    actor = Actor(causal(), param_dtype="fp32")
    outputs = PackedPolicy(actor)(packed, temperature=0.7, with_entropy=True)
    reference = causal()
    for start, sequence in zip(packed.offsets.tolist(), sequences, strict=False):
        log_p = (reference(input_ids=sequence[None]).logits[0, :-1] / 0.7).log_softmax(-1)
        about = slice(start + 1, start + len(sequence))
        assert outputs.log_probs[start] == outputs.entropy[start] == 0
        torch.testing.assert_close(
            outputs.log_probs[about], log_p.gather(1, sequence[1:, None])[:, 0], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(outputs.entropy[about], -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=1e-5)
    wanted = torch.arange(packed.num_tokens) % 3 == 0
    some = PackedPolicy(actor)(packed, temperature=0.7, with_entropy=True, wanted=wanted)
    torch.testing.assert_close(some.log_probs, outputs.log_probs * wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(some.entropy, outputs.entropy * wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "olmoe"])
def test_a_mixture_exposes_the_auxiliary_loss_of_its_router(
    family: str, causal: Make, sequences: list[Tensor], pad: Pad
) -> None:
    """That of transformers, in which padding does not count."""
    ids, mask = pad(sequences, "left")
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    theirs = causal(family)(input_ids=ids, attention_mask=mask, position_ids=positions, output_router_logits=True)
    output = Actor(causal(family), param_dtype="fp32")(ids, attention_mask=mask, return_output=True)
    assert output.aux_loss.requires_grad and float(output.aux_loss.detach()) > 0
    torch.testing.assert_close(output.aux_loss, theirs.aux_loss, atol=1e-5, rtol=1e-5)


def test_dropout_is_off(causal: Make, packed: Packed) -> None:
    model = causal(attention_dropout=0.5)
    model.model.layers[0].mlp.act_fn = nn.Sequential(model.model.layers[0].mlp.act_fn, nn.Dropout(0.5))
    actor = Actor(model, param_dtype="fp32").train()
    first, second = (PackedPolicy(actor)(packed).log_probs for _ in range(2))
    assert torch.equal(first, second) and actor.config.attention_dropout == 0.0


def test_tied_embeddings_stay_tied(causal: Make) -> None:
    actor = Actor(causal("gemma2"), param_dtype="fp32")
    assert actor.log_prob_head.weight is actor.model.get_input_embeddings().weight
    assert "embeddings tied" in describe(actor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_in_4bit": True}, "4-bit"),
        (
            {"use_liger_kernel": True},
            r"Liger kernels cannot be used here: they run on GPUs only, not on the CPU. Leave use_liger_kernel off",
        ),
        ({"attn_implementation": "flash_attention_9"}, "flash_attention_9"),
        (
            {"attn_implementation": "varlen", "strict_attention": True},
            "varlen cannot be used here: it runs on GPUs only, not on the CPU",
        ),
        ({"lora_rank": 2, "target_modules": ["nonsense"]}, r"nonsense.*k_proj"),
    ],
)
def test_what_is_not_served_is_refused(causal: Make, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        Actor(causal(), param_dtype="fp32", **arguments)


def test_a_reward_model_is_refused_before_its_weights_are_read(causal: Make, tmp_path: Path) -> None:
    """Also one whose output layer is that of the tokens, which would load."""
    model = causal(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert Actor(str(tmp_path), param_dtype="fp32")
    described = json.loads((tmp_path / "config.json").read_text()) | {
        "architectures": ["LlamaForSequenceClassification"]
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(
        ModelLoadError, match="it holds LlamaForSequenceClassification, which scores texts and writes none"
    ):
        Actor(str(tmp_path), param_dtype="fp32")


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="not a Linear"):
        Actor(nn.Linear(2, 2))


def test_a_preferred_backend_that_cannot_run_is_reported(causal: Make) -> None:
    line = describe(Actor(causal(), param_dtype="fp32"))
    assert "attention sdpa (flash_attention_2 preferred, but it runs on GPUs only, not on the CPU)" in line
