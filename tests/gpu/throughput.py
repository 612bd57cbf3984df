"""Tokens a second of training and scoring on packs, and the share of what the GPU's matrix products can do.

Always true: the rate of matrix products is measured on the same GPU in the same process; operations are those that the
model needs (``rlhf_ray.planning.flops``), not what gradient checkpointing computes again. Where a share is below a half,
the kernels that took the time are listed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.figures import Figure, Figures
from benchmarks.sequences import ragged_sequences
from rlhf_ray.engine.matmul_rate import matmul_rate
from rlhf_ray.environment import Device
from rlhf_ray.models import Actor, PackedPolicy, PackedRegression
from rlhf_ray.models.regression_loading import make_head, wrap_backbone
from rlhf_ray.models.weights.lora import add_lora
from rlhf_ray.planning.flops import ComputeShape, training_flops
from rlhf_ray.trajectories import Packed, TrajectoryBatch, make_schedule, pack
from tests.gpu.shapes import SHAPES, compute_shape, make, scoring_flops
from tests.gpu.sizes import Sizes

LORA_RANK = 16
GOOD_SHARE = 0.5
KERNELS_LISTED = 15
Findings = tuple[Figures, str]


def policy_of_small_model(device: Device, sizes: Sizes) -> Findings:
    """Training and scoring of a policy, without an optimizer, all activations kept."""
    actor = Actor(make(sizes.small, device), attn_implementation="auto")
    policy, bench = PackedPolicy(actor), Bench(sizes.small, device, sizes, sizes.batch)
    shape, method = compute_shape(actor.model), f"policy, attention {actor.attention}"
    trained = bench.measure(
        "policy_training",
        f"{method}, log-probs, entropies and backward, no optimizer step",
        lambda part: _train_policy(policy, part),
        training_flops(shape, bench.lengths),
    )
    policy.zero_grad(set_to_none=True)
    return _together(trained, _score_policy(bench, policy, shape, method))


def policy_scoring_of_large_model(device: Device, sizes: Sizes) -> Findings:
    """Log-probs of a policy, without gradients."""
    actor = Actor(make(sizes.large, device), attn_implementation="auto")
    bench = Bench(sizes.large, device, sizes, sizes.large_batch)
    return _score_policy(bench, PackedPolicy(actor), compute_shape(actor.model), f"policy, attention {actor.attention}")


def reward_lora_of_large_model(device: Device, sizes: Sizes) -> Findings:
    """Scores of a reward model, and its training with LoRA and gradient checkpointing, without an optimizer."""
    model = reward_model(sizes.large, device)
    add_lora(model.backbone, rank=LORA_RANK, alpha=LORA_RANK, dropout=0.0, targets="all-linear")
    model.gradient_checkpointing_enable()
    reward, bench = PackedRegression(model), Bench(sizes.large, device, sizes, sizes.large_batch)
    shape, method = compute_shape(model.backbone), f"reward model, attention {model.attention}"

    @torch.no_grad()
    def score(part: Packed) -> None:
        reward(part, "scores")

    scored = bench.measure("reward_scoring", method, score, scoring_flops(shape, bench.lengths))
    reward.train()
    trained = bench.measure(
        "reward_lora_training",
        f"{method}, LoRA of rank {LORA_RANK}, gradient checkpointing, no optimizer step",
        lambda part: reward(part, "scores").sum().backward(),
        training_flops(shape, bench.lengths),
    )
    return _together(scored, trained)


def reward_model(name: str, device: Device, layers: int | None = None) -> Any:
    """A reward model of a shape, with a fresh head."""
    backbone = make(name, device, layers).base_model
    head = make_head(backbone, "inv_sqrt", 0)
    model = wrap_backbone(
        backbone, head, "reward", attention="auto", strict_attention=False, head_origin="fresh, inv_sqrt, seed 0"
    )
    gc.collect()  # the output layer, which nothing holds any more
    return model.eval()


class Bench:
    """Made sequences in packs, and the rate of matrix products at this moment."""

    def __init__(self, name: str, device: Device, sizes: Sizes, count: int) -> None:
        self.name, self.device, self.repeats = name, device, sizes.repeats
        batch = TrajectoryBatch.from_sequences(ragged_sequences(count, int(SHAPES[name]["vocab_size"])))
        self.lengths: list[int] = batch.lengths.tolist()
        micro_batches = make_schedule(self.lengths, ranks=1, max_tokens=sizes.budget).rank(0)
        self.packs = [pack(batch, indices).to(device) for indices in micro_batches]
        self.method = f"{count} made sequences of {batch.num_tokens} tokens in packs of at most {sizes.budget}"
        self.rate = matmul_rate(torch.bfloat16, torch.device(device))

    def measure(self, work: str, method: str, step: Callable[[Packed], object], flops: float) -> Findings:
        """Figures of a step over each pack, and what took its time if that is more than twice what the products take."""

        def over_all(packs: list[Packed]) -> None:
            for part in packs:
                step(part)

        return self.measure_batch(work, method, over_all, flops)

    def measure_batch(self, work: str, method: str, step: Callable[[list[Packed]], object], flops: float) -> Findings:
        """The same of a step that takes all packs at once."""
        reset_peak(self.device)
        seconds = median([self._once(step) for _ in range(self.repeats + 1)][1:])
        method = f"{self.name} with random weights, bf16, {method}, {self.method}; median of {self.repeats}"
        share = flops / seconds / self.rate
        name = f"gpu.{self.name}.{work}"
        figures = {
            f"{name}_tokens_per_second": Figure(sum(self.lengths) / seconds, "tokens/s", True, method),
            f"{name}_share_of_matmul": Figure(
                share, "share", True, f"{method}; products at {self.rate / 1e12:.3g} TFLOP/s, measured beside it"
            ),
        } | peak_figure(f"{name}_peak_memory", self.device, method)
        if share >= GOOD_SHARE:
            return figures, ""
        return figures, f"what stands between {work} and the products of matrices:\n{self._kernels(step)}"

    def _once(self, step: Callable[[list[Packed]], object]) -> float:
        synchronize(self.device)
        began = time.perf_counter()
        step(self.packs)
        synchronize(self.device)
        return time.perf_counter() - began

    def _kernels(self, step: Callable[[list[Packed]], object]) -> str:
        activity = ProfilerActivity.CUDA if self.device == "cuda" else ProfilerActivity.CPU
        try:
            with profile(activities=[activity], acc_events=True) as record:
                step(self.packs[:1])
                synchronize(self.device)
        except RuntimeError as error:  # the figures are worth keeping all the same
            return f"no profile, since {error}"
        order = "self_cuda_time_total" if self.device == "cuda" else "self_cpu_time_total"
        return str(record.key_averages().table(sort_by=order, row_limit=KERNELS_LISTED, max_name_column_width=70))


def _train_policy(policy: nn.Module, part: Packed) -> None:
    outputs = policy(part, with_entropy=True)
    (outputs.log_probs.sum() + 0.01 * outputs.entropy.sum()).backward()


def _score_policy(bench: Bench, policy: nn.Module, shape: ComputeShape, method: str) -> Findings:
    @torch.no_grad()
    def score(part: Packed) -> None:
        policy(part)

    return bench.measure("policy_scoring", f"{method}, log-probs", score, scoring_flops(shape, bench.lengths))


def _together(*findings: Findings) -> Findings:
    figures: Figures = {}
    for found, _ in findings:
        figures |= found
    return figures, "\n".join(text for _, text in findings if text)


def synchronize(device: Device) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: Device) -> None:
    """Begin to watch how much of the GPU's memory is allocated."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_figure(name: str, device: Device, method: str) -> Figures:
    """The most memory that was allocated on the GPU since :func:`reset_peak`; nothing on a CPU, where torch does not count."""
    if device == "cpu":
        return {}
    return {name: Figure(torch.cuda.max_memory_allocated() / 1e9, "GB", False, method)}
