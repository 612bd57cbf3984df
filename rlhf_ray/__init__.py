"""Reinforcement learning from human feedback as a service on a Ray cluster.

The names below are the package's interface for Python; ``docs/python.md`` shows them at work. Importing the package
imports none of its modules: a name imports what it needs when it is first used.
"""

from rlhf_ray.lazy import lazy_exports

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Actor": ".models",
        "AsyncRewardClient": ".rewards",
        "RewardClient": ".rewards",
        "Run": ".api",
        "ScoreRequest": ".rewards",
        "ScoreResult": ".rewards",
        "evaluate": ".api",
        "evaluate_data": ".api",
        "evaluate_policies": ".api",
        "get_llm_for_sequence_regression": ".models",
        "generate": ".api",
        "load_tokenizer": ".models",
        "read_demonstrations": ".rows",
        "read_preferences": ".rows",
        "read_prompts": ".rows",
        "rescore": ".api",
        "resume": ".api",
        "score": ".api",
        "train": ".api",
    },
)
