"""Small random Llamas on disk, and the slow reference for log-probs: one plain forward a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.rollout.requests import Generation, GenerationRequest

VOCABULARY = 61
EOS = 1


def make_llama(seed: int, *, tied: bool = False, positions: int = 512) -> LlamaForCausalLM:
    """Peaked distributions (wide weights), so that other weights give clearly other log-probs."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


def weights_of(model: LlamaForCausalLM) -> list[tuple[str, torch.Tensor]]:
    """By name on disk: a tied head is not there."""
    return list(model.named_parameters())


@torch.no_grad()
def reference_log_probs(
    model: LlamaForCausalLM, request: GenerationRequest, generation: Generation, temperature: float
) -> torch.Tensor:
    """Log-probs of the sampled tokens from one forward over prompt and answer, without a cache or padding."""
    token_ids = torch.tensor([request.token_ids + generation.token_ids])
    log_probs = torch.log_softmax(model(input_ids=token_ids).logits[0].float() / temperature, dim=-1)
    start = len(request.token_ids)
    return log_probs[start - 1 : -1].gather(1, token_ids[0, start:, None])[:, 0]


def largest_difference(
    model: LlamaForCausalLM,
    requests: Sequence[GenerationRequest],
    generations: Sequence[Generation],
    temperature: float,
) -> float:
    """Between the log-probs that came with the tokens and the reference."""
    pairs = zip(requests, generations, strict=True)
    return max(
        float(
            (reference_log_probs(model, request, generation, temperature) - torch.tensor(generation.log_probs))
            .abs()
            .max()
        )
        for request, generation in pairs
    )
