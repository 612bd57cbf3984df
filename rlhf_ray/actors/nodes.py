"""What each node of the Ray cluster that this process is connected to has free.

Invariant: nodes that Ray calls dead are not among them.

Ray 2.60 has no public call for what is free on each node (``ray.available_resources`` is the sum over all, and
``ray.nodes`` says what a node has, free or not). ``ray._private.state.available_resources_per_node`` has it;
``tests/actors/test_reservation.py`` fails when that changes.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_ray.planning.placement import Node

NODE_LABEL = "ray.io/node-id"
"""The label by which Ray lets a bundle ask for one node."""
_OWN = ("CPU", "GPU", "memory", "object_store_memory")


def free_nodes() -> list[Node]:
    """Every live node and what is free on it now, as Ray knows it; this lags behind by up to a second or so."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [_node(entry, free.get(entry["NodeID"], {})) for entry in ray.nodes() if entry["Alive"]]


def _node(entry: Mapping[str, object], free: Mapping[str, float]) -> Node:
    labels, total = entry["Labels"], entry["Resources"]
    assert isinstance(labels, dict) and isinstance(total, dict)
    return Node(
        f"{entry['NodeManagerAddress']} ({entry['NodeManagerHostname']})",
        free.get("CPU", 0.0),
        free.get("GPU", 0.0),
        labels,
        {name: free.get(name, 0.0) for name in total if name not in _OWN},
        str(entry["NodeID"]),
    )
