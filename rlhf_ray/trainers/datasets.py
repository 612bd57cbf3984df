"""The rows that a config names, ready to be trained on: read, encoded, counted, split.

Always true: everything is read before a cluster is joined; what is dropped is counted and said; an empty result is an error
that names the file and the way out, never a run over nothing; prompts of both halves are numbered through.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from rlhf_ray.config.schema import DataConfig, WorldConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.demonstrations import Demonstration, read_demonstrations
from rlhf_ray.data.encode import Drops, encode_demonstrations, encode_pairs, encode_prompts
from rlhf_ray.data.preferences import PreferencePair, read_preferences
from rlhf_ray.data.prompts import Prompt, read_prompts
from rlhf_ray.data.world import World
from rlhf_ray.errors import DataError
from rlhf_ray.trainers.experience import TokenizedPrompt
from rlhf_ray.trajectories.batch import TrajectoryBatch

PAIR_COLUMNS = ("margin", "grade")
"""What a loss may read beside the scores: one number a pair."""

Row = TypeVar("Row")
Example = TypeVar("Example")


@dataclass(frozen=True)
class Split(Generic[Row]):
    """Rows to train on and rows held out."""

    train: list[Row]
    held_out: list[Row]


@dataclass(frozen=True)
class DemonstrationExample:
    """Token ids of a demonstration and which of them are the answer."""

    token_ids: list[int]
    action_mask: list[bool]


@dataclass(frozen=True, eq=False)
class PairExample:
    """Token ids of a preference pair, the prompt before both answers, and what its row says beside them."""

    chosen: Sequence[int]
    rejected: Sequence[int]
    margin: float | None = None
    grade: float | None = None
    """By how much the chosen side is better: 0 is a tie."""
    source: str = ""
    prompt_length: int = 0
    """Tokens of the prompt; the same in both sides."""


def demonstration_examples(data: DataConfig, tokenizer: Any, seed: int) -> Split[DemonstrationExample]:
    """Encoded demonstrations of the world or of a file."""
    if data.world is not None:
        world = World(data.world.seed)
        arithmetic = data.world.task == "arithmetic"
        demonstrations = world.arithmetic_demonstrations if arithmetic else world.demonstrations
        rows = Split(demonstrations(data.world.demonstrations), demonstrations(500, "evaluation"))
    else:
        rows = _read(data, seed, lambda path: read_demonstrations(path, data.prompt_key, data.answer_key))

    def encode(half: Sequence[Demonstration], drops: Drops) -> list[DemonstrationExample]:
        encoded = encode_demonstrations(tokenizer, half, data.max_tokens, drops)
        return [DemonstrationExample(*one) for one in encoded if one is not None]

    return _encoded(rows, data, encode)


def pair_examples(data: DataConfig, tokenizer: Any, seed: int) -> Split[PairExample]:
    """Encoded preference pairs of the world or of a file; those held out of the world have no flipped labels."""
    if data.world is not None:
        world = World(data.world.seed)
        held_out = world.preferences(data.world.evaluation_pairs, "evaluation", flipped=0.0)
        rows = Split(world.preferences(data.world.pairs), held_out)
    else:
        keys = (data.prompt_key, data.chosen_key, data.rejected_key)
        rows = _read(data, seed, lambda path: read_preferences(path, *keys))

    def encode(half: Sequence[PreferencePair], drops: Drops) -> list[PairExample]:
        encoded = encode_pairs(tokenizer, half, data.max_tokens, drops)
        pairs = zip(encoded, half, strict=True)
        return [
            PairExample(*sides, row.margin, row.grade, row.source, prompt_length)
            for (*sides, prompt_length), row in ((pair, row) for pair, row in pairs if pair is not None)
        ]

    return _encoded(rows, data, encode)


def tokenized_prompts(data: DataConfig, tokenizer: Any, seed: int) -> Split[TokenizedPrompt]:
    """Encoded prompts of the world or of a file; those held out continue the numbers."""
    if data.world is not None:
        rows = _world_prompts(data.world)
    else:
        keys = {"chosen_key": data.chosen_key, "rejected_key": data.rejected_key}
        rows = _read(data, seed, lambda path: read_prompts(path, data.prompt_key, **keys))
    count = len(rows.train)
    numbered = Split(list(enumerate(rows.train)), list(enumerate(rows.held_out, count)))

    def encode(half: Sequence[tuple[int, Prompt]], drops: Drops) -> list[TokenizedPrompt]:
        encoded = encode_prompts(tokenizer, [row for _, row in half], data.max_prompt_tokens, drops)
        return [
            TokenizedPrompt(number, row.text, tuple(ids), row.label, source=row.source)
            for (number, row), ids in zip(half, encoded, strict=True)
            if ids is not None
        ]

    return _encoded(numbered, data, encode)


def _world_prompts(made: WorldConfig) -> Split[Prompt]:
    world = World(made.seed)
    if made.task == "arithmetic":
        sums = Split(world.arithmetic_prompts("ppo"), world.arithmetic_prompts("evaluation"))
        return Split(sums.train[: made.prompts], sums.held_out[: made.evaluation_prompts])
    return Split(world.prompts("ppo", made.prompts), world.prompts("evaluation", made.evaluation_prompts))


def _read(data: DataConfig, seed: int, read: Callable[[str], list[Row]]) -> Split[Row]:
    """Rows of ``data.path``; held out is ``evaluation_path``, or a share drawn by ``seed``, or nothing."""
    assert data.path is not None, "a data section names a world or a path"
    rows = read(data.path)[: data.max_rows]
    if data.evaluation_path is not None:
        return Split(rows, read(data.evaluation_path))
    order = list(range(len(rows)))
    random.Random(f"{seed}/held-out").shuffle(order)
    held_out = set(order[: round((data.evaluation_fraction or 0.0) * len(rows))])
    return Split(
        [row for number, row in enumerate(rows) if number not in held_out],
        [row for number, row in enumerate(rows) if number in held_out],
    )


def _encoded(
    rows: Split[Row], data: DataConfig, encode: Callable[[Sequence[Row], Drops], list[Example]]
) -> Split[Example]:
    """Encode both halves and say what was dropped."""
    source = data.path or "the generated world"
    halves, reasons = [], Drops()
    for name, half in (("training", rows.train), ("held-out", rows.held_out)):
        drops = Drops()
        halves.append(encode(half, drops))
        if drops:
            told = ", ".join(f"{count} {reason}" for reason, count in drops.items())
            get_logger("data").info("%s: of %d %s rows dropped: %s", source, len(half), name, told)
        reasons += drops
    if not halves[0]:
        told = ", ".join(reasons) or "there were none"
        raise DataError(f"{source}: no row is left to train on ({told}); raise data.max_tokens or data.max_prompt_tokens, "
                        "or give other rows")  # fmt: skip
    return Split(*halves)


def demonstration_batch(examples: Sequence[DemonstrationExample]) -> TrajectoryBatch:
    """One sequence an example."""
    return TrajectoryBatch.from_sequences(
        [example.token_ids for example in examples], action_mask=[example.action_mask for example in examples]
    )


def pair_batch(examples: Sequence[PairExample]) -> TrajectoryBatch:
    """Sequence 2i is chosen, 2i+1 rejected, each with its pair's ``margin`` and ``grade`` where the pairs have them."""
    batch = TrajectoryBatch.from_sequences(
        [side for example in examples for side in (example.chosen, example.rejected)]
    )
    columns = {name: [getattr(example, name) for example in examples for _ in range(2)] for name in PAIR_COLUMNS}
    return batch.with_columns(
        **{name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items() if None not in column}
    )
