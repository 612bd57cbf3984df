"""Log-probabilities of answers under the policy that a training on preferences starts from, its reference.

They are computed once, by the policy itself before its first update, and kept for the next run beside the encoded rows.

Invariants: what is read from the cache was computed from the same weights over the same tokens, in the same precision. Packs do
not depend on the number of ranks, so no number does. Memory does not hold the batches of all examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch

from rlhf_ray.actors.groups import PolicyGroup, SharedBatch
from rlhf_ray.algorithms.preferences.rewards import answer_log_probs
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.console import get_logger, progress
from rlhf_ray.data.cache import load_or_make, make_key
from rlhf_ray.errors import RequestError
from rlhf_ray.models.weights.fingerprint import fingerprint_model
from rlhf_ray.rollout.execution import versions
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import Schedule, deal_packs

FORMAT = 1
"""To be raised when a change of the code gives other log-probs for the same model and tokens."""
EXAMPLES_PER_CALL = 512
"""Of two sequences each. Progress shows between calls, and each call has its own deadline."""
NO_INFLUENCE = {"path", "revision", "lora", "gradient_checkpointing", "trust_remote_code"}
"""Keys of a model that say nothing about its numbers beside its fingerprint: a fresh adapter adds nothing."""


def sum_log_probs(policy: PolicyGroup, shared: SharedBatch, schedule: Schedule) -> torch.Tensor:
    """(B,) the log-prob in nats of each answer of a batch under the policy as it is now."""
    return answer_log_probs(policy.log_probs(shared, schedule).result(), shared.batch)


def measure(policy: PolicyGroup, batch: TrajectoryBatch, max_tokens: int, unit: int) -> torch.Tensor:
    """The same of a batch that is not shared yet; ``unit`` sequences in a row stay in one micro-batch."""
    schedule = deal_packs(batch.lengths.tolist(), ranks=policy.size, max_tokens=max_tokens, unit=unit)
    return sum_log_probs(policy, policy.share(batch), schedule)


class Reference:
    """Asks the policy before its first update, or the folder ``cache``; null keeps nothing."""

    def __init__(self, policy: PolicyGroup, model: ModelConfig, max_tokens: int, cache: str | None) -> None:
        self._policy, self._model, self._max_tokens, self._cache = policy, model, max_tokens, cache

    def log_probs(
        self, examples: Sequence[Any], make_batch: Callable[[Sequence[Any]], TrajectoryBatch]
    ) -> list[tuple[float, float]]:
        """The log-probs in nats of the two answers of each example, of which ``make_batch`` makes two sequences.

        Raises :class:`RequestError` where one is not finite.
        """
        if not examples:
            return []
        starts = range(0, len(examples), EXAMPLES_PER_CALL)

        def parts() -> Iterator[TrajectoryBatch]:
            """One batch after the other; each is made again for the second use, so that memory does not hold them all."""
            return (make_batch(examples[start : start + EXAMPLES_PER_CALL]) for start in starts)

        def compute() -> pa.Table:
            get_logger("data").info("%d log-probs of the reference are computed once", 2 * len(examples))
            what = f"reference log-probs, {EXAMPLES_PER_CALL} examples a call"
            shown = progress(parts(), what, total=len(starts))
            sums = torch.cat([measure(self._policy, part, self._max_tokens, unit=2) for part in shown])
            wrong = int((~sums.isfinite()).sum())
            if wrong:
                raise RequestError(
                    f"{wrong} of {len(sums)} log-probs of the model that training starts from are NaN or infinite: look at "
                    "policy.model.path, or set policy.model.dtype to fp32"
                )
            return pa.table({"log_prob": pa.array(sums.double().numpy())})

        table = load_or_make(self._cache, f"reference-{self._key(parts())}", compute)
        pairs = table["log_prob"].to_numpy().reshape(-1, 2).tolist()
        return [(first, second) for first, second in pairs]

    def _key(self, parts: Iterable[TrajectoryBatch]) -> str:
        digest = hashlib.sha256()
        for part in parts:
            arrays = part.to_arrays()
            for name in ("offsets", "token_ids", "action_mask"):
                digest.update(f"{name} {arrays[name].shape}".encode())
                digest.update(arrays[name].tobytes())
        return make_key(
            {
                "format": FORMAT,
                "model": fingerprint_model(self._model).digest,
                "settings": self._model.model_dump(mode="json", exclude=NO_INFLUENCE),
                "tokens": digest.hexdigest(),
                "versions": versions("torch", "transformers"),
            }
        )
