"""Rollout engines, the fleet that shares prompts among them, their health, and how they get new weights.

Invariants: importing this package imports neither torch nor vLLM; nothing in it knows Ray.
"""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "EngineDeadError": ".errors",
        "EngineHandle": ".fleet",
        "EngineState": ".health",
        "Fleet": ".fleet",
        "FleetHealth": ".health",
        "Generation": ".requests",
        "GenerationRequest": ".requests",
        "HealthPolicy": ".health",
        "Probe": ".requests",
        "PublishedWeights": ".wire",
        "RolloutEngine": ".engine",
        "TransformersEngine": ".transformers_engine",
        "VllmEngine": ".vllm_engine",
        "WeightUpdateError": ".errors",
        "gather": ".requests",
        "make_requests": ".requests",
        "publish": ".wire",
        "request_seed": ".requests",
    },
)
