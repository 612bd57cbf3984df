"""Rewards: what can be scored and what comes back, where it comes from, batches across callers, and the HTTP client."""

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "AsyncRewardClient": ".client",
        "Batcher": ".batcher",
        "FunctionProcess": ".function_process",
        "FunctionSource": ".function_source",
        "MixtureSource": ".mixture",
        "ModelSource": ".source",
        "OverloadedError": ".batcher",
        "RewardClient": ".client",
        "RewardSource": ".source",
        "ScoreRequest": ".request",
        "ScoreResult": ".request",
        "TextSample": ".sample",
        "compute_score": ".adapters",
        "remote_reward": ".adapters",
        "score_turns": ".turns",
    },
)
