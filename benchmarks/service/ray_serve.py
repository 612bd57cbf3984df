"""Run the scoring app without a model as a replica of Ray Serve, to compare its proxy with uvicorn alone.

Invariants: the replica runs the same app that ``rlhf-ray serve`` puts behind its port. Ray starts and ends with the
measurement.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.service.reward_service import instant_app
from rlhf_ray import environment

CONCURRENCY = 256
"""Requests that the replica accepts at once, more than there are clients, so that none waits in the proxy."""


@contextmanager
def behind_ray_serve() -> Iterator[tuple[str, int]]:
    """Start one replica; gives the host and port of Serve's proxy."""
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
        # The replica makes the app itself: an app cannot be pickled.
        deployment: Any = serve.deployment(
            serve.ingress(instant_app)(), max_ongoing_requests=CONCURRENCY, ray_actor_options=options
        )
        serve.run(deployment.bind(), name="scoring", route_prefix="/")
        yield "127.0.0.1", port
    finally:
        serve.shutdown()
        ray.shutdown()
