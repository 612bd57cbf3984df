"""The rows that a config names, ready to be trained on: read, encoded, counted, split.

Always true: everything is read before a cluster is joined; what is dropped is counted and said; an empty result is an error
that names the file and the reason, never a run over nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rlhf_ray.config.schema import DataConfig
from rlhf_ray.console import get_logger, progress
from rlhf_ray.data.encode import encode_demonstration, encode_pair, encode_prompt
from rlhf_ray.data.world import World
from rlhf_ray.errors import DataError
from rlhf_ray.trainers.experience import TokenizedPrompt
from rlhf_ray.trajectories.batch import TrajectoryBatch

Row = TypeVar("Row")
Example = TypeVar("Example")


@dataclass(frozen=True)
class Split(Generic[Row]):
    """Rows to train on and rows held out."""

    training: Sequence[Row]
    held_out: Sequence[Row]


@dataclass(frozen=True)
class PairExample:
    """Token ids of a preference pair."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float | None
    source: str


@dataclass(frozen=True)
class DemonstrationExample:
    """Token ids of a demonstration and which of them are the answer."""

    token_ids: tuple[int, ...]
    action_mask: tuple[bool, ...]


def demonstration_examples(data: DataConfig, tokenizer: Any, seed: int) -> Split[DemonstrationExample]:
    """Encoded demonstrations of the world or of a file."""
    if data.world is not None:
        world = World(data.world.seed)
        held_out = world.demonstrations(max(200, data.world.demonstrations // 20), split="evaluation")
        rows = Split(world.demonstrations(data.world.demonstrations), held_out)
    else:
        from rlhf_ray.data.demonstrations import read_demonstrations

        rows = _split(data, seed, lambda path: read_demonstrations(path, data.prompt_key, data.answer_key))
    return _encoded(rows, data, "demonstrations", lambda row: _demonstration(tokenizer, row, data.max_tokens))


def pair_examples(data: DataConfig, tokenizer: Any, seed: int) -> Split[PairExample]:
    """Encoded preference pairs of the world or of a file; those held out of the world have no flipped labels."""
    if data.world is not None:
        world = World(data.world.seed)
        held_out = world.preferences(data.world.evaluation_pairs, split="evaluation", flipped=0.0)
        rows = Split(world.preferences(data.world.pairs), held_out)
    else:
        from rlhf_ray.data.preferences import read_preferences

        keys = {"prompt_key": data.prompt_key, "chosen_key": data.chosen_key, "rejected_key": data.rejected_key}
        rows = _split(data, seed, lambda path: read_preferences(path, **keys))
    return _encoded(rows, data, "pairs", lambda row: _pair(tokenizer, row, data.max_tokens))


def tokenized_prompts(data: DataConfig, tokenizer: Any, seed: int) -> Split[TokenizedPrompt]:
    """Encoded prompts of the world or of a file, numbered from 0; those held out continue the numbers."""
    if data.world is not None:
        world = World(data.world.seed)
        rows = Split(
            world.prompts("ppo", data.world.prompts), world.prompts("evaluation", data.world.evaluation_prompts)
        )
    else:
        from rlhf_ray.data.prompts import read_prompts

        rows = _split(data, seed, lambda path: read_prompts(path, data.prompt_key, chosen_key=data.chosen_key))
    count = len(rows.training)
    numbered = Split(list(enumerate(rows.training)), list(enumerate(rows.held_out, count)))
    return _encoded(numbered, data, "prompts", lambda pair: _prompt(tokenizer, *pair, data.max_prompt_tokens))


def _prompt(tokenizer: Any, number: int, row: Any, max_tokens: int) -> TokenizedPrompt | None:
    token_ids = encode_prompt(tokenizer, row, max_tokens)
    return None if token_ids is None else TokenizedPrompt(number, row.text, tuple(token_ids), row.label)


def _demonstration(tokenizer: Any, row: Any, max_tokens: int) -> DemonstrationExample | None:
    encoded = encode_demonstration(tokenizer, row, max_tokens)
    return None if encoded is None else DemonstrationExample(tuple(encoded[0]), tuple(encoded[1]))


def _pair(tokenizer: Any, row: Any, max_tokens: int) -> PairExample | None:
    encoded = encode_pair(tokenizer, row, max_tokens)
    return None if encoded is None else PairExample(tuple(encoded[0]), tuple(encoded[1]), row.margin, row.source)


def _split(data: DataConfig, seed: int, read: Callable[[str], Sequence[Row]]) -> Split[Row]:
    """Rows of ``data.path``; held out is ``evaluation_path``, or a share drawn by ``seed``, or nothing."""
    assert data.path is not None
    rows = list(read(data.path))[: data.max_rows]
    if data.evaluation_path is not None:
        return Split(rows, list(read(data.evaluation_path)))
    order = list(range(len(rows)))
    random.Random(f"{seed}/held-out").shuffle(order)
    held_out = set(order[: round((data.evaluation_fraction or 0.0) * len(rows))])
    return Split(
        [row for number, row in enumerate(rows) if number not in held_out],
        [row for number, row in enumerate(rows) if number in held_out],
    )


def _encoded(rows: Split[Row], data: DataConfig, what: str, encode: Callable[[Row], Example | None]) -> Split[Example]:
    """Encode both halves; rows that do not fit are dropped and counted."""
    halves = []
    for name, half in (("training", rows.training), ("held-out", rows.held_out)):
        encoded = [encode(row) for row in progress(half, f"encoding {name} {what}")]
        kept = [example for example in encoded if example is not None]
        if len(kept) < len(half):
            get_logger().info("%s %s: %d of %d dropped (too long, or two equal sides)", name, what,
                              len(half) - len(kept), len(half))  # fmt: skip
        halves.append(kept)
    if not halves[0]:
        raise DataError(f"{data.path or 'the generated world'}: no {what} left to train on; raise data.max_tokens or "
                        "data.max_prompt_tokens, or give other rows")  # fmt: skip
    return Split(*halves)


def demonstration_batch(examples: Sequence[DemonstrationExample]) -> TrajectoryBatch:
    """One sequence an example."""
    return TrajectoryBatch.from_sequences(
        [example.token_ids for example in examples], action_mask=[example.action_mask for example in examples]
    )


def pair_batch(examples: Sequence[PairExample]) -> TrajectoryBatch:
    """Sequence 2i is chosen, 2i+1 rejected; ``margin`` where every pair has one."""
    sides = [side for example in examples for side in (example.chosen, example.rejected)]
    batch = TrajectoryBatch.from_sequences(sides)
    margins = [example.margin for example in examples]
    if any(margin is None for margin in margins):
        return batch
    return batch.with_columns(margin=[float(margin or 0.0) for margin in margins for _ in range(2)])
