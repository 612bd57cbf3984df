"""What marks turns for a reward model, so that a service can refuse texts that would forge them.

Invariants: a marker is a special token of the tokenizer, or what its template writes between turns where no special token
stands there; nothing is known by the name of a model; a refusal shows the marker and the field, never the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from rlhf_ray.data.chat_template import render
from rlhf_ray.errors import DataError, ScoringError
from rlhf_ray.rewards.request import ScoreRequest

SHORTEST_MARKER = 3
"""Letters: what is shorter stands in any text."""
PROBES = ("Qzjx one", "Qzjx two", "Qzjx three", "Qzjx four")


class TemplateMarkers:
    """The markers of one tokenizer and its template."""

    def __init__(self, tokenizer: Any) -> None:
        tokens = getattr(tokenizer, "added_tokens_decoder", {})
        special = {str(token) for token in tokens.values() if token.special} | set(tokenizer.all_special_tokens)
        between = [] if tokenizer.chat_template is None else _between_turns(tokenizer)
        plain = {text.strip() for text in between if not any(token in text for token in special)}
        markers = {marker for marker in special | plain if len(marker) >= SHORTEST_MARKER}
        self.markers: Sequence[str] = sorted(markers, key=len, reverse=True)

    def refuse(self, request: ScoreRequest) -> None:
        """Raise :class:`ScoringError` for a conversation, or a prompt and response, that holds a marker in any of its texts."""
        if request.text is not None or request.token_ids is not None:  # whole texts have their markers in them
            return
        for name, text in request.texts(keys=True):
            for marker in self.markers:
                if marker in text:
                    raise ScoringError(
                        f"{name} holds {marker!r}, which marks turns for the reward model: take it out (this service was "
                        "started with refuse_markers)"
                    )


def _between_turns(tokenizer: Any) -> Iterator[str]:
    """What the template writes between the turns of a conversation, and before its answer."""
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, PROBES, strict=True)]
    try:
        text = render(tokenizer, messages)
    except DataError:  # it writes no such conversation, so that it marks no turns of one
        return
    for probe, following in pairwise(PROBES):
        _, found, rest = text.partition(probe)
        separator, also_found, _ = rest.partition(following)
        if found and also_found:
            yield separator
