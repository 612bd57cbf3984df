"""Real data sets, where they are at hand: read whole, split as people wrote them, encoded without loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encode import Drops, encode_pairs
from rlhf_ray.data.tokenizers import EOS, make_tokenizer
from rlhf_ray.rows.preferences import ANSWER_BEGINS, read_preferences
from rlhf_ray.rows.prompts import read_prompts
from rlhf_ray.rows.read import read_rows

SHARED = Path(__file__).parents[3] / "shared" / "data"
PAIRS = SHARED / "hh_harmless_pairs.jsonl.gz"


def shared(name: str) -> str:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return str(path)


def test_preference_dialogues():
    """Counts only: these texts are offensive and are never shown."""
    path = shared("hh_harmless_pairs.jsonl.gz")
    pairs, rows = read_preferences(path), read_rows(path)
    assert len(pairs) == 1156
    assert sum(pair.prompt.endswith(ANSWER_BEGINS) for pair in pairs) == 1156
    assert sum(ANSWER_BEGINS not in pair.chosen + pair.rejected for pair in pairs) == 1153, (
        "3 part before the last turn"
    )
    whole = [(pair.prompt + pair.chosen, pair.prompt + pair.rejected) for pair in pairs]
    written = [(row.text("chosen"), row.text("rejected")) for row in rows]
    assert sum(sides != texts for sides, texts in zip(whole, written, strict=True)) == 0
    tokenizer, drops = make_tokenizer(path, 512), Drops()
    encoded = encode_pairs(ChatFormat(tokenizer), pairs[:100], 8192, drops)
    assert not drops
    decoded = [tuple(map(tokenizer.decode, pair[:2])) for pair in encoded]
    ended = [(chosen + EOS, rejected + EOS) for chosen, rejected in whole[:100]]
    assert sum(sides != texts for sides, texts in zip(decoded, ended, strict=True)) == 0


def test_word_problems():
    prompts = read_prompts(shared("gsm8k_test.jsonl.gz"), "question")
    assert len(prompts) == 660
    assert sum(prompt.label is not None and "####" in prompt.label for prompt in prompts) == 660
