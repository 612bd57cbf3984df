"""A client of a scoring service that runs on the same Ray cluster: by name and without HTTP.

Invariants: a call has a deadline and ends in values or in one typed error; its items are scored before those that come over
HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.actors.cluster import SERVICE_NAMESPACE
from rlhf_ray.actors.ranks import RayRanks
from rlhf_ray.errors import RequestError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult

CALL_TIMEOUT_S = 300.0


def gateway_name(service: str) -> str:
    """The name of a service's gateway actor."""
    return f"gateway/{service}"


def find_service(service: str, *, timeout_s: float = CALL_TIMEOUT_S) -> RayRanks:
    """The gateway of a service that runs on the cluster this process has joined."""
    import ray

    try:
        actor = ray.get_actor(gateway_name(service), SERVICE_NAMESPACE)
    except ValueError as error:
        raise RequestError(
            f"no service named {service} runs on this cluster: start one with rlhf-ray serve MODEL run.name={service} "
            "cluster.address=auto --detach"
        ) from error
    return RayRanks("gateway", [actor], timeout_s=timeout_s, on_stop=lambda: None)


class ServedScorer:
    """Scores with one model of a service; it can take the place of a reward group in :class:`rlhf_ray.rewards.ModelSource`."""

    def __init__(self, service: str, model: str | None = None, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._gateway = find_service(service, timeout_s=timeout_s)
        self._model = model

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        """One result per request, in order."""
        arguments = (list(requests), self._model)
        return self._gateway.call("score", [arguments]).then(lambda answers: list(answers[0]))

    def describe(self) -> Mapping[str, Any]:
        """What is served: model, version, tokenizer fingerprint, normalisation."""
        described: Mapping[str, Any] = self._gateway.call("describe", [(self._model,)]).result()[0]
        return described
