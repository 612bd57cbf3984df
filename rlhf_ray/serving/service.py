"""A scoring service: a port, the keys that open it, and the models that answer there.

Invariants: the port is taken before any model is loaded, and nothing answers at it before ``start``; without a key it
listens on this machine only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_ray.config.sections.service import ServiceConfig
from rlhf_ray.serving.app import create_app
from rlhf_ray.serving.auth import TokenFile, require_closed
from rlhf_ray.serving.metrics import Metrics
from rlhf_ray.serving.models import Backend, Limits, ModelCatalog, ServedModel
from rlhf_ray.serving.server import WebServer
from rlhf_ray.serving.tracing import OpenTelemetryTracer
from rlhf_ray.serving.transport.connection import ConnectionLimits


class ScoringService:
    """Takes its port when it is made, and answers from ``start`` to ``stop``."""

    catalog: ModelCatalog
    """The models that are served; set by ``start``."""

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config
        self._keys = TokenFile(config.token_file)
        require_closed(config.host, self._keys())
        self._tracer = OpenTelemetryTracer() if config.tracing else None
        limits = ConnectionLimits(config.header_timeout_s, config.write_timeout_s)
        self.server = WebServer(config.host, config.port, limits=limits, trusted_proxies=config.trusted_proxies)

    def start(self, replicas: Mapping[str, Sequence[Backend]]) -> str:
        """Answer with these models, each under its name and by its loaded replicas; returns the address."""
        metrics, limits = Metrics(), Limits.of(self.config)
        self.catalog = ModelCatalog(
            [ServedModel(name, backends, limits, metrics) for name, backends in replicas.items()]
        )
        app = create_app(self.catalog, self.config, metrics, self._keys, self._tracer)
        self.server.start(app, give_up=app.state.give_up)
        return self.server.address

    def stop(self) -> None:
        """Finish what is being answered, and free the port."""
        self.server.stop()
        if self._tracer is not None:
            self._tracer.close()
