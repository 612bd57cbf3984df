"""The scoring app with no model behind, as a replica of Ray Serve: what its proxy costs beside uvicorn alone.

Always true: the replica runs the very app that ``rlhf-ray serve`` puts behind its port; Ray is started for the measurement
and ends with it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.reward_service import instant_app
from rlhf_ray import environment

CONCURRENCY = 256
"""Requests that the replica takes at once: more than there are clients, so that none waits in the proxy."""


@contextmanager
def behind_ray_serve() -> Iterator[tuple[str, int]]:
    """Host and port of Serve's proxy, with one replica behind it."""
    environment.prepare()
    import ray
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="bench")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = {"num_cpus": 0.5}
        # The replica makes its app itself: an app does not travel.
        deployment = serve.deployment(
            serve.ingress(instant_app)(), max_ongoing_requests=CONCURRENCY, ray_actor_options=options
        )
        serve.run(deployment.bind(), name="scoring", route_prefix="/")
        yield "127.0.0.1", port
    finally:
        serve.shutdown()
        ray.shutdown()
