"""Token sequences for benchmarks: real preference pairs if their file is there, else random tokens of similar lengths.

Invariants: the same arguments give the same sequences. Random tokens are ``FIRST_TOKEN`` or higher, so that any lower id
can serve as padding.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor

LOGARITHM = NormalDist(5.05, 0.66)
"""Distribution of the logarithm of a length. Cut at 512, lengths have mean 188 and 95th percentile 465; real pairs have 183
and 469."""
LONGEST = 512
FIRST_TOKEN = 3


def ragged_lengths(count: int, *, longest: int = LONGEST, seed: int = 0) -> list[int]:
    """The ``count`` quantiles of the distribution, scaled to ``longest``, in an order drawn from ``seed``."""
    scale = longest / LONGEST
    quantiles = [LOGARITHM.inv_cdf((index + 0.5) / count) for index in range(count)]
    lengths = [max(2, min(longest, round(scale * math.exp(quantile)))) for quantile in quantiles]
    random.Random(seed).shuffle(lengths)
    return lengths


def ragged_sequences(count: int, vocabulary: int, *, longest: int = LONGEST, seed: int = 0) -> list[Tensor]:
    """Sequences of random tokens with the lengths of :func:`ragged_lengths`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(FIRST_TOKEN, vocabulary, (length,), generator=generator)
        for length in ragged_lengths(count, longest=longest, seed=seed)
    ]


REAL_PAIRS = Path(__file__).parents[2] / "shared" / "data" / "hh_harmless_pairs.jsonl.gz"


def real_sequences(count: int, vocabulary: int, *, longest: int = LONGEST, path: Path = REAL_PAIRS) -> list[Tensor]:
    """Both sides of real pairs, chosen before rejected, in the order of the file; pairs with a longer side are left out."""
    from rlhf_ray.data.tokenizers import make_tokenizer
    from rlhf_ray.rows.preferences import read_preferences

    tokenizer = make_tokenizer(str(path), vocabulary)
    sequences: list[Tensor] = []
    for pair in read_preferences(str(path)):
        sides = [tokenizer(f"{pair.prompt}{answer}")["input_ids"] for answer in (pair.chosen, pair.rejected)]
        if max(map(len, sides)) <= longest:
            sequences += [torch.tensor(side) for side in sides]
        if len(sequences) >= count:
            break
    return sequences[:count]


def padded_batches(sequences: list[Tensor], rows: int) -> list[tuple[Tensor, Tensor]]:
    """Token ids and attention masks of batches of ``rows`` sequences in their order, padded on the right with 0."""
    batches = []
    for start in range(0, len(sequences), rows):
        chosen = sequences[start : start + rows]
        ids = torch.zeros(len(chosen), max(map(len, chosen)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(chosen):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        batches.append((ids, mask))
    return batches
