"""A causal language model as a policy, or as the frozen reference that a policy is compared with.

Invariant: log-probabilities and entropies are fp32, at the given temperature, and computed in chunks. They are the same
whether sequences run packed, padded on either side, or one by one.

:class:`Actor` works on padded batches with OpenRLHF's conventions: index t is about the prediction of token t + 1.
:class:`PackedPolicy` works on packs with the alignment of this project: ``log_probs[t]`` is about token t.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_ray.algorithms.losses import Divergence, PolicyOutputs
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ModelLoadError, RequestError
from rlhf_ray.models.description import ModelFacts, describe
from rlhf_ray.models.dtypes import torch_dtype
from rlhf_ray.models.forward.divergence import Teacher
from rlhf_ray.models.forward.liger import use_liger
from rlhf_ray.models.forward.log_probs import LogProbHead
from rlhf_ray.models.forward.packed import distinct, packed_forward, padded_positions, read_forward, unpad
from rlhf_ray.models.forward.rotation import share_alike
from rlhf_ray.models.weights.adapters import load_adapter, refuse_second_adapter
from rlhf_ray.models.weights.checkpoint import Checkpoint
from rlhf_ray.models.weights.embeddings import input_embedding
from rlhf_ray.models.weights.encoder_config import refuse_encoder
from rlhf_ray.models.weights.load import (
    check_packing,
    device_of,
    install_log_prob_head,
    load_weights,
    prepare_for_packs,
    refuse_what_does_not_run,
)
from rlhf_ray.models.weights.lora import adapted_layers, add_lora
from rlhf_ray.trajectories.packing import Packed


class Actor(nn.Module):
    """A causal language model as a policy, with the parameters and conventions of OpenRLHF's class of this name.

    ``attn_implementation`` names the preferred attention backend. If it cannot run here, the fastest that can takes its place
    and the line on loading says so; with ``strict_attention`` it is an error. ``device`` is where the model computes; without
    one it lies where ``device_map`` puts it, by default on the CPU. If ``ds_config`` asks for ZeRO-3, a model that is loaded
    from disk is built in shards, on all ranks together. ``head_dtype`` says what log-probs' logits are multiplied in.
    """

    def __init__(
        self,
        pretrain_or_model: str | nn.Module,
        attn_implementation: str = "flash_attention_2",
        param_dtype: str = "bf16",
        load_in_4bit: bool = False,
        lora_rank: int = 0,
        lora_alpha: float = 16,
        lora_dropout: float = 0,
        target_modules: str | list[str] | None = None,
        ds_config: dict[str, Any] | None = None,
        device_map: Any = None,
        packing_samples: bool = False,
        temperature: float = 1.0,
        use_liger_kernel: bool = False,
        *,
        device: torch.device | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        strict_attention: bool = False,
        head_dtype: Literal["fp32", "model"] = "fp32",
    ) -> None:
        super().__init__()
        adapter = None
        if isinstance(pretrain_or_model, str):
            checkpoint = Checkpoint.open(pretrain_or_model, revision, trust_remote_code=trust_remote_code)
            adapter = checkpoint.adapter
            refuse_encoder(checkpoint)
            refuse_second_adapter(pretrain_or_model, adapter, lora_rank)
            refuse_what_does_not_run(checkpoint, scores=False, writes=True)
            model = load_weights(
                AutoModelForCausalLM,
                checkpoint,
                torch_dtype(param_dtype),
                ds_config=ds_config,
                device=device,
                device_map=device_map,
                trust_remote_code=trust_remote_code,
                load_in_4bit=load_in_4bit,
            )
        else:
            model = _check_model(pretrain_or_model, load_in_4bit)
            if device is not None:
                nn.Module.to(model, device)
        device = device or device_of(model)
        if use_liger_kernel:
            use_liger(model, device)
        self.attention, self.attention_note = prepare_for_packs(
            model, attn_implementation, strict=strict_attention, device=device
        )
        install_log_prob_head(model).fp32 = head_dtype == "fp32"
        self.model = model
        check_packing(model, self.backbone)
        if adapter is not None:
            load_adapter(model, adapter)
        elif lora_rank:
            add_lora(model, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, targets=target_modules)
        if hasattr(model.config, "output_router_logits"):
            model.config.output_router_logits = True
        self.temperature, self.packing_samples = temperature, packing_samples
        if isinstance(pretrain_or_model, str):
            get_logger(__name__).info("%s: %s", pretrain_or_model, describe(self))

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformers model without its output layer."""
        return cast(PreTrainedModel, self.model.base_model)

    @property
    def log_prob_head(self) -> LogProbHead:
        """The output layer, which computes log-probabilities in chunks."""
        head: LogProbHead = self.model.get_output_embeddings()
        return head

    @property
    def config(self) -> Any:
        """The config of the transformers model."""
        return self.model.config

    def facts(self) -> ModelFacts:
        """Return what the line on loading says of this policy in particular."""
        tied = input_embedding(self.model).weight is self.log_prob_head.weight
        precision = "fp32" if self.log_prob_head.fp32 else "fp32 of rounded logits"
        return ModelFacts(
            role="policy",
            inner=self.model,
            head=f"log-probs {precision} in chunks" + (", embeddings tied" if tied else ""),
            attention=self.attention,
            attention_note=self.attention_note,
        )

    def forward(
        self,
        sequences: Int64[Tensor, "batch length"],
        action_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: Any = None,
        return_entropy: bool = False,
    ) -> Any:
        """Return log-probs, the model's output, or (log-probs, output), as the arguments ask.

        ``action_mask`` (batch, actions) asks for the log-probs of the last ``actions`` predictions, times the mask;
        ``return_logprobs`` asks for those of all predictions, (batch, length - 1). ``return_output`` asks for the model's
        output, and ``return_entropy`` for its attribute ``entropy``, (batch, length - 1) in nats. Log-probs and entropies of
        predictions from or of padding are 0. Raises :class:`RequestError` if nothing is asked for.
        """
        if allgather_logits or ring_attn_group is not None or packed_seq_lens is not None:
            raise RequestError(
                "ring attention (allgather_logits, ring_attn_group, packed_seq_lens) is not supported: leave these "
                "arguments out"
            )
        return_log_probs = action_mask is not None or return_logprobs
        if not return_output and (return_entropy or not return_log_probs):
            raise RequestError(
                "Actor.forward needs action_mask or return_logprobs=True, or return_output=True for the model's output; "
                "return_entropy needs return_output=True"
            )
        attended = torch.ones_like(sequences) if attention_mask is None else attention_mask
        output, hidden, places = self._run(sequences, attended, return_output)
        if not return_log_probs and not return_entropy:
            return output
        log_probs, entropy = self._predictions(sequences, attended, hidden, places, return_entropy)
        if return_entropy:
            output.entropy = entropy
        if action_mask is not None and not return_logprobs:
            log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
        if not return_log_probs:
            return output
        return (log_probs, output) if return_output else log_probs

    def _run(
        self, sequences: Int64[Tensor, "batch length"], attended: Tensor, with_output: bool
    ) -> tuple[Any, Float[Tensor, "rows hidden"], Int64[Tensor, "rows"]]:
        """Return the model's output (or None), hidden states, and the index of each in the flattened batch."""
        if self.packing_samples and not with_output:
            packed, places = unpad(sequences, attended)
            return None, packed_forward(self.backbone, packed), places
        padded: dict[str, Any] = {
            "input_ids": sequences,
            "attention_mask": attended,
            "position_ids": padded_positions(attended),
            "use_cache": False,
        }
        all_places = torch.arange(sequences.numel(), device=sequences.device)
        if not with_output:
            return None, self.backbone(**padded).last_hidden_state.flatten(0, 1), all_places
        hidden: list[Tensor] = []
        hook = self.log_prob_head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
        try:
            output = self.model(**padded)
        finally:
            hook.remove()
        return output, hidden[0].flatten(0, 1), all_places

    def _predictions(
        self, sequences: Tensor, attended: Tensor, hidden: Tensor, places: Tensor, with_entropy: bool
    ) -> tuple[Float[Tensor, "batch length-1"], Float[Tensor, "batch length-1"] | None]:
        """Return log-probs and entropies of the predictions from an attended token of an attended one; others are 0."""
        mask = attended.bool()
        real = torch.zeros_like(mask)
        real[:, :-1] = mask[:, 1:] & mask[:, :-1]
        rows = real.flatten()[places].nonzero()[:, 0]
        at = places[rows]
        log_probs, entropy = self.log_prob_head(
            hidden[rows], sequences.flatten()[at + 1], self.temperature, with_entropy
        )

        def spread(numbers: Tensor) -> Tensor:
            return numbers.new_zeros(real.numel()).index_put((at,), numbers).view(real.shape)[:, :-1]

        return spread(log_probs), None if entropy is None else spread(entropy)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute layers in the backward pass instead of keeping their activations (non-reentrant by default)."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})
        if adapted_layers(self.model):
            self.model.enable_input_require_grads()  # a reentrant pass drops gradients where no input has one

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations for the backward pass."""
        self.model.gradient_checkpointing_disable()


def _check_model(model: object, load_in_4bit: bool) -> PreTrainedModel:
    """Refuse an object that is not a transformers model, and 4-bit weights for a model that is in memory."""
    if not isinstance(model, PreTrainedModel):
        raise ModelLoadError(f"an Actor needs a path, a hub id or a transformers model, not a {type(model).__name__}")
    if load_in_4bit:
        raise ModelLoadError(
            f"weights become 4-bit (NF4) while they are read, and this {type(model).__name__} is in memory "
            "already: save it and give its directory, or leave load_in_4bit off"
        )
    return model


class PackedPolicy(nn.Module):
    """A policy that runs on packs. This is the module that an engine trains."""

    def __init__(self, actor: Actor) -> None:
        super().__init__()
        self.actor = actor

    def forward(
        self,
        packed: Packed,
        temperature: float = 1.0,
        with_entropy: bool = False,
        wanted: Bool[Tensor, "sequence_tokens"] | None = None,
        entropy_in_loss: bool = False,
        teacher: Teacher | None = None,
        divergence: Divergence | None = None,
    ) -> PolicyOutputs:
        """Return log-probs and entropies in nats, one number for each token of each sequence, in the order of sequences.

        ``log_probs[t]`` is log p(token t | tokens before t), and ``entropy[t]`` is the entropy of the choice of token t. Both
        are 0 at the first token of a sequence, and where ``wanted`` is False (None: True everywhere). The output layer, and
        most of the last layer before it, run for wanted tokens only, and once for a prefix that sequences share. In a pack
        with kept sets a token has the log-prob and entropy of its own set. ``entropy_in_loss`` says that a loss will depend on
        the entropies. With a ``teacher`` and a ``divergence`` there is that from it at each wanted token too.
        """
        packed = share_alike(self.actor.config, packed)
        if teacher is not None:
            packed = teacher.read_alike(packed)
        at = packed.predicted_tokens
        if wanted is not None:
            chosen = torch.zeros(packed.num_tokens, dtype=torch.bool, device=at.device)
            at = at[chosen.index_fill(0, packed.sequence_tokens[wanted], True)[at]]
            read = distinct(packed.previous_tokens[at], packed.num_tokens)
            hidden = read_forward(self.actor.backbone, packed, read)
        else:
            hidden = packed_forward(self.actor.backbone, packed)
        places = packed.previous_tokens[at]
        before = hidden.index_select(0, places)
        log_probs, entropy = self.actor.log_prob_head(
            before,
            packed.token_ids[at],
            temperature,
            with_entropy,
            None if packed.kept is None else packed.kept.select(at),
            entropy_in_loss,
        )

        def spread(numbers: Tensor) -> Float[Tensor, "sequence_tokens"]:
            tokens = packed.per_sequence(numbers.new_zeros(packed.num_tokens).index_put((at,), numbers))
            return tokens if wanted is None or packed.parent is None else tokens * wanted

        from_teacher = None
        if teacher is not None and divergence is not None:
            states = teacher.hidden_states(packed, places)
            from_teacher = spread(
                self.actor.log_prob_head(
                    before, read=lambda head, own: teacher.divergences(head, own, states, divergence)
                )
            )
        return PolicyOutputs(spread(log_probs), None if entropy is None else spread(entropy), from_teacher)
