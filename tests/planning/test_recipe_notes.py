"""Every recipe for GPUs says what it takes, and its figures are those that planning computes."""

from __future__ import annotations

import pytest

from rlhf_ray.config.loading import load_config
from rlhf_ray.errors import CapacityError
from rlhf_ray.planning.job_memory import job_memory, memory_table, require_memory
from rlhf_ray.planning.object_store import advice, store_bytes
from tests.planning.recipes import ON_GPUS, note_of, published_files, written_note

GB = 1e9
GPUS = {"qwen3-8b-rm-qlora": 24, "qwen3-8b-rm-lora": 48, "qwen3-0.6b-1gpu": 48}
"""The size that a recipe's comment promises to do with, in GB, where it is not 80."""


@pytest.mark.parametrize("recipe", ON_GPUS)
def test_the_note_of_a_recipe_is_what_planning_computes(recipe: str) -> None:
    assert written_note(recipe) == note_of(recipe), "python -m tests.planning.recipes writes it anew"


@pytest.mark.parametrize("recipe", ON_GPUS)
def test_a_recipe_fits_the_gpus_that_it_promises_and_wants_no_advice(recipe: str) -> None:
    config = load_config(recipe)
    memory = job_memory(config, published_files)
    size = GPUS.get(recipe, 80)
    assert [one.role for one in memory if one.gpu > one.share * size * GB] == []
    require_memory(memory, size * GB)
    with pytest.raises(CapacityError):
        require_memory(memory, max(one.gpu_needed for one in memory) - 1)
    assert list(advice(config, published_files, shared=2**50)) == []


def test_a_role_whose_share_is_too_small_is_named_with_the_numbers() -> None:
    memory = job_memory(load_config("qwen3-0.6b-1gpu", ["policy.resources.gpus_per_rank=0.1"]), published_files)
    with pytest.raises(CapacityError) as error:
        require_memory(memory, 80 * GB)
    message = str(error.value)
    assert message.startswith(
        "the job does not fit: a rank of policy needs 14.7 GB of its GPU (backward: optimizer 7.2, "
    )
    assert "policy.resources.gpus_per_rank 0.1 of 80 GB is 8.0 GB: raise it, take larger GPUs" in message
    assert "critic" not in message and error.value.exit_code == 3


def test_an_engine_that_cannot_hold_the_model_is_named_with_its_own_key() -> None:
    memory = job_memory(load_config("qwen3-0.6b-1gpu", ["rollout.gpu_memory_utilization=0.02"]), published_files)
    with pytest.raises(CapacityError, match=r"rollout needs 2\.8 GB .* rollout\.gpu_memory_utilization 0\.02 of 80 GB"):
        require_memory(memory, 80 * GB)


def test_the_table_holds_every_part_and_what_a_gpu_must_have() -> None:
    config = load_config("llama-3-8b-8gpu")
    text = memory_table(job_memory(config, published_files), store_bytes(config, published_files))
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["policy", "4", "in", "all", "(backward)", "53.8", "54", "(53.8", "/", "1)", "27.1"] in rows
    assert ["gradients", "(host)", "34.4"] in rows and ["every", "GPU", "must", "have", "54"] in rows
    assert [
        "object",
        "store",
        "on",
        "the",
        "node",
        "of",
        "the",
        "policy",
        "and",
        "of",
        "each",
        "engine",
        "32.3",
    ] in rows
