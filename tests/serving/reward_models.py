"""Small reward models on disk, and the slow reference for scores: transformers' own class, one sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from rlhf_ray.models import make_model, save_pretrained
from rlhf_ray.models.regression_loading import make_head, wrap_backbone

PAD, BOS, EOS = SPECIAL = ("<pad>", "<bos>", "<eos>")
MEAN, STD = 0.25, 2.0
STATISTICS = {"mean": MEAN, "std": STD}
TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(*, template: str | None = TEMPLATE, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte; it puts ``<bos>`` before every text by itself, so that a double one would show."""
    letters = {letter: number for number, letter in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    inner = Tokenizer(models.BPE(letters, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": PAD, "bos_token": BOS, **({"eos_token": EOS} if eos else {})}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = template
    return tokenizer


def save_reward_model(
    directory: Path,
    *,
    seed: int = 0,
    nan: bool = False,
    positions: int = 4096,
    statistics: Mapping[str, float] = STATISTICS,
) -> Path:
    """A tiny reward model as training leaves one; with ``nan`` its head holds NaN."""
    tokenizer = make_tokenizer()
    backbone = make_model("llama-tiny", len(tokenizer), seed=seed, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    backbone.config.max_position_embeddings = positions
    head = make_head(backbone.base_model, "inv_sqrt", seed)
    model = wrap_backbone(
        backbone.base_model, head, "reward", attention="auto", strict_attention=False, head_origin="fresh"
    )
    if nan:
        torch.nn.init.constant_(model.head.weight, math.nan)
    save_pretrained(model, tokenizer, directory, metadata=statistics)
    return directory


class Reference:
    """The scores of a directory as transformers computes them, without this project."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.no_grad()
    def of_ids(self, token_ids: Sequence[int]) -> float:
        """The score of ids as they are."""
        return float(self.model(input_ids=torch.tensor([list(token_ids)])).logits[0, 0])

    def of_text(self, text: str) -> float:
        """The score of a text with its special tokens in it."""
        return self.of_ids(self.tokenizer(text, add_special_tokens=False)["input_ids"])
