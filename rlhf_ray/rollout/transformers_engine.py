"""A rollout engine on plain transformers, for machines without vLLM and for runs in one process.

Invariants: every number means what it means in the vLLM engine; log-probs are an fp32 log-softmax at the sampling temperature
over what min-p, top-k and top-p keep, in this order, as in vLLM; a seeded request draws from a generator of its own.

Requests of similar length are decoded together, padded on the left, with a key-value cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MinPLogitsWarper,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging as transformers_logging

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.models.dtypes import DTYPES, dtype_name
from rlhf_ray.models.forward.routing import Routing, watch
from rlhf_ray.models.weights.checkpoint import Checkpoint
from rlhf_ray.models.weights.load import load_weights
from rlhf_ray.rollout.engine import RolloutEngine
from rlhf_ray.rollout.errors import WireError
from rlhf_ray.rollout.execution import PROCESSED, versions
from rlhf_ray.rollout.requests import Generation, GenerationRequest
from rlhf_ray.trajectories.columns import FinishReason
from rlhf_ray.trajectories.kept_sets import KeptSets

MAX_ROWS = 128
"""The most requests that are decoded together, where ``rollout.max_num_seqs`` says nothing."""


@dataclass
class _Row:
    request: GenerationRequest
    generator: torch.Generator | None
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    kept: list[KeptSets] = field(default_factory=list)
    routed: list[Tensor] = field(default_factory=list)
    """The experts of all tokens read so far, of one pass each."""

    def generation(self, reason: FinishReason) -> Generation:
        versions, kept = tuple(self.weight_versions), KeptSets.join(self.kept) if self.kept else None
        routed = torch.cat(self.routed).numpy() if self.routed else None
        return Generation(
            *self.request.key, tuple(self.token_ids), tuple(self.log_probs), versions, reason, kept, routed
        )


@dataclass
class _Group:
    """Rows that are decoded together. Without a cache and a mask the next step reads their whole context."""

    rows: list[_Row]
    cache: Any = None
    """Keys and values of the tokens read so far, as transformers holds them."""
    mask: Int64[Tensor, "rows width"] | None = None
    """1 for a token that was read, 0 for the padding on its left."""


class TransformersEngine(RolloutEngine):
    """Samples with transformers."""

    def __init__(self, model_dir: str | Path, config: RolloutConfig, **settings: Any) -> None:
        """``settings`` are those of :class:`RolloutEngine`."""
        super().__init__(model_dir, config, **settings)
        transformers_logging.disable_progress_bar()
        self._hf_config = AutoConfig.from_pretrained(model_dir)
        self.vocabulary = self._hf_config.get_text_config().vocab_size
        if self._awaits_weights:
            with torch.device("meta"):  # an update builds the model anew; until then it says of which class
                self._model = AutoModelForCausalLM.from_config(self._hf_config, dtype=DTYPES[config.dtype])
        else:
            checkpoint = Checkpoint.open(str(model_dir))
            self._model = self._ready(load_weights(AutoModelForCausalLM, checkpoint, DTYPES[config.dtype]))
        self._stream = torch.Generator(self.device).manual_seed(self.stream_seed)
        self._max_rows = config.max_num_seqs or MAX_ROWS
        self._waiting: list[GenerationRequest] = []
        self._group: _Group | None = None
        self._incoming: dict[str, Tensor] = {}
        self._cuts: list[Any] = [
            *([MinPLogitsWarper(config.min_p)] if config.min_p > 0.0 else []),
            *([TopKLogitsWarper(config.top_k)] if config.top_k > 0 else []),
            *([TopPLogitsWarper(config.top_p)] if config.top_p < 1.0 else []),
        ]

    # Generating

    def _add(self, requests: Sequence[GenerationRequest]) -> None:
        self._waiting.extend(requests)

    def _running(self) -> int:
        return min(self._max_rows, len(self._waiting)) if self._group is None else len(self._group.rows)

    def _drop(self) -> None:
        self._waiting.clear()
        self._group = None

    @torch.inference_mode()
    def _advance(self) -> list[Generation]:
        if self._group is None:
            self._group = self._next_group()
        if self._group is None:
            return []
        scaled = self._logits(self._group).float() / self._temperatures(self._group)
        log_probs = torch.log_softmax(self._cut(scaled, self._group.rows), dim=-1)
        if self._cuts:
            kept = KeptSets.from_mask(log_probs > -torch.inf)
            for place, row in enumerate(self._group.rows):
                row.kept.append(kept.select(slice(place, place + 1)))
        sampled = self._sample(log_probs, self._group.rows)
        chosen = log_probs.gather(1, sampled[:, None])[:, 0]
        for row, token, log_prob in zip(self._group.rows, sampled.tolist(), chosen.tolist(), strict=True):
            row.token_ids.append(token)
            row.log_probs.append(log_prob)
            row.weight_versions.append(self.weight_version)
        return self._take_finished(self._group)

    def _next_group(self) -> _Group | None:
        """The shortest waiting requests: neighbours in length need little padding."""
        self._waiting.sort(key=lambda request: len(request.token_ids))
        chosen, self._waiting = self._waiting[: self._max_rows], self._waiting[self._max_rows :]
        return _Group([_Row(request, self._generator(request)) for request in chosen]) if chosen else None

    def _generator(self, request: GenerationRequest) -> torch.Generator | None:
        return None if request.seed is None else torch.Generator(self.device).manual_seed(request.seed)

    def _logits(self, group: _Group) -> Float[Tensor, "rows vocabulary"]:
        """Logits of the next token of each row."""
        if group.mask is None:
            token_ids, mask = self._padded([*row.request.token_ids, *row.token_ids] for row in group.rows)
        else:
            token_ids = torch.tensor([row.token_ids[-1:] for row in group.rows], device=self.device)
            mask = torch.cat([group.mask, torch.ones_like(token_ids)], dim=1)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -token_ids.shape[1] :]
        routing = watch(self._model.base_model) if self.config.routing_replay else None
        outputs = self._model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=group.cache,
            use_cache=True,
            logits_to_keep=1,
            **({} if routing is None else routing.arguments()),
        )
        if routing is not None:
            self._remember_experts(group, routing, mask[:, -token_ids.shape[1] :].bool())
        group.cache, group.mask = outputs.past_key_values, mask
        logits: Tensor = outputs.logits
        return logits[:, -1]

    def _remember_experts(self, group: _Group, routing: Routing, read: Bool[Tensor, "rows width"]) -> None:
        """Give each row the experts of the tokens that it read in this pass; one that read its whole context has no others."""
        experts = routing.column().cpu().unflatten(0, read.shape)
        for row, own, tokens in zip(group.rows, experts, read.cpu(), strict=True):
            earlier = [] if group.mask is None else row.routed
            row.routed = [*earlier, own[tokens]]

    def _padded(self, contexts: Any) -> tuple[Int64[Tensor, "rows width"], Int64[Tensor, "rows width"]]:
        """Contexts padded on the left, and the mask of their tokens."""
        contexts = list(contexts)
        token_ids = torch.zeros(len(contexts), max(map(len, contexts)), dtype=torch.int64)
        mask = torch.zeros_like(token_ids)
        for row, context in enumerate(contexts):
            token_ids[row, -len(context) :] = torch.tensor(context)
            mask[row, -len(context) :] = 1
        return token_ids.to(self.device), mask.to(self.device)

    def _temperatures(self, group: _Group) -> Float[Tensor, "rows 1"]:
        greedy = [row.request.greedy for row in group.rows]
        return torch.where(torch.tensor(greedy), 1.0, self.config.temperature)[:, None].to(self.device)

    def _sample(self, log_probs: Float[Tensor, "rows vocabulary"], rows: Sequence[_Row]) -> Int64[Tensor, " rows"]:
        """Gumbel's trick: argmax of log p + g with g = -log(e), e standard exponential, is a draw from p."""
        noise = torch.ones_like(log_probs)
        for position, row in enumerate(rows):
            if not row.request.greedy:
                noise[position].exponential_(generator=row.generator or self._stream)
        return torch.where(log_probs > -torch.inf, log_probs - noise.log(), -torch.inf).argmax(dim=-1)

    def _cut(self, scaled: Float[Tensor, "rows vocabulary"], rows: Sequence[_Row]) -> Float[Tensor, "rows vocabulary"]:
        """Take from each row what its request does not sample from; a greedy one keeps all."""
        drawn = torch.tensor([not row.request.greedy for row in rows], device=scaled.device)
        cut = scaled
        for processor in self._cuts:
            cut = processor(None, cut)
        return torch.where(drawn[:, None], cut, scaled)

    def _take_finished(self, group: _Group) -> list[Generation]:
        reasons = [self._finish_reason(row) for row in group.rows]
        finished = [
            row.generation(reason) for row, reason in zip(group.rows, reasons, strict=True) if reason is not None
        ]
        left = [index for index, reason in enumerate(reasons) if reason is None]
        if not left:
            self._group = None
        elif finished:
            group.rows = [group.rows[index] for index in left]
            group.cache.batch_select_indices(torch.tensor(left, device=self.device))
            group.mask = None if group.mask is None else group.mask[left]
        return finished

    def _finish_reason(self, row: _Row) -> FinishReason | None:
        if row.token_ids[-1] in self.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(row.token_ids) == row.request.max_new_tokens else None

    # Weights

    def _begin_load(self) -> None:
        self._incoming = {}

    def _load(self, weights: list[tuple[str, Tensor]]) -> None:
        self._incoming |= {name: weight.to(DTYPES[self.config.dtype], copy=True) for name, weight in weights}

    def _end_load(self) -> None:
        """Build the model from its state on disk: transformers maps names on disk to live ones."""
        state, self._incoming = self._incoming, {}
        model_class: Any = type(self._model)  # the types of from_pretrained do not know output_loading_info
        model, report = model_class.from_pretrained(
            None, config=self._hf_config, state_dict=state, dtype=DTYPES[self.config.dtype], output_loading_info=True
        )
        problems = {what: names for what, names in report.items() if names}
        if problems:
            raise WireError(f"transformers could not load the weights: {problems}")
        self._model = self._ready(model)
        if self._group is not None:
            self._group.cache = self._group.mask = None

    def _ready(self, model: Any) -> PreTrainedModel:
        return cast(PreTrainedModel, model.to(self.device).eval())

    # Life

    def _loaded(self) -> dict[str, Any]:
        dtype = dtype_name(self._model.dtype)
        return {
            "dtype": dtype,
            "head": dtype,
            "log_probs": PROCESSED,
            "attention": str(self._model.config._attn_implementation),
            "lora": "merged",
            "context": self.config.max_model_tokens,
            **versions("torch", "transformers", "tokenizers"),
        }

    def _close(self) -> None:
        self._drop()
        del self._model
