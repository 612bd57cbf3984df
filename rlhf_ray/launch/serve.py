"""``rlhf-ray serve``: bring a reward model up behind HTTP, and keep it up until asked to stop.

Always true: nothing listens before the weights are loaded; the address is printed on standard output, alone on its line;
a stopped service leaves no process behind, unless it was asked to outlive the command.
"""

from __future__ import annotations

import signal
import sys
import threading

from rlhf_ray.actors.cluster import SERVICE_NAMESPACE, Cluster
from rlhf_ray.actors.ranks import RayRanks
from rlhf_ray.config.files import hub_ids
from rlhf_ray.config.schema import ServeConfig
from rlhf_ray.console import get_logger
from rlhf_ray.planning.capacity import needed
from rlhf_ray.serving.auth import read_tokens, require_closed

GATEWAY_NAME = "gateway"
STOP_TIMEOUT_S = 30.0


def serve(config: ServeConfig, *, detach: bool) -> int:
    """Serve until SIGINT or SIGTERM; with ``detach`` return as soon as it answers and leave it running."""
    tokens = read_tokens(config.token_file)
    require_closed(config.host, tokens)
    hub = bool(hub_ids(config))
    with Cluster(config.cluster, config.run, needed=needed(config), hub=hub, namespace=SERVICE_NAMESPACE):
        gateway = _start_gateway(config, tokens, hub=hub, detach=detach)
        address = gateway.call("start", [()], timeout_s=config.cluster.start_timeout_s).result()[0]
        sys.stdout.write(f"{address}\n")
        sys.stdout.flush()
        get_logger("serving").info("ready: POST %s/get_reward, %s/v1/reward; Ctrl-C stops it", address, address)
        if detach:
            return 0
        try:
            _wait_for_signal()
        finally:
            gateway.call("stop", [()], timeout_s=STOP_TIMEOUT_S).result()
            gateway.stop()
    return 0


def _start_gateway(config: ServeConfig, tokens: tuple[str, ...], *, hub: bool, detach: bool) -> RayRanks:
    from rlhf_ray.serving.gateway import Gateway

    lifetime = "detached" if detach else None
    name = f"{GATEWAY_NAME}/{config.run.name}"
    actor = Gateway.options(name=name, namespace=SERVICE_NAMESPACE, lifetime=lifetime).remote(config, tokens, hub)
    return RayRanks("gateway", [actor], timeout_s=config.cluster.call_timeout_s, on_stop=lambda: None)


def _wait_for_signal() -> None:
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    while not asked.wait(timeout=1.0):
        pass
