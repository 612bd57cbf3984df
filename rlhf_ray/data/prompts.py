"""Prompts: what a policy answers in reinforcement learning.

Always true: the numbers of all prompts of a job, those held out included, are 0, 1, 2 and so on in the order of the data,
so that a number names one prompt for the whole run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_ray.config.schema import DataConfig
from rlhf_ray.data.conversations import Content, read_content
from rlhf_ray.data.preferences import read_pair
from rlhf_ray.data.rows import Row, read_rows
from rlhf_ray.data.split import Split, split_rows


@dataclass(frozen=True)
class Prompt:
    """One prompt; ``label`` is what a reward function may check the answer against."""

    prompt_id: int
    text: Content
    label: str | None = None
    source: str = ""


def load_prompts(config: DataConfig, seed: int = 0) -> Split[Prompt]:
    """The prompts that a config names, and those held out; numbered through."""
    if config.world is not None:
        from rlhf_ray.data.world import World

        world = World(config.world.seed)
        train = world.prompts("ppo", config.world.prompts)[: config.max_rows]
        split = Split(train, world.prompts("evaluation", config.world.evaluation_prompts))
    else:
        split = split_rows(config, lambda path: read_prompts(path, config), lambda prompt: prompt.text, seed)
    return _numbered(split)


def _numbered(split: Split[Prompt]) -> Split[Prompt]:
    train = [replace(prompt, prompt_id=number) for number, prompt in enumerate(split.train)]
    held_out = [replace(prompt, prompt_id=number) for number, prompt in enumerate(split.evaluation, len(train))]
    return Split(train, held_out)


def read_prompts(path: str, config: DataConfig) -> list[Prompt]:
    """The prompts of one file; a file of preference pairs gives theirs."""
    return [read_prompt(row, number, config) for number, row in enumerate(read_rows(path, limit=config.max_rows))]


def read_prompt(row: Row, number: int, config: DataConfig) -> Prompt:
    """The prompt in one row: under its key, or what both sides of a preference pair begin with."""
    source = str(row["source"]) if "source" in row else ""
    if config.prompt_key in row:
        label = str(row[config.answer_key]) if config.answer_key in row else None
        return Prompt(number, read_content(row, config.prompt_key), label, source)
    if config.chosen_key in row and config.rejected_key in row:
        pair = read_pair(row, config.prompt_key, config.chosen_key, config.rejected_key)
        return Prompt(number, pair.prompt, None, source)
    raise row.error(
        f"no {config.prompt_key!r} in this row (it has {', '.join(map(repr, row.values))}), and no pair "
        f"{config.chosen_key!r}, {config.rejected_key!r} to take a prompt from: set data.prompt_key"
    )
