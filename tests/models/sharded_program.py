"""One of two ranks that build models in shards and run them on ragged packs.

Usage: sharded_program.py RANK PORT DIRECTORY
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_ray.algorithms.losses import LossOutput, NegativeLogLikelihood
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.engine import Engine, destroy_process_group, init_process_group, rendezvous
from rlhf_ray.engine.settings import deepspeed_config
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models import load_regression
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.description import describe
from rlhf_ray.models.disk_names import to_disk_names
from rlhf_ray.models.forward import log_probs
from rlhf_ray.models.regression import PackedRegression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression
from rlhf_ray.models.save import save_adapter, save_pretrained
from rlhf_ray.models.weights import adapter_modules
from rlhf_ray.models.weights.adapter_modules import read_adapter
from rlhf_ray.models.weights.checkpoint import Checkpoint
from rlhf_ray.trajectories import TrajectoryBatch, pack

WORLD = 2
INFERENCE = EngineConfig(zero=3)
SHARDS = deepspeed_config(INFERENCE, dtype="fp32", trainable=False, world_size=WORLD, whole_below=0)
TARGETS = ["q_proj", "v_proj"]


class Reads:
    """Counts the bytes of tensors that this process reads from checkpoints."""

    def __init__(self) -> None:
        self.bytes, self._read = 0, Checkpoint.read

    def __enter__(self) -> Reads:
        def read(checkpoint: Checkpoint, name: str) -> Tensor:
            tensor = self._read(checkpoint, name)
            self.bytes += tensor.nbytes
            return tensor

        Checkpoint.read = read  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Checkpoint.read = self._read  # type: ignore[method-assign]


class Copied(TorchDispatchMode):
    """Counts the bytes that are copied from the tensors of an adapter's file, which is mapped until then."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.files = 0, list[dict[str, Tensor]]()

    def read_adapter(self, directory: Path) -> dict[str, Tensor]:
        self.files.append(read_adapter(directory))
        return self.files[-1]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            files = (tensor for file in self.files for tensor in file.values())
            self.bytes += args[1].nbytes if any(args[1].data_ptr() == tensor.data_ptr() for tensor in files) else 0
        return function(*args, **(kwargs or {}))


def share(module: nn.Module) -> float:
    """What part of its parameters this rank holds."""
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_tensor")]
    return sum(p.ds_tensor.numel() for p in parameters) / sum(p.ds_numel for p in parameters)


def ragged(rank: int) -> TrajectoryBatch:
    """Sequences in which all tokens but the first are actions: three on one rank, one on the other."""
    generator = torch.Generator().manual_seed(rank)
    sequences = [torch.randint(3, 48, (length,), generator=generator) for length in ((9, 4, 17), (2,))[rank]]
    masks = [[False] + [True] * (len(sequence) - 1) for sequence in sequences]
    return TrajectoryBatch.from_sequences(sequences, action_mask=masks)


def run(module: nn.Module, function: Callable[[nn.Module], Tensor]) -> list[float]:
    """Call a module as an engine that does not train it."""
    engine = Engine(module, INFERENCE, dtype="fp32", total_updates=None, trainable=False)
    out = engine.evaluate(function)
    engine.close()
    return list(out.tolist())


def numbers(rank: int, directory: Path, family: str) -> dict[str, Any]:
    """Log-probs and scores of a model in shards, and the model as it is written from there."""
    batch, name = ragged(rank), str(directory / family)
    with Reads() as reads:
        actor = Actor(name, param_dtype="fp32", ds_config=SHARDS)
    measured: dict[str, Any] = {"share": share(actor), "report": describe(actor), "read": reads.bytes}
    engine = Engine(PackedPolicy(actor), INFERENCE, dtype="fp32", total_updates=None, trainable=False)
    measured["log_probs"] = engine.evaluate(lambda module: module(pack(batch)).log_probs).tolist()
    state = {n: t for group in engine.full_state(actor.model) for n, t in to_disk_names(actor.model, group)}
    if rank == 0:
        save_pretrained(actor, None, directory / f"{family} saved", state=state)
    engine.close()
    reward = get_llm_for_sequence_regression(
        name, "reward", param_dtype="fp32", ds_config=SHARDS, init_value_head=True, seed=3
    )
    measured["scores"] = run(PackedRegression(reward), lambda module: module(pack(batch), "scores"))
    return measured


def written(rank: int, directory: Path, family: str) -> dict[str, Any]:
    """The model as it is written from shards, without more."""
    with Reads() as reads:
        actor = Actor(str(directory / family), param_dtype="fp32", ds_config=SHARDS)
    engine = Engine(PackedPolicy(actor), INFERENCE, dtype="fp32", total_updates=None, trainable=False)
    state = dict(engine.disk_weights(actor.model))
    if rank == 0:
        save_pretrained(actor, None, directory / f"{family} saved", state=state)
    engine.close()
    return {"read": reads.bytes}


def grown(rank: int, directory: Path) -> dict[str, Any]:
    """A reward model whose tokenizer has more tokens than the embedding has rows."""
    config = ModelConfig(path=str(directory / "unpadded"), dtype="fp32", head_init="inv")
    reward = load_regression(config, "reward", ds_config=SHARDS, seed=5)
    embedding = reward.get_input_embeddings()
    rows = tuple(embedding.weight.ds_shape)
    ids = torch.tensor([50, 7, 55, 48])
    batch = TrajectoryBatch.from_sequences([ids])
    scores = run(PackedRegression(reward), lambda module: module(pack(batch), "scores"))
    return {"rows": rows, "share": share(embedding), "ids": ids.tolist(), "scores": scores}


