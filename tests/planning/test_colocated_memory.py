"""The memory of roles that take turns: each phase is the sum of what may be there, and a GPU that lacks it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf_ray.config.loading import load_config
from rlhf_ray.errors import CapacityError
from rlhf_ray.planning.capacity import needed
from rlhf_ray.planning.colocation.memory import colocated_gpu_needed, phases_memory, phases_table, requirement
from rlhf_ray.planning.colocation.phases import Phase
from rlhf_ray.planning.job_memory import job_memory
from rlhf_ray.planning.memory import CONTEXT
from tests.planning.recipes import published_files

GB = 1e9
BY_TURNS = ["cluster.colocate=true", "rollout.gpu_memory_utilization=0.8"]


def figures(*overrides: str) -> tuple[dict[str, dict[str, float]], float]:
    config = load_config("llama-3-8b-colocated", [*BY_TURNS, *overrides])
    memory = job_memory(config, published_files)
    table = {one.phase.value: {role: count / GB for role, count in one.roles} for one in phases_memory(config, memory)}
    return table, colocated_gpu_needed(config, memory) / GB


def test_one_key_puts_a_rank_of_each_role_on_each_gpu_and_the_rest_of_the_config_stays() -> None:
    apart = load_config("llama-3-8b-colocated", [f"{role}.resources.gpus_per_rank=1" for role in (
        "policy", "critic", "reference", "reward", "rollout")])  # fmt: skip
    assert sum(bundle.gpus for bundle in needed(apart)) == 40
    together = apart.model_copy(update={"cluster": apart.cluster.model_copy(update={"colocate": True})})
    bundles = needed(together)
    assert [(bundle.gpus, bundle.cpus) for bundle in bundles] == [(1.0, 19.0)] * 8
    assert bundles[0].role == "policy + critic + reference + reward + rollout"
    assert {placed.resources.gpus_per_rank for placed in together.placements()} == {0.2}


def test_a_role_that_takes_turns_may_have_all_of_its_gpu_whatever_its_share() -> None:
    config = load_config("llama-3-8b-colocated", BY_TURNS)
    assert {one.role: one.share for one in job_memory(config, published_files)} == {
        "policy": 1.0, "critic": 1.0, "reference": 1.0, "reward": 1.0, "rollout": 0.8,
    }  # fmt: skip


def test_each_phase_holds_what_may_be_there_and_of_the_others_what_cannot_leave() -> None:
    table, least = figures()
    context = CONTEXT / GB
    # By hand: bf16, 8.03e9 numbers. Shards of an eighth, whole for the engine; a frozen model at ZeRO-3 keeps its shards.
    shard, whole = 8.03 * 2 / 8, 8.03 * 2
    assert table["generate"]["policy"] == table["learn"]["rollout"] == pytest.approx(context)
    assert table["generate"]["reference"] == pytest.approx(shard + context, rel=0.01)
    assert table["publish"]["rollout"] == pytest.approx(whole + context, rel=0.01)
    assert table["publish"]["policy"] == pytest.approx(shard + context, rel=0.01), (
        "its optimizer and its bucket have left"
    )
    assert table["learn"]["policy"] == pytest.approx(14.8, abs=0.1), "the peak that the recipe's comment states"
    # 80 % are the engine's while it generates; four contexts and two shards take the rest.
    rest = 4 * context + 2 * shard
    assert least == pytest.approx(max(rest / 0.2, table["generate"]["rollout"] / 0.8, *(
        sum(table[phase].values()) for phase in ("score", "learn", "publish"))), rel=0.02)  # fmt: skip


def test_an_optimizer_on_the_gpu_leaves_before_weights_go_to_the_engines() -> None:
    table, _ = figures("policy.engine.zero=2", "policy.engine.offload=none", "policy.ranks=8")
    assert table["learn"]["policy"] - table["publish"]["policy"] > 8.03 * 12 / 8
    assert table["publish"]["policy"] == pytest.approx(8.03 * 2 + CONTEXT / GB, rel=0.02)


def test_a_gpu_that_does_not_hold_a_phase_is_refused_with_the_numbers_and_the_way_out() -> None:
    config = load_config("llama-3-8b-colocated", BY_TURNS)
    memory = job_memory(config, published_files)
    least = colocated_gpu_needed(config, memory)
    requirement(config, memory)(least)
    with pytest.raises(CapacityError) as error:
        requirement(config, memory)(least - 1e6)
    message = str(error.value)
    assert message.startswith("the job does not fit: in the phase ") and "or set cluster.colocate to false" in message
    assert error.value.exit_code == 3
    with pytest.raises(
        CapacityError, match=r"phase generate .* change rollout\.gpu_memory_utilization, which is 0\.99"
    ):
        tight = load_config("llama-3-8b-colocated", [*BY_TURNS, "rollout.gpu_memory_utilization=0.99"])
        requirement(tight, job_memory(tight, published_files))(80 * GB)
    with pytest.raises(CapacityError, match=r"a rank of policy needs"):  # by shares, as without turns
        apart = load_config("llama-3-8b-colocated", ["policy.resources.gpus_per_rank=0.1"])
        requirement(apart, job_memory(apart, published_files))(80 * GB)


def test_the_table_has_a_line_for_each_phase_and_one_for_the_host() -> None:
    config = load_config("llama-3-8b-colocated", BY_TURNS)
    text = phases_table(config, job_memory(config, published_files))
    first = [line.replace("│", " ").split()[:1] for line in text.splitlines()]
    assert [words[0] for words in first if words and words[0] in {phase.value for phase in Phase}] == list(Phase)
    (host,) = [line.replace("│", " ").split() for line in text.splitlines() if "host, away" in line]
    # Shards of policy and critic, whose optimizers are on the host anyhow; frozen shards stay; the engine keeps a copy.
    assert [float(cell) for cell in host[2:]] == [
        pytest.approx(value, abs=0.15) for value in (2.1, 2.0, 0.0, 0.0, 16.1)
    ]


def test_a_model_that_is_not_here_has_no_size_and_refuses_nothing() -> None:
    config = load_config("llama-3-8b-colocated", BY_TURNS)
    memory = [replace(one, parts=()) if one.role == "critic" else one for one in job_memory(config, published_files)]
    (learning,) = [
        line.replace("│", ";").split(";") for line in phases_table(config, memory).splitlines() if "learn" in line
    ]
    assert [cell.strip() for cell in learning[2:5]] == ["14.8", "not known yet", "2.8"]
    nothing = [replace(one, parts=()) for one in memory]
    requirement(config, nothing)(1.0)
    assert "0.0" not in phases_table(config, nothing)
