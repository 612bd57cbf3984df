"""Small random encoders with one score, and the tokenizers of their kinds, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

VOCABULARY, POSITIONS = 64, 48
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
DISENTANGLED = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
    "max_relative_positions": -1,
}  # fmt: skip
ENCODERS: dict[str, dict[str, object]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1, "pad_token_id": 3},
    "xlm-roberta": {"type_vocab_size": 1, "pad_token_id": 3},
    "electra": {"embedding_size": 16},
    "deberta": DISENTANGLED,
    "deberta-v2": DISENTANGLED | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "albert": {"embedding_size": 16},
    "fnet": {"type_vocab_size": 2},
}
"""What makes a config of each kind small; FNet, which mixes all positions, cannot be padded."""


def pair_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A word is a token, ``w5 w6 ...``; two texts are joined as BERT joins them, or as RoBERTa does."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{number}" for number in range(4, VOCABULARY))]
    if "roberta" in kind:
        words[0], words[3] = words[3], words[0]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    double = "[CLS] $A [SEP] [SEP] $B [SEP]" if "roberta" in kind else "[CLS] $A [SEP] $B:1 [SEP]:1"
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=double, special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_input_names=["input_ids", *([] if "roberta" in kind else ["token_type_ids"]), "attention_mask"],
        **names,
    )


def save_encoder(kind: str, directory: Path, *, seed: int = 0, labels: int = 1, **changes: object) -> Path:
    config = AutoConfig.for_model(kind, **{**SIZES, **ENCODERS[kind], **changes, "num_labels": labels})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    pair_tokenizer(kind).save_pretrained(directory)
    return directory