def adapted(rank: int, directory: Path) -> dict[str, Any]:
    """An adapter directory over its base in shards, and written again from there."""
    with Reads() as reads, Copied() as copied:
        adapter_modules.read_adapter = copied.read_adapter
        reward = get_llm_for_sequence_regression(
            str(directory / "adapter"), "reward", param_dtype="fp32", ds_config=SHARDS
        )
        adapter_modules.read_adapter = read_adapter
    engine = Engine(PackedRegression(reward), INFERENCE, dtype="fp32", total_updates=None, trainable=False)
    scores = engine.evaluate(lambda module: module(pack(ragged(rank)), "scores")).tolist()
    whole = [pair for group in engine.full_state(reward) for pair in group]
    if rank == 0:
        save_adapter(reward, None, directory / "adapter saved", tensors=whole)
    engine.close()
    return {"scores": scores, "read": reads.bytes, "copied": copied.bytes}


def trained(rank: int, directory: Path, family: str, zero: int, lora: bool) -> dict[str, Any]:
    """Two updates on ragged ranks: what they moved, on rank 0."""
    optimizer = OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.9), eps=1e-3)
    config = EngineConfig(zero=zero, optimizer=optimizer)
    settings = deepspeed_config(config, dtype="fp32", trainable=True, world_size=WORLD, whole_below=0)
    torch.manual_seed(7)
    options = {"lora_rank": 2, "target_modules": TARGETS} if lora else {}
    actor = Actor(str(directory / family), param_dtype="fp32", ds_config=settings, **options)
    if lora:
        actor.gradient_checkpointing_enable()
    engine = Engine(PackedPolicy(actor), config, dtype="fp32", total_updates=4, trainable=True)

    def step(module: nn.Module, batch: TrajectoryBatch) -> LossOutput:
        return NegativeLogLikelihood()(module(pack(batch)), batch)

    norms = []
    for _ in range(2):
        report = engine.accumulate([ragged(rank)], step, 30.0)
        norms.append(engine.apply(skip=not report.finite).grad_norm)
    state = {n: t.flatten().tolist() for group in engine.full_state(actor.model) for n, t in group}
    engine.close()
    return {"norms": norms, "state": state}


class Listed(nn.Module):
    """A mixture whose experts are modules of their own, as in models that bring their code."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, inputs: Tensor, expert: int) -> Tensor:
        out: Tensor = self.experts[expert](inputs)
        return out


class Routed(nn.Module):
    """A model around it, in which each rank takes another expert."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.entry, self.mixture = nn.Linear(4, 4), Listed()

    def forward(self, inputs: Tensor, expert: int) -> Tensor:
        out: Tensor = self.mixture(self.entry(inputs), expert)
        return out


def listed(rank: int) -> dict[str, Any]:
    """Ranks that call other experts meet all the same, forward and backward."""
    inputs, model = torch.linspace(-1, 1, 12).view(3, 4), Routed()
    expected = model(inputs, rank).detach()
    (model(inputs, 0).sum() + model(inputs, 1).sum()).backward()
    whole = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    config = EngineConfig(zero=3, optimizer=OptimizerConfig(learning_rate=0.1))
    engine = Engine(Routed(), config, dtype="fp32", total_updates=2, trainable=True)
    measured = engine.evaluate(lambda module: module(inputs, rank))
    engine.accumulate([rank], lambda module, expert: LossOutput(module(inputs, expert).sum(), {}), 1.0)
    norm = engine.apply(skip=False).grad_norm
    engine.close()
    return {"equal": torch.allclose(measured, expected, atol=1e-6), "norm": norm, "whole": float(whole)}


def refusals(directory: Path) -> list[str]:
    """Errors for checkpoints of another kind, and for 4 bits in shards."""
    messages = []
    cases = (("misshapen", {}), ("headless", {}), ("llama", {"load_in_4bit": True}))
    for family, options in cases:
        try:
            Actor(str(directory / family), param_dtype="fp32", ds_config=SHARDS, **options)
        except ModelLoadError as error:
            messages.append(str(error))
    return messages


def main(rank: int, port: int, directory: Path) -> None:
    torch.set_num_threads(1)
    init_process_group(rank, WORLD, rendezvous(rank, WORLD, "127.0.0.1", port), timeout_s=60.0)
    log_probs.LOGITS_AT_ONCE, log_probs.FEWEST_TOKENS_AT_ONCE = 1, 3  # ten chunks on one rank, one on the other
    batch = ragged(rank)
    measured: dict[str, Any] = {"tokens": [batch["token_ids"].tolist(), batch.offsets.tolist()]}
    for family in ("llama", "gemma2", "mixtral", "olmoe"):
        measured[family] = numbers(rank, directory, family)
    measured["minimax-m2"] = written(rank, directory, "minimax-m2")
    measured["grown"], measured["adapted"] = grown(rank, directory), adapted(rank, directory)
    for family, lora in (("mixtral", False), ("olmoe", True)):
        for zero in (0, 3):
            measured[f"{family} trained at {zero}"] = trained(rank, directory, family, zero, lora)
    measured["listed"], measured["refused"] = listed(rank), refusals(directory)
    (directory / f"rank{rank}.json").write_text(json.dumps(measured))
    dist.barrier()
    destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
