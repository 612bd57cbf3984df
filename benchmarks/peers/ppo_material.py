"""What both sides of the part ``ppo`` start from: a small Llama as policy and reward model, and real prompts of one length.

Invariants: every prompt has exactly ``PROMPT_TOKENS`` tokens, so that nobody pads, and gives the same ids when its text is
encoded again. Policy, critic, reference and reward model have the same backbone shape.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

PROMPT_TOKENS, VOCABULARY = 81, 32000
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
"""14.5M parameters, of which 8.2M are the embedding, which is the output layer too."""


@dataclass(frozen=True)
class Material:
    """Directories of the models, the file of the prompts, and their ids."""

    policy: Path
    reward: Path
    prompts: Path
    ids: list[list[int]]


def make_material(directory: Path, source: Path) -> Material:
    """Write models and prompts below ``directory``; the prompts are the beginnings of the texts of ``source``."""
    from rlhf_ray.data.tokenizers import make_tokenizer
    from rlhf_ray.rows.preferences import read_preferences

    tokenizer = make_tokenizer(str(source), VOCABULARY)
    prompts: dict[str, list[int]] = {}
    for pair in read_preferences(str(source)):
        ids = tokenizer(f"{pair.prompt}{pair.chosen}")["input_ids"][:PROMPT_TOKENS]
        text = tokenizer.decode(ids)
        if len(ids) == PROMPT_TOKENS and tokenizer(text)["input_ids"] == ids:
            prompts[text] = ids
    file = directory / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps({'prompt': text})}\n" for text in prompts), encoding="utf-8")
    config = LlamaConfig(
        **SIZES,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    for name, model in (("policy", LlamaForCausalLM(config)), ("reward", LlamaForSequenceClassification(config))):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return Material(directory / "policy", directory / "reward", file, list(prompts.values()))
