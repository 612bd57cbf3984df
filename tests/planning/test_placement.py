"""Ranks are assigned to nodes by what is free there, labels and strategies, and refused only where no assignment exists."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.actors.nodes import _node
from rlhf_ray.config.loading import load_config
from rlhf_ray.errors import CapacityError, ConfigError
from rlhf_ray.planning import placement
from rlhf_ray.planning.capacity import Bundle, fits, needed
from rlhf_ray.planning.placement import MARK, Node, assign, picture, show

TWO = [Node("a", 2.0, labels={"zone": "x"}), Node("b", 2.0, labels={"zone": "y"}, resources={"near": 1.0})]


def legal(bundles, places, nodes):
    """Slow reference: whether places keep to sums, labels and strategies; GPUs are tried one by one."""
    for index, node in enumerate(nodes):
        mine = [bundle for bundle, place in zip(bundles, places, strict=True) if place == index]
        if sum(round(bundle.cpus * 10) for bundle in mine) > round(node.cpus * 10):
            return False
        if any(node.labels.get(name) != value for bundle in mine for name, value in bundle.labels):
            return False
        if any(bundle.resource is not None and node.resources.get(bundle.resource, 0.0) < MARK for bundle in mine):
            return False
        gpus = [bundle.gpus for bundle in mine if bundle.gpus]
        if not any(
            all(
                sum(round(gpu * 10) for gpu, on in zip(gpus, tried, strict=True) if on == one) <= 10
                for one in range(int(node.gpus))
            )
            for tried in product(range(int(node.gpus)), repeat=len(gpus))
        ):
            return False
    for role in {bundle.role for bundle in bundles}:
        on = Counter(place for bundle, place in zip(bundles, places, strict=True) if bundle.role == role)
        strategy = next(bundle.strategy for bundle in bundles if bundle.role == role)
        if (strategy == "strict_pack" and len(on) > 1) or (strategy == "strict_spread" and max(on.values()) > 1):
            return False
    return True


def found(bundles, nodes):
    """Where the bundles are assigned, or the refusal, so that an assertion shows it."""
    try:
        return assign(bundles, nodes)
    except CapacityError as error:
        return str(error)


roles = st.tuples(
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 0.3, 0.4, 0.6, 1.0]),
    st.sampled_from(["pack", "spread", "strict_pack", "strict_spread"]),
    st.sampled_from([(), (), (("zone", "x"),)]),
    st.sampled_from([None, None, "near"]),
    st.integers(1, 3),
)
some_nodes = st.lists(
    st.builds(
        Node,
        st.just("node"),
        st.sampled_from([1.0, 2.0, 3.0]),
        st.sampled_from([0.0, 1.0, 2.0]),
        st.sampled_from([{}, {"zone": "x"}]),
        st.sampled_from([{}, {"near": 1.0}]),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=250, deadline=None)
@given(jobs=st.lists(roles, min_size=1, max_size=2), nodes=some_nodes)
def test_it_is_assigned_legally_exactly_where_a_legal_assignment_exists(jobs, nodes):
    bundles = [Bundle(f"role{number}", *job[:5]) for number, job in enumerate(jobs) for _ in range(job[5])]
    possible = any(legal(bundles, places, nodes) for places in product(range(len(nodes)), repeat=len(bundles)))
    places = found(bundles, nodes)
    assert possible == isinstance(places, list), places
    assert not possible or legal(bundles, places, nodes)


def test_what_fits_in_sum_and_not_in_pieces_is_refused_with_the_nodes_and_the_rank_that_has_no_place():
    bundles = [Bundle("policy", 1.5), Bundle("critic", 1.5), Bundle("reward", 1.0)]
    assert fits(bundles, [{"CPU": node.cpus} for node in TWO])  # the sum alone does not show it
    with pytest.raises(CapacityError, match=r"reward rank 0 \(1 CPU, 0 GPU, strategy pack\) finds no place") as error:
        assign(bundles, TWO)
    rows = [" ".join(line.replace("│", " ").split()) for line in str(error.value).splitlines()]
    assert "a zone=x 0.5 of 2 0 of 0 policy 0" in rows
    assert "nowhere reward 0" in rows


def test_a_label_that_no_node_has_is_named_with_those_that_there_are():
    with pytest.raises(CapacityError, match=r"no node has 1 CPU, 0 GPU, label zone=z(?s:.*)zone=x(?s:.*)near"):
        assign([Bundle("policy", 1.0, labels=(("zone", "z"),))], TWO)


def test_a_custom_resource_that_no_node_has_is_named():
    with pytest.raises(CapacityError, match=r"no node has 1 CPU, 0 GPU, resource far"):
        assign([Bundle("policy", 1.0, resource="far")], TWO)


def test_labels_and_resources_are_compared_once_for_each_kind_of_rank_and_node(monkeypatch):
    calls = Counter()
    compare = placement._offers
    monkeypatch.setattr(placement, "_offers", lambda *pair: [calls.update(["times"]), compare(*pair)][1])
    bundles, nodes = [Bundle(f"role{number % 4}", 1.0) for number in range(40)], [Node("node", 4.0)] * 16
    assert isinstance(found(bundles, nodes), list)
    assert calls["times"] <= 2 * 4 * 16


@pytest.mark.parametrize(("limit", "value", "told"), [("TRIES", 60, "60 tries"), ("SEARCH_S", 0.05, r"0\.05 s")])
def test_a_search_that_is_ended_says_what_ended_it(limit, value, told, monkeypatch):
    monkeypatch.setattr(placement, "TRIES", 20_000)
    monkeypatch.setattr(placement, limit, value, raising=False)
    bundles = [*[Bundle("policy", 2.0)] * 20, *[Bundle("critic", 1.5)] * 3]  # one of each fits no node
    nodes = [Node(f"node {number}", 3.4 + number / 1000) for number in range(21)]
    refusal = found(bundles, nodes)
    assert re.search(f"gave up after {told}, so that an assignment may exist", str(refusal)), refusal


def test_what_ray_gives_every_node_can_be_asked_for_but_is_not_in_the_picture():
    given = {"accelerator_type:H100": 1.0, "node:10.0.0.1": 1.0, "near": 1.0}
    entry = {"NodeManagerAddress": "10.0.0.1", "NodeManagerHostname": "a", "NodeID": "1", "Labels": {}}
    node = _node({**entry, "Resources": {"CPU": 2.0, "GPU": 1.0, "memory": 9.0, **given}}, {"CPU": 2.0, **given})
    assert dict(node.resources) == given
    assert found([Bundle("policy", 1.0, resource="accelerator_type:H100")], [node]) == [0]
    text = picture([], [], [node])
    assert "near" in text
    assert "node:" not in text
    assert "accelerator_type" not in text


def test_a_first_choice_that_leaves_no_room_for_the_rest_is_taken_back():
    bundles = [
        Bundle(role, cpus) for role, cpus in (("policy", 4.0), ("critic", 3.0), ("reference", 2.0), ("reward", 2.0))
    ]
    assert found(bundles, [Node("a", 6.0), Node("b", 5.0)]) in (
        [0, 1, 0, 1],
        [0, 1, 1, 0],
    )  # the first fits on b as well


def test_nodes_of_one_size_and_other_labels_are_not_taken_for_alike():
    bundles = [*[Bundle("policy", 1.0, strategy="strict_pack")] * 2, Bundle("critic", 1.0, labels=(("zone", "x"),))]
    assert found(bundles, [Node("a", 2.0, labels={"zone": "x"}), Node("b", 2.0)]) == [1, 1, 0]


def test_soft_strategies_are_kept_where_there_is_room_and_given_up_where_there_is_none():
    nodes = [Node(name, 4.0) for name in "abc"]
    assert set(assign([Bundle("policy", 1.0)] * 4, nodes)) == {0}
    assert set(assign([Bundle("policy", 1.0, strategy="spread")] * 3, nodes)) == {0, 1, 2}
    assert sorted(Counter(assign([Bundle("policy", 1.0)] * 6, nodes)).values()) == [2, 4]
    assert sorted(Counter(assign([Bundle("policy", 1.0, strategy="spread")] * 5, nodes)).values()) == [1, 2, 2]


def test_fractions_of_different_gpus_do_not_hold_one_rank():
    nodes = [Node("a", 9.0, 2.0)]
    with pytest.raises(CapacityError, match="not in these pieces"):
        assign([Bundle("policy", 1.0, 0.6)] * 2 + [Bundle("critic", 1.0, 0.8)], nodes)
    assert found([Bundle("policy", 1.0, 0.6)] * 2 + [Bundle("critic", 1.0, 0.4)] * 2, nodes) == [0] * 4


@pytest.mark.parametrize("recipe", ["llama-3-70b-4nodes", "llama-3-8b-colocated", "llama-3-8b-8gpu"])
def test_the_picture_of_a_recipe_names_every_rank(recipe):
    bundles = needed(load_config(recipe))
    text = show(bundles, [Node(f"node {number}", 80.0, 8.0, labels=None) for number in range(4)])[0]
    assert "node 3" in text
    assert "nowhere" not in text
    assert all(bundle.role.split(" ")[0] in text for bundle in bundles)


def test_ranks_are_counted_by_role():
    text = picture([Bundle("policy", 0.5)] * 3 + [Bundle("rollout", 0.5)], [0, 0, 1, 0], TWO)
    rows = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert "a zone=x 0.5 of 2 0 of 0 policy 0-1, rollout 0" in rows
    assert "b zone=y, near 1.5 of 2 0 of 0 policy 2" in rows


def test_the_keys_of_a_config_reach_the_places_of_its_ranks_the_derived_reference_included():
    config = load_config(
        "demo-ppo",
        [
            "reference=null",
            "policy.placement={strategy: strict_spread, labels: {zone: x}}",
            "rollout.placement.resource=near",
        ],
    )
    found = {bundle.role: (bundle.strategy, bundle.labels, bundle.resource) for bundle in needed(config)}
    assert found["policy"] == found["reference"] == ("strict_spread", (("zone", "x"),), None)
    assert found["rollout"] == ("pack", (), "near")
    assert found["critic"] == ("pack", (), None)


def test_roles_on_the_same_gpus_cannot_go_to_different_nodes():
    shares = [f"{role}.{key}" for role in ("policy", "critic") for key in ("ranks=2", "resources.gpus_per_rank=0.4")]
    with pytest.raises(ConfigError, match=r"critic\.placement: it differs from that of policy"):
        load_config("demo-ppo", [*shares, "policy.placement.strategy=strict_spread"])


def test_an_amount_is_no_custom_resource():
    with pytest.raises(ConfigError, match=r"placement.resource: GPU is no custom resource"):
        load_config("demo-ppo", ["policy.placement.resource=GPU"])
