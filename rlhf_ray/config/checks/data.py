"""Rules between the ``data`` section and the job that reads it.

Invariant: every problem names the key, its value and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf_ray.config.problems import Problem
from rlhf_ray.config.sections.data import DataConfig


def has_no_pairs_to_cut(data: DataConfig) -> Iterator[Problem]:
    """A job that reads no preference pairs refuses the key that cuts them."""
    if data.too_long != "drop":
        yield (
            "data.too_long",
            f"{data.too_long} is for preference pairs: this job's rows are dropped or whole; remove it",
        )


def learns_no_demonstrations(data: DataConfig) -> Iterator[Problem]:
    """A job whose rows are no demonstrations refuses the key that says what of these is learned."""
    if data.train_on != "answers":
        yield "data.train_on", f"{data.train_on} is for demonstrations (sft), and this job's rows are none: remove it"


def compares_with_no_label(data: DataConfig) -> Iterator[Problem]:
    """A job without reward functions refuses to name the labels that they would compare answers with."""
    keys = {"data": data.label_key} | {f"data.sources.{name}": one.label_key for name, one in data.sources.items()}
    for key, label in keys.items():
        if label is not None:
            yield (
                f"{key}.label_key",
                f"{label!r} would be what reward functions compare sampled answers with, and this job samples none: remove it",
            )


def has_pairs_to_learn(data: DataConfig) -> Iterator[Problem]:
    """The generated world has preference pairs for one of its tasks."""
    if data.world is not None and data.world.task == "arithmetic":
        yield "data.world.task", "arithmetic has no preference pairs, since a function verifies it: set it to customers"


def says_what_is_held_out(data: DataConfig) -> Iterator[Problem]:
    """Preferences are held out on purpose or not at all, never by a default."""
    if data.world is None and data.evaluation_file is None and data.evaluation_fraction is None:
        yield (
            "data.evaluation_fraction",
            "missing: say which share of the pairs is held out to evaluate on, such as 0.05, or 0 for none; or name held-out "
            "pairs in data.evaluation_path, or a split of them in data.evaluation_split",
        )


def world_has_enough_prompts(data: DataConfig, prompts_per_step: int, evaluation_prompts: int) -> Iterator[Problem]:
    """The generated world makes at least the prompts of one step and of one evaluation."""
    world = data.world
    if world is None:
        return
    if world.prompts < prompts_per_step:
        yield (
            "data.world.prompts",
            f"{world.prompts} is below batch.prompts_per_step {prompts_per_step}: raise it or lower that",
        )
    if world.evaluation_prompts < evaluation_prompts:
        yield (
            "data.world.evaluation_prompts",
            f"{world.evaluation_prompts} is below evaluation.prompts {evaluation_prompts}: raise it or lower that",
        )


def gold_knows_the_prompts(data: DataConfig, functions: Mapping[str, str | None]) -> Iterator[Problem]:
    """The world's gold score is asked about its own customers alone; ``functions`` are names by their keys."""
    for key, name in functions.items():
        if name == "world.gold" and (data.world is None or data.world.task != "customers"):
            yield key, "world.gold scores answers to the customers of the generated world: set data.world to {}"
