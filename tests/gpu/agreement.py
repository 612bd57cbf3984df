"""Whether a GPU computes what the CPU computes: packed attention, log-probabilities in chunks, weights in 4 bits, Liger's
kernels.

Always true: the reference is transformers' own padded model with SDPA in fp32 on the CPU, or the plain formula; half
precision may be off by twice what the reference itself is off in half precision on the CPU, and no more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.sequences import padded_batches, ragged_sequences
from rlhf_ray.environment import Device
from rlhf_ray.models import Actor, PackedPolicy, packed_forward, save_pretrained
from rlhf_ray.models.forward import attention_backends
from rlhf_ray.models.forward.log_probs import AGREEMENT, LogProbHead, kernel_differences
from rlhf_ray.trajectories import Packed, TrajectoryBatch, pack
from tests.gpu.sizes import Sizes

VOCABULARY = 512
HALF_AS_GOOD = 2.0
FP32_TOLERANCE, HALF_PRECISION = 1e-4, 2e-2
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024,
    "pad_token_id": 0, "initializer_range": 0.08,
}  # fmt: skip
"""Grouped heads, and weights large enough for attention to choose."""


def attention_agrees(device: Device, sizes: Sizes, *, attention: str, dtype_name: str) -> str:
    """Compare hidden states and input gradients of a pack with those of padded rows; says how far they are apart."""
    dtype, longest = getattr(torch, dtype_name), sizes.longest
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="sdpa", dtype=torch.float32)
    sequences = ragged_sequences(sizes.sequences, VOCABULARY, longest=longest)
    prompt = torch.arange(3, 3 + longest // 3)  # the same before all: the pack holds it once
    sequences = [torch.cat([prompt, sequence]) for sequence in sequences]
    exact = _padded(model, sequences)
    ours = _packed(copy.deepcopy(model).to(device, dtype), sequences, attention, device)
    if dtype == torch.float32:
        limits = [FP32_TOLERANCE] * len(exact)
    else:
        limits = [HALF_AS_GOOD * _off(a, b) for a, b in zip(_padded(model.to(dtype), sequences), exact, strict=True)]
    report_lines = []
    for name, a, b, limit in zip(("hidden states", "gradients"), ours, exact, limits, strict=True):
        off = _off(a, b)
        if not off <= limit:
            raise AssertionError(
                f"{name} of packs with {attention} in {dtype} are off by {off:.2e} (limit {limit:.2e})"
            )
        report_lines.append(f"{name} off by {off:.1e} of at most {limit:.1e}")
    return ", ".join(report_lines)


def log_probs_agree(device: Device, sizes: Sizes, *, dtype_name: str) -> str:
    """Compare chunked log-probs, entropies and gradients with the formula on all logits, in fp32, on the same device."""
    dtype, tokens, vocabulary = getattr(torch, dtype_name), sizes.agreeing_tokens, sizes.agreeing_vocabulary
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 64, generator=generator).to(device, dtype)
    layer = torch.nn.Linear(64, vocabulary, bias=False).to(device, dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    weights = torch.randn(2, tokens, generator=generator).to(device)
    chunked = _loss_of_chunks(LogProbHead.around(layer, None), hidden, targets, weights)
    naive = _loss_of_formula(layer, hidden, targets, weights)
    limit = FP32_TOLERANCE if dtype == torch.float32 else 1e-2
    names = ("log-probs", "entropies", "gradients of hidden states", "gradients of the weight")
    off = {name: _off(a, b) for name, a, b in zip(names, chunked, naive, strict=True)}
    wrong = {name: number for name, number in off.items() if not number <= limit}
    if wrong:
        raise AssertionError(f"chunked and naive differ in {dtype} by more than {limit}: {wrong}")
    return f"off by {max(off.values()):.1e} at most"


def four_bit_agrees(device: Device, sizes: Sizes) -> str:
    """Compare a policy in NF4 with a plain one of its dequantised weights, and its adapters' gradients, in bf16."""
    with TemporaryDirectory() as directory:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16).save_pretrained(directory)
        options = {"param_dtype": "bf16", "lora_rank": 4, "device_map": {"": device}}
        ours = Actor(directory, load_in_4bit=True, **options)
        save_pretrained(ours, None, f"{directory}/plain")
        plain = Actor(f"{directory}/plain", **options)
    with torch.no_grad():
        for name, parameter in plain.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(ours.model.get_parameter(name))
    packed = pack(
        TrajectoryBatch.from_sequences(ragged_sequences(sizes.sequences, VOCABULARY, longest=sizes.longest))
    ).to(device)
    off = {}
    results = [_log_probs_and_adapter_gradient(actor, packed) for actor in (ours, plain)]
    for name, a, b in zip(("log-probs", "gradients of adapters"), *results, strict=True):
        off[name] = _off(a, b)
    wrong = {name: number for name, number in off.items() if not number <= HALF_PRECISION}
    if wrong:
        raise AssertionError(f"NF4 and its dequantised weights differ by more than {HALF_PRECISION}: {wrong}")
    return f"off by {max(off.values()):.1e} at most"


