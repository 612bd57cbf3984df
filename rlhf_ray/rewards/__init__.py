"""Everything that gives rewards: requests and their results, reward sources, batches across callers, and HTTP clients."""

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
