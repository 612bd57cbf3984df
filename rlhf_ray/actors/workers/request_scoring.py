"""Score requests on the side of a rank: encode them, cut them into packs, and turn scores into results.

Invariants: every request ends in one result, a score or a sentence that says why there is none; all ranks of a group make
the same cut from the same requests, each computes its own share, and the shares together are the whole. An item that the
model fails on costs only itself its score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray.actors.workers.template_markers import TemplateMarkers
from rlhf_ray.config.files.positions import longest_sequence
from rlhf_ray.console import get_logger
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.errors import ScoringError
from rlhf_ray.rewards.encoding import EncodedItem, encode_request, encode_text_pair, refuse_unread
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.trajectories.length_packs import make_length_packs
from rlhf_ray.trajectories.packing import group_by_prefix
from rlhf_ray.trajectories.schedule import MicroBatch, make_schedule

if TYPE_CHECKING:
    from rlhf_ray.models.reward_reading import RewardReading

PREFIX_PACKS_PER_RANK = 4
"""Split items with a common prefix into at least this many packs per rank if there are no others."""

Sequences = Sequence[Sequence[int]]
Parts = list[tuple[MicroBatch, "np.ndarray[Any, Any]"]]
"""Indices of sequences, and the score of each of them."""
ScoreSequences = Callable[[Sequences], tuple[Parts, Mapping[int, str]]]
"""From token ids to scores, and by the index of a sequence why it has none."""


class RequestScorer:
    """Holds what decides how a reward model reads a request: its tokenizer, its template, its training, its limits."""

    def __init__(
        self,
        tokenizer: Any,
        model_config: Any,
        *,
        vocabulary: int,
        max_item_tokens: int,
        reading: RewardReading | None = None,
        max_item_bytes: int | None = None,
        refuse_markers: bool = False,
    ) -> None:
        """``max_item_tokens`` is lowered to the number of positions that the model has; an encoder has no ``reading``.

        An item with more bytes of text than ``max_item_bytes`` is refused unread; with ``refuse_markers`` also one whose texts
        hold what marks turns.
        """
        from rlhf_ray.data.tokenizers import fingerprint, template_fingerprint

        self.chat = ChatFormat(tokenizer, {} if reading is None else reading.template_variables)
        self.reading = reading
        self.vocabulary = vocabulary
        self.max_item_tokens = min(
            max_item_tokens, longest_sequence(model_config.get_text_config().to_dict()) or max_item_tokens
        )
        self.max_item_bytes = max_item_bytes
        self._identity = {"fingerprint": fingerprint(tokenizer), "template": template_fingerprint(tokenizer)}
        self._markers = TemplateMarkers(tokenizer) if refuse_markers else None
        self._statistics = _statistics(model_config.to_dict())

    def describe(self) -> dict[str, Any]:
        """What callers must know of this model: its tokenizer and template, how it reads, its limit, and its mean and std."""
        mean, std = self._statistics
        return {
            **self._identity,
            "reads": None if self.reading is None else self.reading.describe(),
            "mean": mean,
            "std": std,
            "max_tokens": self.max_item_tokens,
        }

    def score(
        self, requests: Sequence[ScoreRequest], scores: ScoreSequences, *, rank: int
    ) -> list[tuple[int, ScoreResult]]:
        """Results with their positions in ``requests``; rank 0 alone reports the requests that cannot be scored."""
        encoded, refused = self._encode(requests)
        results = refused if rank == 0 else []
        if not encoded:
            return results
        positions, items = list(encoded), list(encoded.values())
        parts, failures = scores([item.token_ids for item in items])
        for index, reason in failures.items():
            results.append((positions[index], ScoreResult.failed(reason, len(items[index].token_ids))))
        for indices, values in parts:
            for index, score in zip(indices, values.tolist(), strict=True):
                item = items[index]
                result = ScoreResult.of(score, len(item.token_ids), truncated=item.truncated)
                results.append((positions[index], result))
        return results

    def _encode_item(self, request: ScoreRequest) -> EncodedItem:
        assert self.reading is not None, "encoders have a scorer of their own"
        return encode_request(
            self.chat,
            request,
            reading=self.reading,
            max_tokens=self.max_item_tokens,
            vocabulary=self.vocabulary,
        )

    def _encode(self, requests: Sequence[ScoreRequest]) -> tuple[dict[int, EncodedItem], list[tuple[int, ScoreResult]]]:
        encoded: dict[int, EncodedItem] = {}
        refused: list[tuple[int, ScoreResult]] = []
        for position, request in enumerate(requests):
            try:
                if self.max_item_bytes is not None:
                    refuse_unread(request, max_bytes=self.max_item_bytes)
                if self._markers is not None:
                    self._markers.refuse(request)
                encoded[position] = self._encode_item(request)
            except ScoringError as error:
                refused.append((position, ScoreResult.failed(str(error))))
        return encoded, refused


class TextPairScorer(RequestScorer):
    """Reads a request as an encoder does: a prompt and its response are a pair of texts."""

    def describe(self) -> dict[str, Any]:
        """The same as of any other model, but with a fingerprint that no other has: its ids are not those of a policy."""
        described = super().describe()
        return {**described, "fingerprint": f"text pairs of {described['fingerprint']}"}

    def _encode_item(self, request: ScoreRequest) -> EncodedItem:
        return encode_text_pair(
            self.chat.tokenizer, request, max_tokens=self.max_item_tokens, vocabulary=self.vocabulary
        )


def _statistics(model_config: Mapping[str, Any]) -> tuple[float, float] | tuple[None, None]:
    """The mean and std in a model's ``config.json``, if both are there and can be used."""
    mean, std = model_config.get("mean"), model_config.get("std")
    if mean is None or std is None or not math.isfinite(mean) or not 0 < std < math.inf:
        return None, None
    return mean, std


