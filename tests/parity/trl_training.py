"""A training run of 256 pairs against TRL: from the same weights in the same order, judged by the scores of held-out pairs.

The committed inputs are generated pairs whose better side holds more of some tokens, so that there is something to learn;
``real_pairs`` gives 256 pairs of a data file instead, under a byte-level BPE trained on it, and is never committed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import trl_reward
from .trl_reward import EOS, Pair, Sizes

UPDATES, PAIRS_PER_UPDATE, HELD_OUT = 16, 16, 64
LIKED = range(2, 8)
REAL_SIZES: Sizes = trl_reward.SIZES | {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16,
    "max_position_embeddings": 256,
}  # fmt: skip
CASES = {"training": {"max_grad_norm": 1.0, "margins": False, "centering": 0.01}}


def make_inputs(seed: int = 24) -> dict[str, Any]:
    """Generated pairs, in the form that trl_reward reads."""
    draw = random.Random(seed)
    pairs = [_pair(draw) for _ in range(UPDATES * PAIRS_PER_UPDATE + HELD_OUT)]
    return _inputs(seed, pairs, trl_reward.SIZES)


def real_pairs(file: Path, seed: int = 25) -> dict[str, Any]:
    """Pairs of a data file with no side longer than the model's positions, in the order of the file."""
    from rlhf_ray.data.chat import ChatFormat
    from rlhf_ray.data.encode import Drops, encode_pairs
    from rlhf_ray.data.tokenizers import make_tokenizer
    from rlhf_ray.rows.preferences import read_preferences

    tokenizer = make_tokenizer(file, REAL_SIZES["vocab_size"])
    longest = REAL_SIZES["max_position_embeddings"]
    encoded = encode_pairs(ChatFormat(tokenizer), read_preferences(file), longest, Drops())
    pairs = [{"chosen": pair.chosen, "rejected": pair.rejected, "margin": 0.0} for pair in encoded if pair is not None]
    return _inputs(seed, pairs[: UPDATES * PAIRS_PER_UPDATE + HELD_OUT], REAL_SIZES)


def ours(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Losses and held-out scores: small differences of single weights are not what a run is judged by."""
    return judged(trl_reward.ours(inputs, max_tokens=512))


def judged(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is compared of all that the oracle of trl_reward says."""
    return {name: value for name, value in values.items() if name.endswith(("/loss", "/held-out scores"))}


def _inputs(seed: int, pairs: list[Pair], sizes: Sizes) -> dict[str, Any]:
    cut = [pairs[start : start + PAIRS_PER_UPDATE] for start in range(0, len(pairs) - HELD_OUT, PAIRS_PER_UPDATE)]
    assert len(cut) == UPDATES, f"{len(pairs)} pairs are too few"
    return {
        "seed": seed,
        "sizes": sizes,
        "optimizer": trl_reward.OPTIMIZER,
        "cases": CASES,
        "steps": cut,
        "held_out": pairs[-HELD_OUT:],
        "weights": trl_reward.weights_of(sizes, seed),
    }


def _pair(draw: random.Random) -> Pair:
    prompt = _tokens(draw, draw.randint(1, 4), 0.2)
    sides = [prompt + _tokens(draw, draw.randint(2, 8), odds) + [EOS] for odds in (0.5, 0.1)]
    return {"chosen": sides[0], "rejected": sides[1], "margin": 0.0}


def _tokens(draw: random.Random, count: int, liked: float) -> list[int]:
    others = range(LIKED.stop, trl_reward.SIZES["vocab_size"])
    return [draw.choice(LIKED if draw.random() < liked else others) for _ in range(count)]
