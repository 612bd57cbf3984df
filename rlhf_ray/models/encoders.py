"""Score with an encoder, a sequence classifier of transformers such as DeBERTa with one label.

Invariants: a score is that of transformers for the sequence alone, in any company. The head computes in fp32 whatever the dtype
of the weights. Token ids alone decide the rest of the input: what follows the first separator is the second text.

Sequences run in padded batches of similar lengths. A model whose scores depend on padding runs batches of equal lengths. The
last layer runs for the first token only where the head reads no other. Both are tried out when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_ray.config.files.positions import longest_sequence
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.dtypes import dtype_name, torch_dtype
from rlhf_ray.models.weights.encoder_config import EncoderCheckpoint
from rlhf_ray.models.weights.load import load_weights
from rlhf_ray.trajectories.length_batches import make_length_batches
from rlhf_ray.trajectories.schedule import MicroBatch

AGREES_TO = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest relative difference of the scores of :data:`PROBES` with which a faster way to compute them is taken."""
TOKENS_AT_ONCE_ON_CPU = 2048
"""The largest batch on CPU, in tokens: the intermediate results of a larger one no longer fit into the caches."""
PROBES = ((7, 3), (5, 11))
"""First id and length of two short sequences that are scored alone, together, and with a narrow last layer."""


class Encoder:
    """An encoder with one score."""

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        assert config.path is not None, "only a directory or a hub id holds an encoder"
        checkpoint = EncoderCheckpoint.open(config.path, config.revision, trust_remote_code=config.trust_remote_code)
        model: Any = load_weights(
            AutoModelForSequenceClassification,
            checkpoint,
            torch_dtype(config.dtype),
            device=device,
            trust_remote_code=config.trust_remote_code,
        )
        self.model = model.eval().requires_grad_(False)
        self.config, self.device = model.config, device
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self.positions = longest_sequence(model.config.to_dict())
        self._separator = _separator(model, tokenizer)
        _compute_heads_in_fp32(model)
        probes = [[(start + i) % self.vocabulary for i in range(length)] for start, length in PROBES]
        alone = self._alone(probes)
        self.padded = _agree(self.scores(probes), alone, model.dtype)
        self._narrow_last_layer(probes, alone)
        get_logger(__name__).info("%s: %s", config.path, self.describe())

    def describe(self) -> str:
        """One line about the model."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"reward {type(self.model).__name__}, {size / 1e6:.3g}M parameters, {dtype_name(self.model.dtype)}, an encoder: "
            + ("" if self.positions is None else f"reads at most {self.positions} tokens, ")
            + "prompt and response as a pair of texts, in batches of "
            + ("similar lengths" if self.padded else "equal lengths, since padding changes its scores")
        )

    def batches(self, lengths: Sequence[int], *, max_tokens: int) -> list[MicroBatch]:
        """Batches of at most ``max_tokens`` tokens, on CPU fewer, by the indices of their sequences."""
        if self.device.type == "cpu":
            max_tokens = min(max_tokens, TOKENS_AT_ONCE_ON_CPU)
        return make_length_batches(lengths, max_tokens=max_tokens, padded=self.padded)

    @torch.inference_mode()
    def scores(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The raw score of each sequence of token ids, (sequences,), in one padded batch."""
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=self.device)
        attended = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        ids = torch.full(attended.shape, self.config.get_text_config().pad_token_id or 0, device=self.device)
        ids[attended] = torch.tensor([token for sequence in sequences for token in sequence], device=self.device)
        inputs = {"input_ids": ids, "attention_mask": attended.long()}
        if self._separator is not None:
            separators = (ids == self._separator).long()
            second = (separators.cumsum(1) - separators).clamp(max=1)
            inputs["token_type_ids"] = second * attended
        scores: Tensor = self.model(**inputs).logits[:, 0]
        return scores.float()

    def _alone(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        return torch.cat([self.scores([sequence]) for sequence in sequences])

    def _narrow_last_layer(self, probes: Sequence[Sequence[int]], alone: Tensor) -> None:
        """Compute what follows the attention of the last layer for the first token only, if the scores stay what they are.

        That is so where the head reads the first token. A head that reads others gives other scores, or does not run.
        """
        output = _last_attention_output(self.model)
        if output is None:
            return
        hook = output.register_forward_pre_hook(lambda _, inputs: tuple(hidden[:, :1] for hidden in inputs))
        try:
            agrees = _agree(self._alone(probes), alone, self.model.dtype)
        except (RuntimeError, IndexError):
            agrees = False
        if not agrees:
            hook.remove()


def _separator(model: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token after which the second text begins, for a model that has a type for its tokens; else None."""
    types = getattr(model.config, "type_vocab_size", 0) or 0
    example = tokenizer("one", "two")
    if types < 2 or max(example.get("token_type_ids", [0])) == 0:
        return None
    if tokenizer.sep_token_id is None:
        raise ModelLoadError(
            f"the tokenizer of this {type(model).__name__} has no sep_token, so that the second of two texts cannot be found: "
            "name it in its tokenizer_config.json"
        )
    return int(tokenizer.sep_token_id)


def _agree(scores: Tensor, alone: Tensor, dtype: torch.dtype) -> bool:
    return float((scores - alone).abs().max()) <= AGREES_TO[dtype] * max(1.0, float(alone.abs().max()))


def _last_attention_output(model: Any) -> nn.Module | None:
    """The module behind the attention of the last layer in models of BERT's kind, which is called with hidden states alone."""
    stacks = [module for name, module in model.named_modules() if name.endswith("encoder.layer")]
    output = getattr(getattr(stacks[0][-1], "attention", None), "output", None) if stacks else None
    return output if isinstance(output, nn.Module) else None


def _compute_heads_in_fp32(model: Any) -> None:
    """Make everything behind the backbone compute in fp32."""
    for name, module in model.named_children():
        if name != model.base_model_prefix:
            module.float().register_forward_pre_hook(_first_in_fp32)


def _first_in_fp32(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    is_hidden = bool(inputs) and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point()
    return (inputs[0].float(), *inputs[1:]) if is_hidden else inputs
