"""Demonstrations: prompts with an answer to learn from.

Always true: a demonstration read from a file has a prompt and an answer of the same kind (text or messages).
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.config.schema import DataConfig
from rlhf_ray.data.conversations import Content, read_content
from rlhf_ray.data.rows import Row, read_rows
from rlhf_ray.data.split import Split, split_rows


@dataclass(frozen=True)
class Demonstration:
    """One prompt and the answer to learn."""

    prompt: Content
    answer: Content


def load_demonstrations(config: DataConfig, seed: int = 0) -> Split[Demonstration]:
    """The demonstrations that a config names, and those held out."""
    if config.world is not None:
        from rlhf_ray.data.world import World

        world = World(config.world.seed)
        train = world.demonstrations(config.world.demonstrations)[: config.max_rows]
        return Split(train, world.demonstrations(config.world.evaluation_pairs, "evaluation"))
    return split_rows(config, lambda path: read_demonstrations(path, config), lambda row: row.prompt, seed)


def read_demonstrations(path: str, config: DataConfig) -> list[Demonstration]:
    """The demonstrations of one file: a prompt and an answer a row, or a whole conversation under ``messages``."""
    rows = read_rows(path, limit=config.max_rows)
    return [read_demonstration(row, config.prompt_key, config.answer_key) for row in rows]


def read_demonstration(row: Row, prompt_key: str, answer_key: str) -> Demonstration:
    """The demonstration in one row; the answer to a conversation under ``messages`` is its last message."""
    if prompt_key not in row and "messages" in row:
        messages = read_content(row, "messages")
        if isinstance(messages, str):
            raise row.error("'messages' is a text: a list of messages was expected")
        return Demonstration(messages[:-1], messages[-1:])
    missing = [key for key in (prompt_key, answer_key) if key not in row]
    if missing:
        raise row.error(
            f"no {' and no '.join(map(repr, missing))} in this row (it has {', '.join(map(repr, row.values))}): "
            "set data.prompt_key and data.answer_key to the keys of your file"
        )
    prompt, answer = read_content(row, prompt_key), read_content(row, answer_key)
    if isinstance(prompt, str) != isinstance(answer, str):
        raise row.error("prompt and answer are partly text and partly messages: write both in one way")
    return Demonstration(prompt, answer)
