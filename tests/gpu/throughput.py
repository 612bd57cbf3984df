"""Tokens a second of training and scoring on packs, and the share of what the GPU's matrix products can do.

Always true: the roof is measured on the same GPU in the same minute; operations are those of the model (6 a weight and
token for training, 2 for scoring, plus attention within segments), not what is computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config

from benchmarks.figures import Figure, Figures
from benchmarks.sequences import ragged_sequences
from rlhf_ray.models import Actor, PackedPolicy
from rlhf_ray.models.weights.tiny_llama import make_config
from rlhf_ray.trajectories import Packed, TrajectoryBatch, make_schedule, pack

REPEATS = 5
QWEN3_06B = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-120m": lambda: make_config("llama-120m", 32000),
    "qwen3-0.6b": lambda: Qwen3Config(**QWEN3_06B),
}


def measure(name: str, device: str, *, count: int = 512, budget: int = 32768, roof_size: int = 8192) -> Figures:
    """Figures of a model with random weights in bf16 on made sequences."""
    config = CONFIGS[name]()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    actor = Actor(model, attn_implementation="auto")
    policy = PackedPolicy(actor)
    batch = TrajectoryBatch.from_sequences(ragged_sequences(count, config.vocab_size))
    micro_batches = make_schedule(batch.lengths.tolist(), ranks=1, max_tokens=budget).rank(0)
    packs = [pack(batch, indices).to(device) for indices in micro_batches]
    roof = matmul_roof(roof_size, device)
    seconds = {
        "training": _seconds(lambda: _train(policy, packs), device),
        "scoring": _seconds(lambda: _score(policy, packs), device),
    }
    forward = forward_operations(model, batch.lengths.tolist())
    method = (
        f"{name} with random weights, bf16, attention {actor.attention}, {count} made sequences of {batch.num_tokens} "
        f"tokens in packs of at most {budget}, {{}}; median of {REPEATS}; roof {roof / 1e12:.0f} TFLOP/s, measured"
    )
    what = {"training": (3, "log-probs, entropies and backward, no optimizer step"), "scoring": (1, "log-probs")}
    figures: Figures = {}
    for work, (times, does) in what.items():
        meaning, took = method.format(does), seconds[work]
        figures[f"gpu.{name}.{work}_tokens_per_second"] = Figure(batch.num_tokens / took, "tokens/s", True, meaning)
        figures[f"gpu.{name}.{work}_share_of_roof"] = Figure(times * forward / took / roof, "share", True, meaning)
    return figures


def forward_operations(model: torch.nn.Module, lengths: list[int]) -> float:
    """Operations of one forward pass: 2 a token and weight that multiplies, and causal attention within segments."""
    config = model.config
    tied = config.tie_word_embeddings
    weights = sum(parameter.numel() for parameter in model.parameters())
    multiplying = weights if tied else weights - model.get_input_embeddings().weight.numel()
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return float(2 * multiplying * sum(lengths) + attention * sum(length**2 for length in lengths))


def matmul_roof(size: int, device: str) -> float:
    """Operations a second of a square bf16 product of random numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 10 * 2 * size**3 / _seconds(lambda: [a @ b for _ in range(10)], device)


def _train(policy: PackedPolicy, packs: list[Packed]) -> None:
    for part in packs:
        outputs = policy(part, with_entropy=True)
        (outputs.log_probs.sum() + 0.01 * outputs.entropy.sum()).backward()
    policy.zero_grad(set_to_none=True)


@torch.no_grad()
def _score(policy: PackedPolicy, packs: list[Packed]) -> None:
    for part in packs:
        policy(part)


def _seconds(work: Callable[[], object], device: str) -> float:
    """Wall seconds until the device has done the work, median after one round that is not counted."""
    return median([_once(work, device) for _ in range(REPEATS + 1)][1:])


def _once(work: Callable[[], object], device: str) -> float:
    _synchronize(device)
    began = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
