"""Score with transformers on padded batches, in the order of the items, for comparison with the offline scorer.

Invariants: it scores in bf16 with the weights of the given directory. Batches are made before the first turn.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.peers.scoring_peer import Score, take_turns
from benchmarks.sequences import padded_batches


def load(order: dict[str, Any]) -> Score:
    """Load the model and make batches of ``rows`` sequences."""
    model = AutoModelForSequenceClassification.from_pretrained(order["directory"], dtype=torch.bfloat16).eval()
    batches = padded_batches([torch.tensor(sequence) for sequence in order["sequences"]], order["rows"])

    @torch.inference_mode()
    def score() -> list[float]:
        logits = [model(input_ids=ids, attention_mask=mask, use_cache=False).logits for ids, mask in batches]
        return torch.cat(logits).float()[:, 0].tolist()

    return score


if __name__ == "__main__":
    take_turns(load)
