"""A job is refused only when no placement of it can exist, with a table of needed and free."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config.loading import load_config
from rlhf_ray.errors import EXIT_NO_CAPACITY, CapacityError
from rlhf_ray.planning import Bundle, capacity_table, fits, needed, require_fit


def totals(bundles):
    return sum(bundle.cpus for bundle in bundles), sum(bundle.gpus for bundle in bundles)


def test_every_rank_and_every_engine_has_a_bundle():
    overrides = ["policy.ranks=2", "rollout.engines=3", "reference.ranks=2", "rollout.resources.cpus_per_rank=0.5"]
    bundles = needed(load_config("demo-ppo", overrides))
    assert [bundle.role for bundle in bundles] == [
        "policy", "policy", "critic", "reference", "reference", "reward", "rollout", "rollout", "rollout",
    ]  # fmt: skip
    assert {bundle.cpus for bundle in bundles if bundle.role == "rollout"} == {0.5}


def test_a_reference_that_is_not_set_takes_a_place_and_a_reward_function_takes_none():
    config = load_config("demo-ppo", ["reference=null", "reward={function: world.gold}"])
    assert [bundle.role for bundle in needed(config)] == ["policy", "critic", "reference", "rollout"]


def test_ranks_that_share_gpus_are_one_bundle_of_a_whole_gpu_each():
    roles = [f"{role}.{key}" for role in ("policy", "critic") for key in ("ranks=2", "resources.gpus_per_rank=0.4")]
    bundles = needed(
        load_config(
            "demo-ppo",
            [*roles, "rollout.engines=2", "rollout.resources.gpus_per_rank=0.2", "rollout.gpu_memory_utilization=0.2"],
        )
    )
    assert bundles[:2] == [Bundle("policy + critic + rollout", pytest.approx(0.6), 1.0)] * 2
    assert [bundle.role for bundle in bundles[2:]] == ["reference", "reward"]


def test_what_an_algorithm_does_not_need_takes_no_place():
    overrides = ["algorithm.name=dapo", "algorithm.kl.coefficient=0.0", "critic=null", "batch.samples_per_prompt=4"]
    config = load_config("demo-ppo", [*overrides, "reference=null"])
    assert [bundle.role for bundle in needed(config)] == ["policy", "reward", "rollout"]
    assert not any("critic" in line.what for line in config.sizes(None))


@pytest.mark.parametrize(
    ("recipe", "gpus"),
    [
        ("qwen3-0.6b-1gpu", 1),
        ("llama-3-8b-8gpu", 8),
        ("llama-3-8b-colocated", 8),
        ("llama-3-70b-4nodes", 32),
        ("demo-ppo", 0),
        ("serve", 0),
    ],
)
def test_recipes_take_the_gpus_that_their_names_promise(recipe, gpus):
    bundles = needed(load_config(recipe))
    assert totals(bundles)[1] == pytest.approx(gpus)
    nodes = [{"CPU": 80.0, "GPU": 8.0}] * 4 if gpus == 32 else [{"CPU": 160.0, "GPU": float(gpus)}]
    assert fits(bundles, nodes)
    if gpus:
        assert not fits(bundles, [{**nodes[0], "GPU": nodes[0]["GPU"] - 0.05}, *nodes[1:]])


@pytest.mark.parametrize("recipe", ["demo-sft", "demo-rm", "demo-ppo", "hh-rm", "hh-ppo"])
def test_the_recipes_for_this_machine_fit_two_cores(recipe):
    assert fits(needed(load_config(recipe)), {"CPU": 2.0, "GPU": 0.0})


def test_more_ranks_than_the_cluster_has_ends_with_a_table():
    bundles = [Bundle("policy", 1.0, 1.0)] * 4 + [Bundle("rollout", 1.0, 2.0)]
    with pytest.raises(CapacityError) as error:
        require_fit(bundles, {"CPU": 16.0, "GPU": 4.0})
    message = str(error.value)
    assert error.value.exit_code == EXIT_NO_CAPACITY
    assert message.startswith("the job does not fit: 6 GPU needed, 4 free\n")
    for row in ("policy 4 1 1 4 4", "rollout 1 1 2 1 2", "needed 5 5 6", "free 16 4"):
        assert any(row.split() == line.replace("│", " ").split() for line in message.splitlines()), row


def test_both_resources_are_named_when_both_are_short():
    with pytest.raises(CapacityError, match="2 CPU needed, 1 free; 2 GPU needed, 0 free"):
        require_fit([Bundle("policy", 1.0, 1.0)] * 2, [{"CPU": 1.0}])


def test_an_engine_that_no_node_has_room_for():
    nodes = [{"CPU": 8.0, "GPU": 3.0}] * 4
    with pytest.raises(
        CapacityError, match="2 ranks need 1 CPU and 4 GPU on one node each, but the nodes have room for 0"
    ):
        require_fit([Bundle("rollout", 1.0, 4.0)] * 2, nodes)
    assert fits([Bundle("rollout", 1.0, 3.0)] * 4, nodes)


def test_shares_add_up_exactly():
    assert fits([Bundle("policy", 0.2)] * 5, {"CPU": 1.0})
    assert fits([Bundle("policy", 0.1, 0.1)] * 10, [{"CPU": 1.0, "GPU": 1.0}])
    assert not fits([Bundle("policy", 0.2)] * 5, {"CPU": 0.9999})
    assert fits([Bundle("policy", 1.0, 8.0)] * 100, {"CPU": 100.0, "GPU": float("inf")})


def test_nothing_needed_fits_nothing():
    assert fits([], [])
    assert fits([], {})


def test_like_nodes_share_a_line_of_the_table():
    text = capacity_table([Bundle("policy", 1.0)], [{"CPU": 4.0}] * 3 + [{"CPU": 2.0}])
    assert "free on 3 of the nodes, each" in text
    assert "free on 1 of the nodes, each" in text
    assert [line for line in text.splitlines() if line.replace("│", " ").split()[:3] == ["free", "14", "0"]]


def placeable(bundles, nodes):
    """Slow reference: try every assignment of bundles to nodes."""
    for places in product(range(len(nodes)), repeat=len(bundles)):
        if all(
            sum(round(b.cpus * 10) for b, p in zip(bundles, places, strict=True) if p == n) <= round(node["CPU"] * 10)
            and sum(round(b.gpus * 10) for b, p in zip(bundles, places, strict=True) if p == n)
            <= round(node["GPU"] * 10)
            for n, node in enumerate(nodes)
        ):
            return True
    return False


amounts = st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0, 2.0])
some_bundles = st.lists(
    st.builds(Bundle, st.just("policy"), st.sampled_from([0.1, 0.5, 1.0, 2.0]), amounts), max_size=5
)
some_nodes = st.lists(st.fixed_dictionaries({"CPU": amounts, "GPU": amounts}), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(bundles=some_bundles, nodes=some_nodes)
def test_what_is_refused_cannot_be_placed(bundles, nodes):
    if not fits(bundles, nodes):
        assert not placeable(bundles, nodes)


@settings(max_examples=100, deadline=None)
@given(bundles=some_bundles, node=st.fixed_dictionaries({"CPU": amounts, "GPU": amounts}))
def test_on_one_node_the_answer_is_exact(bundles, node):
    assert fits(bundles, [node]) == placeable(bundles, [node])
