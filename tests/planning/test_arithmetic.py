"""The sizes that follow are those a run makes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.config.jobs.sizes import training_items, updates
from rlhf_ray.config.loading import load_config
from rlhf_ray.planning.arithmetic import batch_table


def sizes(config, rows=None):
    return {line.what: line.value for line in config.sizes(rows)}


@given(items=st.integers(0, 500), each=st.integers(1, 100))
def test_updates_are_as_many_as_cutting_makes(items, each):
    assert updates(items, each) == len(range(0, items, each))


@pytest.mark.parametrize(
    ("rows", "epochs", "items"), [(6000, 1.0, 6000), (10, 0.3, 3), (7, 0.5, 3), (100, 2.5, 250), (10, 0.7, 7)]
)
def test_a_part_of_an_epoch_counts_whole_rows(rows, epochs, items):
    assert training_items(rows, epochs) == items


def test_ppo():
    overrides = ["batch={prompts_per_step: 24, samples_per_prompt: 4, sequences_per_update: 32, passes_per_step: 2, "
                 "max_tokens_per_micro_batch: 200}", "policy.ranks=3", "rollout.engines=5", "steps=10"]  # fmt: skip
    config = load_config("demo-ppo", overrides)
    assert config.updates_per_step == 6
    reported = sizes(config)
    assert reported["sequences per step"] == "96"
    assert reported["updates in all"] == "60"
    assert reported["prompts in all"] == "240"
    assert reported["prompts per engine and step"] == "4 to 5"
    assert reported["longest sequence"] == "80 tokens"
    assert reported["policy: sequences per rank and update"] == "10 to 11"
    assert (
        reported["policy: micro-batches per rank and update"] == "at most 6"
    )  # 11 sequences, two of the longest in 200 tokens
    assert reported["critic: sequences per rank and update"] == "32"


def test_sft_knows_the_size_of_the_world_or_is_told_that_of_a_file():
    config = load_config("demo-sft", ["epochs=1.5", "batch.sequences_per_update=64"])
    assert sizes(config)["sequences in all"] == "19200"
    assert sizes(config)["updates in all"] == "300"
    from_file = load_config("hh-rm")
    assert "updates in all" not in sizes(from_file)
    assert sizes(from_file, rows=1000)["updates in all"] == "63"


def test_a_pair_is_two_sequences_long():
    assert sizes(load_config("demo-rm"))["longest of the pairs"] == "192 tokens"


def test_every_kind_has_a_table():
    for recipe in ("demo-sft", "demo-rm", "demo-ppo", "serve"):
        assert "sizes" in batch_table(load_config(recipe))
