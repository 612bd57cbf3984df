"""The formula of planning for activations agrees with what autograd keeps of a forward pass, counted by storages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.forward import log_probs
from rlhf_ray.models.forward.log_probs import LogProbHead, chunk_size
from rlhf_ray.planning import memory
from rlhf_ray.planning.memory import activation_parts, kept_by_layer, tokens_of_a_chunk
from rlhf_ray.planning.model_size import ModelSize
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import pack

VOCABULARY, LENGTH, SEQUENCES = 64, 32, 1
"""A short sequence: on CPU the scores of attention are kept too, which are as wide as a sequence is long."""
KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def size_of(kind: str, hidden: int, width: int, layers: int, heads: int, head_dim: int) -> ModelSize:
    return ModelSize(
        numbers=0, trained=0, four_bit=0, vectors=0, largest=0, layers=layers, hidden=hidden, width=width,
        query=heads * head_dim, key_value=heads * head_dim, vocabulary=VOCABULARY, normed_heads=kind == "qwen3",
    )  # fmt: skip


def kept_bytes(
    kind: str, hidden: int, width: int, layers: int, heads: int, head_dim: int, *, checkpointing: bool
) -> int:
    """Bytes of all storages that autograd saves in a forward pass over a pack, without those of parameters."""
    config, architecture = KINDS[kind]
    torch.manual_seed(0)
    model = architecture(
        config(
            hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, head_dim=head_dim, vocab_size=VOCABULARY,
        )
    )  # fmt: skip
    actor = Actor(model.to(torch.bfloat16), attn_implementation="sdpa", param_dtype="bf16").train()
    if checkpointing:
        actor.gradient_checkpointing_enable()
    tokens = [torch.randint(0, VOCABULARY, (LENGTH,)) for _ in range(SEQUENCES)]
    batch = TrajectoryBatch.from_sequences(tokens, action_mask=[[False] + [True] * (LENGTH - 1)] * SEQUENCES)
    module = PackedPolicy(actor)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(pack(batch))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("shape", [(64, 160, 4, 1, 64), (96, 96, 3, 1, 128)], ids=["wide MLP", "wide attention"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_layer_keeps_the_bytes_that_planning_says(kind: str, shape: tuple[int, int, int, int, int]) -> None:
    hidden, width, layers, heads, head_dim = shape
    more = kept_bytes(kind, hidden, width, 2 * layers, heads, head_dim, checkpointing=False)
    one = kept_bytes(kind, hidden, width, layers, heads, head_dim, checkpointing=False)
    stated = kept_by_layer(size_of(kind, *shape), "bf16")
    assert (more - one) / layers / (LENGTH * SEQUENCES) == pytest.approx(stated, rel=0.05)


def test_with_checkpointing_a_layer_keeps_its_input_alone() -> None:
    shape = (64, 160, 4, 1, 64)
    size = size_of("llama", *shape)
    part = next(iter(activation_parts(size, "bf16", training=1, forward=0, checkpointing=True)))
    working = (3 * size.width + 2 * size.hidden) * 2
    stated = part.bytes - kept_by_layer(size, "bf16") - working
    assert kept_bytes("llama", *shape, checkpointing=True) / (LENGTH * SEQUENCES) == pytest.approx(stated, rel=0.05)


@pytest.mark.parametrize("vocabulary", [1000, 32_000, 151_936])
def test_planning_counts_with_the_chunk_of_the_head(vocabulary: int) -> None:
    assert tokens_of_a_chunk(vocabulary) == chunk_size(vocabulary, on_gpu=True)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it held at once, by storages, without those of ``given`` ones."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.made: list[tuple[ref[Tensor], int, int]] = []
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in [result] if isinstance(result, Tensor) else []:
            storage = tensor.untyped_storage()
            self.made.append((ref(tensor), storage.data_ptr(), storage.nbytes()))
        alive = {
            pointer: size for tensor, pointer, size in self.made if tensor() is not None and pointer not in self.given
        }
        self.made = [one for one in self.made if one[0]() is not None]
        self.bytes = max(self.bytes, sum(alive.values()))
        return result


@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_head_holds_the_logits_that_planning_says(with_entropy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, hidden, chunk = 8192, 16, chunk_size(8192)
    monkeypatch.setattr(memory, "tokens_of_a_chunk", lambda size: chunk)
    monkeypatch.setattr(log_probs, "blocks_suit", lambda *_: False)  # as on a GPU, whose memory is planned
    size = replace(size_of("llama", hidden, 0, 1, 1, 16), vocabulary=vocabulary, numbers=1, trained=1)
    score, backward = (part.bytes for part in memory.head_parts(size, "fp32", trains=True))
    head = LogProbHead.around(torch.nn.Linear(hidden, vocabulary, bias=False), None)
    inputs, targets = torch.randn(2 * chunk, hidden), torch.zeros(2 * chunk, dtype=torch.int64)
    with torch.no_grad(), Peak(inputs, head.weight) as scoring:
        head(inputs, targets, with_entropy=with_entropy)
    assert scoring.bytes == pytest.approx(2 * score if with_entropy else score, rel=0.05)
    with Peak(inputs, head.weight) as training:
        head(inputs.requires_grad_(), targets, with_entropy=with_entropy)[0].sum().backward()
    stated = backward if with_entropy else score + vocabulary * hidden * 4
    assert training.bytes == pytest.approx(stated, rel=0.05)