def log_prob_kernels_agree(device: Device, sizes: Sizes) -> str:
    """Let the log-prob head try its Triton kernels, which otherwise gives way to plain torch with a line in the log."""
    from rlhf_ray.models.forward import log_prob_kernels  # triton is there with a GPU

    off = max(kernel_differences(log_prob_kernels, torch.device(device)))
    if not off <= AGREEMENT:
        raise AssertionError(f"the kernels differ from plain torch by {off:.1e} (limit {AGREEMENT})")
    return f"off by {off:.1e}"


def liger_agrees(device: Device, sizes: Sizes) -> str:
    """Compare log-probs with Liger's kernels in the model and without, in bf16."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16).to(device)
    packed = pack(
        TrajectoryBatch.from_sequences(ragged_sequences(sizes.sequences, VOCABULARY, longest=sizes.longest))
    ).to(device)
    plain = PackedPolicy(Actor(copy.deepcopy(model)))(packed).log_probs
    off = _off(PackedPolicy(Actor(model, use_liger_kernel=True))(packed).log_probs, plain)
    if not off <= HALF_PRECISION:
        raise AssertionError(f"log-probs with Liger's kernels are off by {off:.2e} (limit {HALF_PRECISION})")
    return f"off by {off:.1e}"


def _log_probs_and_adapter_gradient(actor: Actor, packed: Packed) -> tuple[Tensor, Tensor]:
    log_probs = PackedPolicy(actor)(packed).log_probs
    log_probs.sum().backward()
    name = next(name for name, _ in actor.model.named_parameters() if name.endswith("lora_B.default.weight"))
    return log_probs.detach(), actor.model.get_parameter(name).grad


def _padded(model: PreTrainedModel, sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states of all real tokens on the padded side, and the embedding's gradient of the sum of their squares."""
    model.zero_grad()
    (ids, mask), = padded_batches(sequences, len(sequences))  # fmt: skip
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
    return _with_gradient(model, hidden)


def _packed(model: PreTrainedModel, sequences: list[Tensor], attention: str, device: Device) -> tuple[Tensor, Tensor]:
    with _kernel(attention, device):
        actor = Actor(model, attn_implementation=attention, strict_attention=True)
        packed = pack(TrajectoryBatch.from_sequences(sequences)).to(device)
        assert packed.parent is not None
        return _with_gradient(actor.model, packed.per_sequence(packed_forward(actor.backbone, packed)))


@contextmanager
def _kernel(attention: str, device: Device) -> Iterator[None]:
    """Let ``varlen`` run on a CPU too, with plain arithmetic in the place of torch's kernel: so a rehearsal shows that what we
    pass is what this version of torch takes.
    """
    if device == "cuda" or attention != "varlen":
        yield
        return
    from tests.models.gpu_kernels import flash_attention

    with flash_attention() as calls, patch.object(attention_backends, "obstacle", lambda *_: None):
        yield
    if not calls["forward"] or not calls["backward"]:
        raise AssertionError("varlen did not call torch's kernel")


def _with_gradient(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    direction = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)
    (hidden.float().tanh() * direction).sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    return hidden.detach(), gradient


def _loss_of_chunks(head: LogProbHead, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    leaf = hidden.clone().requires_grad_()
    log_probs, entropy = head(leaf, targets, 1.0, True)
    (weights[0] * log_probs + weights[1] * entropy).sum().backward()
    return log_probs.detach(), entropy.detach(), leaf.grad, head.weight.grad.clone()


def _loss_of_formula(layer: torch.nn.Linear, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    leaf, weight = hidden.float().requires_grad_(), layer.weight.detach().float().requires_grad_()
    all_log_probs = (leaf @ weight.t()).log_softmax(-1)
    log_probs = all_log_probs.gather(1, targets[:, None])[:, 0]
    entropy = -(all_log_probs.exp() * all_log_probs).sum(-1)
    (weights[0] * log_probs + weights[1] * entropy).sum().backward()
    return log_probs.detach(), entropy.detach(), leaf.grad, weight.grad


def _off(ours: Tensor, exact: Tensor) -> float:
    """Size of the difference as a share of the size of what is exact."""
    a, b = ours.detach().double().cpu(), exact.detach().double().cpu()
    return float((a - b).norm() / b.norm())
