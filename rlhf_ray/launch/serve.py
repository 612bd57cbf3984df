"""``rlhf-ray serve``: start a reward model behind HTTP, and keep it running until a signal stops it.

Invariants: nothing listens before the weights are loaded; the address is printed on standard output, alone on its line; a
service whose model died or hangs restarts it, for as long as it takes; a gateway whose process died is followed by another
at the same port with the models that it served, and the command ends with an error where five of these cannot start; a
stopped service leaves no process behind. Only with ``--detach`` does a service outlive the command.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from rlhf_ray import environment
from rlhf_ray.actors.cluster import SERVICE_NAMESPACE, Cluster, free_places_of_the_dead
from rlhf_ray.actors.ranks import START_TIMEOUT, RayRanks
from rlhf_ray.config.files.tokens import read_tokens
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.paths import with_absolute_paths
from rlhf_ray.config.preflight import hub_ids
from rlhf_ray.console import get_logger, write_result
from rlhf_ray.errors import EXIT_DONE, DeadlineError, GroupError, RequestError, RlhfRayError, StorageError
from rlhf_ray.network import cluster_address
from rlhf_ray.processes.interrupts import interruptible
from rlhf_ray.serving.auth import require_closed
from rlhf_ray.serving.cluster_client import find_service, gateway_name
from rlhf_ray.serving.recovery import FIRST_PAUSE_S, LONGEST_PAUSE_S
from rlhf_ray.serving.server import WebServer

SECONDS_BETWEEN_CHECKS = 5.0
CHECK_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0
STARTS_IN_VAIN = 5
RELOADED = ("reward.model.path", "reward.model.revision", "name", "run.name")
"""The keys that ``--reload`` follows, beside those of the cluster that it joins."""


def serve(config: ServeConfig, *, detach: bool) -> int:
    """Serve until SIGINT or SIGTERM; with ``detach`` return as soon as it answers and leave it running."""
    require_closed(config.host, read_tokens(config.token_file))
    config = with_absolute_paths(config, Path.cwd())  # the gateway and its ranks have other working directories
    if detach and cluster_address(config.cluster.address) is None:
        raise RequestError(
            "--detach leaves the service on a Ray cluster, but this command would start one and take it along when it "
            "ends: start one (ray start --head) and give cluster.address=auto"
        )
    WebServer(config.host, config.port).stop()  # a port in use is an error before anything starts
    try:
        with interruptible(), Cluster.for_job(config, namespace=SERVICE_NAMESPACE):
            with _gateway(config, detach=detach) as (gateway, address):
                if detach:
                    return EXIT_DONE
                config, error = _watch(gateway, config)
            _serve_again(config.model_copy(update={"port": urlsplit(address).port}), error)
    except KeyboardInterrupt:
        get_logger("serving").info("stopped")
    return EXIT_DONE


def reload(config: ServeConfig, given: Collection[str]) -> int:
    """Let ``reward.model`` take the place of the model ``name`` of the service ``run.name``, which goes on answering.

    ``given`` are the keys and options of the command, which are refused where the service could not follow them.
    """
    ignored = [key for key in given if key not in RELOADED and not key.startswith("cluster.")]
    if ignored:
        raise RequestError(
            f"{', '.join(ignored)}: --reload changes the model alone, and the rest of a service stays as it was started "
            f"({', '.join(RELOADED)} say which model and where): leave it out, or start another service"
        )
    if cluster_address(config.cluster.address) is None:
        raise RequestError("--reload changes a service that runs on a Ray cluster: give cluster.address=auto")
    model = with_absolute_paths(config, Path.cwd()).reward.model
    if model.path is None:
        raise RequestError("--reload needs the path or hub id of a model")
    with Cluster.for_job(config, namespace=SERVICE_NAMESPACE, check_room=False):
        service = find_service(
            config.run.name, timeout_s=config.cluster.placement_timeout_s + config.cluster.start_timeout_s
        )
        version = service.call("reload", [(model.path, config.name, model.revision)]).result()[0]
    get_logger("serving").info("%s: version %s is served", config.name, version)
    return EXIT_DONE


def _serve_again(config: ServeConfig, error: GroupError) -> NoReturn:
    """Start another gateway at the same port whenever one has died; raises after ``STARTS_IN_VAIN`` failures in a row."""
    pause, failed = FIRST_PAUSE_S, 0
    while True:
        get_logger("serving").error("%s: starting another gateway in %g s", error, pause)
        time.sleep(pause)
        try:
            free_places_of_the_dead(config.run.name)
            with _gateway(config, detach=False) as (gateway, _):
                pause, failed = FIRST_PAUSE_S, 0
                config, error = _watch(gateway, config)
        except RlhfRayError as reason:
            pause, failed = min(2 * pause, LONGEST_PAUSE_S), failed + 1
            if failed == STARTS_IN_VAIN:  # whoever supervises this command can do more
                raise
            error = reason if isinstance(reason, GroupError) else GroupError("gateway", None, "start", str(reason))


@contextmanager
def _gateway(config: ServeConfig, *, detach: bool) -> Iterator[tuple[RayRanks, str]]:
    """A gateway that answers, and its address; it is stopped at the end, unless it came up detached."""
    name = gateway_name(config.run.name)
    gateway = _start(config, name, detach=detach)
    is_up = False
    try:
        limit_s = config.cluster.placement_timeout_s + 2 * config.cluster.start_timeout_s
        address = gateway.call("start", [()], timeout_s=limit_s, key=START_TIMEOUT).result()[0]
        _announce(address)
        end = f"ray.kill(ray.get_actor({name!r}, {SERVICE_NAMESPACE!r})) ends it" if detach else "Ctrl-C ends it"
        page = f", or open {address}/ in a browser" if config.page else ""
        get_logger("serving").info("POST %s/get_reward or %s/v1/reward%s; %s", address, address, page, end)
        is_up = True
        yield gateway, address
    finally:
        if not (detach and is_up):
            _stop(gateway, gracefully=is_up)


def _announce(address: str) -> None:
    """Print the address; where standard output is closed or full, the log below holds it alone."""
    try:
        write_result(f"{address}\n")
    except StorageError:
        get_logger("serving").warning("standard output takes nothing: the address stands here alone")


def _start(config: ServeConfig, name: str, *, detach: bool) -> RayRanks:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from rlhf_ray.serving.gateway import GatewayActor

    here = ray.get_runtime_context().get_node_id()
    try:
        actor = GatewayActor.options(
            name=name,
            namespace=SERVICE_NAMESPACE,
            lifetime="detached" if detach else None,
            runtime_env={"env_vars": environment.for_process(hub=bool(hub_ids(config)), device="cpu")},
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),  # its port is on this machine
        ).remote(config)
    except ValueError as error:
        raise RequestError(
            f"a service named {config.run.name} runs on this cluster already: stop it, or give another run.name"
        ) from error
    return RayRanks("gateway", [actor], timeout_s=config.cluster.call_timeout_s, on_stop=lambda: None)


def _stop(gateway: RayRanks, *, gracefully: bool) -> None:
    try:
        if gracefully:
            gateway.call("stop", [()], timeout_s=STOP_TIMEOUT_S).result()
    except RlhfRayError as error:
        get_logger("serving").warning("%s", error)
    finally:
        gateway.stop()


def _watch(gateway: RayRanks, config: ServeConfig) -> tuple[ServeConfig, GroupError]:
    """Ask the gateway again and again whether it lives; returns what it served at last, after reloads, and what it died of."""
    while True:
        time.sleep(SECONDS_BETWEEN_CHECKS)
        try:
            (config,) = gateway.call("alive", [()], timeout_s=CHECK_TIMEOUT_S).result()
        except DeadlineError as error:  # a machine that is busy is no reason to end
            get_logger("serving").warning("%s: asking again", error)
        except GroupError as error:
            return config, error