def scoring_packs(
    sequences: Sequences, *, rank: int, ranks: int, threads: int, ranks_meet: bool, max_tokens: int
) -> list[MicroBatch]:
    """The packs of ``sequences`` that ``rank`` scores. Sequences that begin alike share a pack, which computes that once.

    ``threads`` is the number of packs that a rank runs side by side; ``max_tokens`` is what they hold together. Where ranks
    meet in every forward pass (``ranks_meet``), each gets the same number of packs; otherwise work alone decides.
    """
    lengths = list(map(len, sequences))
    budget = max(max_tokens // threads, *lengths)
    family_budget = min(budget, sum(lengths) // (PREFIX_PACKS_PER_RANK * ranks * threads))
    units = group_by_prefix(sequences, max(*lengths, family_budget))
    if not ranks_meet:
        return make_length_packs(lengths, units, ranks=ranks, streams=threads, max_tokens=budget)[rank]
    schedule = make_schedule([sum(lengths[i] for i in unit) for unit in units], ranks=ranks, max_tokens=budget)
    return [tuple(i for index in pack for i in units[index]) for pack in schedule.rank(rank)]


def score_apart(
    packs: Sequence[MicroBatch], score: Callable[[Sequence[MicroBatch]], Parts], works: Callable[[], object]
) -> tuple[Parts, dict[int, str]]:
    """Scores of ``packs``, and by the index of a sequence why it has none.

    Where ``score`` raises, it is called with halves, until each sequence that it fails on is alone. Then ``works`` is called,
    which scores what any model can: if it raises too, the model is at fault, and so does this function.
    """
    try:
        return score(packs), {}
    except Exception as error:
        if len(packs) == len(packs[0]) == 1:
            works()
            reason = f"the model fails on this item ({type(error).__name__}: {_first_line(error)})"
            get_logger(__name__).warning("%s", reason)
            return [], {packs[0][0]: reason}
    # only now, when the error no longer holds what the failed forward had in memory
    if len(packs) == 1:
        packs = _halves(packs[0])
    (parts, failures), (more_parts, more_failures) = (score_apart(half, score, works) for half in _halves(packs))
    return [*parts, *more_parts], failures | more_failures


def _halves(whole: Sequence[Any]) -> tuple[Any, Any]:
    middle = len(whole) // 2
    return whole[:middle], whole[middle:]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
