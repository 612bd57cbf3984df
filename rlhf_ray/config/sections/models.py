"""The ``model`` section: where a model comes from, and how its weights are held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.config.sections.base import Fraction, NonNegative, Positive, Section

Dtype = Literal["bf16", "fp16", "fp32"]
Attention = Literal["auto", "flash_attention_3", "flash_attention_2", "varlen", "sdpa"]


@dataclass(frozen=True)
class MadeShape:
    """The sizes of a model. The parameter counts in the names of :data:`MADE_SHAPES` hold for a vocabulary of 4096."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int


MADE_SHAPES: dict[str, MadeShape] = {
    "llama-tiny": MadeShape(hidden=32, intermediate=64, layers=2, heads=2, key_value_heads=1, head_dim=32),
    "llama-0.5m": MadeShape(hidden=128, intermediate=256, layers=3, heads=4, key_value_heads=4, head_dim=32),
    "llama-14m": MadeShape(hidden=384, intermediate=1024, layers=6, heads=6, key_value_heads=6, head_dim=64),
    "llama-120m": MadeShape(hidden=768, intermediate=2048, layers=16, heads=12, key_value_heads=12, head_dim=64),
}


class MakeConfig(Section):
    """A small model with random weights, made here where none can be downloaded."""

    shape: Literal["llama-tiny", "llama-0.5m", "llama-14m", "llama-120m"]
    tokenizer_from: str
    """``world`` (the words of the generated world are its tokens), a data file on whose text a byte-level BPE is trained,
    or ``data``: whatever the job's own ``data`` section names. Loading replaces ``data`` by that."""
    vocabulary: Positive = 4096
    seed: NonNegative = 0


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) that are trained in place of the weights."""

    rank: Positive
    alpha: Positive = 16
    dropout: Fraction = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"


class ModelConfig(Section):
    """Where a model comes from and how its weights are held. Exactly one of ``path`` and ``make`` is set."""

    path: str | None = None
    make: MakeConfig | None = None
    revision: str | None = None
    dtype: Dtype = "bf16"
    head_dtype: Literal["fp32", "model"] = "fp32"
    """In what the output layer over the vocabulary multiplies: logits of log-probs are fp32, or rounded to ``dtype``."""
    attention: Attention = "auto"
    lora: LoraConfig | None = None
    quantization: Literal["nf4"] | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    head_init: Literal["hf", "inv_sqrt", "inv", "zero"] | None = None
    """How a score head is initialised where the checkpoint holds none; null means that it must hold one."""
    replace_head: bool = False
    """Draw a fresh head although the checkpoint holds a trained one, which is lost."""
    value_head_prefix: str = "score"

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if (self.path is None) == (self.make is None):
            yield "", "set exactly one of path (a directory or hub id) and make (a small model made here)"
        if self.revision is not None and self.path is None:
            yield "revision", "a made model has no revision: remove it, or name a hub id in path"
        if self.replace_head and self.head_init is None:
            yield "replace_head", "true draws a fresh score head: set head_init to how, such as inv_sqrt, or remove it"
        if self.head_dtype == "model" and self.dtype == "fp32":
            yield "head_dtype", "model has no effect, since dtype is fp32: remove it"
        if self.quantization is not None and self.dtype == "fp32":
            yield "quantization", f"{self.quantization} computes in half precision, but dtype is fp32: set it to bf16"
