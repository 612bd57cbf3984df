"""Part ``encoders``: the speed at which encoders score, against transformers on padded batches in the order of arrival.

Invariants: both sides have the same weights, read from one directory, and one CPU thread. Their scores agree before anything is
timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.figures import Figure, Figures
from benchmarks.sequences import LONGEST, padded_batches, ragged_sequences
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.models.encoders import Encoder

KINDS = {
    "deberta-v2": {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 256, "norm_rel_ebd": "layer_norm",
        "share_att_key": True, "position_biased_input": False, "type_vocab_size": 0,
    },
    "bert": {},
    "modernbert": {},
}  # fmt: skip
"""What the config of each kind needs besides its sizes; DeBERTa's is that of DeBERTa-v3."""
VOCABULARY, ROWS, REPEATS = 256, 16, 3
MAX_TOKENS = 16384
"""The default of ``max_batch_tokens`` of a service."""
AGREES_TO = 1e-4


def measure(quick: bool = False) -> Figures:
    """Throughput of each kind of encoder as a multiple of padded batches of 16 in the order of arrival."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    count, longest, layers, hidden = (24, 40, 2, 32) if quick else (64, LONGEST, 4, 192)
    sequences = ragged_sequences(count, VOCABULARY, longest=longest)
    figures: Figures = {}
    try:
        for kind in KINDS:
            with TemporaryDirectory() as directory:
                encoder, plain = _both(kind, Path(directory), layers, hidden)
            ratio = _ratio(encoder, plain, sequences)
            method = (
                f"{kind} with {layers} layers of width {hidden}, fp32, {count} sequences of at most {longest} tokens, one "
                f"thread; CPU time of transformers on padded batches of {ROWS} in the order of arrival over CPU time here"
            )
            figures[f"encoders.{kind}_vs_padded"] = Figure(ratio, "x", True, method)
    finally:
        torch.set_num_threads(before)
    return figures


def _both(kind: str, directory: Path, layers: int, hidden: int) -> tuple[Encoder, PreTrainedModel]:
    """The same weights in this project and in transformers."""
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 16, max_position_embeddings=LONGEST, pad_token_id=0, num_labels=1, **KINDS[kind],
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    model_config = ModelConfig(path=str(directory), dtype="fp32")
    plain = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    return Encoder(model_config, _tokenizer(), torch.device("cpu")), plain


def _tokenizer() -> PreTrainedTokenizerFast:
    """It is asked how two texts are joined and nothing else."""
    inner = Tokenizer(models.WordLevel({"[CLS]": 1, "[SEP]": 2}, unk_token="[SEP]"))
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, cls_token="[CLS]", sep_token="[SEP]")


def _ratio(encoder: Encoder, plain: PreTrainedModel, sequences: list[Tensor]) -> float:
    ids = [sequence.tolist() for sequence in sequences]
    batches = padded_batches(sequences, ROWS)

    def ours() -> Tensor:
        scores = torch.zeros(len(ids))
        for batch in encoder.batches([len(one) for one in ids], max_tokens=MAX_TOKENS):
            scores[list(batch)] = encoder.scores([ids[index] for index in batch])
        return scores

    @torch.inference_mode()
    def theirs() -> Tensor:
        return torch.cat([plain(input_ids=tokens, attention_mask=mask).logits[:, 0] for tokens, mask in batches])

    difference = float((ours() - theirs()).abs().max())
    if not difference <= AGREES_TO:
        raise RuntimeError(f"the scores of {type(plain).__name__} differ by {difference:.1e}: nothing is compared")
    return median(_seconds(theirs) / _seconds(ours) for _ in range(REPEATS))


def _seconds(work: Callable[[], object]) -> float:
    started_at = time.process_time()
    work()
    return time.process_time() - started_at
