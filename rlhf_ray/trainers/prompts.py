"""The stream of prompts that a run samples from.

Always true: each epoch hands out every prompt exactly once (or as often as the weight of its file says), in an order that only
the seed decides; the state is all that a resumed run needs to go on with the very next prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_ray.data.order import Part, ShuffledOrder
from rlhf_ray.runs.ledger import Ledger
from rlhf_ray.trainers.experience import TokenizedPrompt


class PromptStream:
    """Prompts without end."""

    def __init__(self, prompts: Sequence[TokenizedPrompt], parts: Sequence[Part], seed: int) -> None:
        self._prompts = prompts
        self._parts = parts
        self._order = ShuffledOrder(seed, parts)

    def take(self, count: int) -> list[TokenizedPrompt]:
        """The next ``count`` prompts, no prompt twice among them unless an epoch ends in between."""
        return [self._prompts[index] for index in self._order.take(count)]

    def peek(self, count: int) -> list[TokenizedPrompt]:
        """``count`` prompts from the beginning of the list; none is consumed."""
        return list(self._prompts[:count])

    def account(self, ledger: Ledger) -> int:
        """Check that every epoch so far used each prompt as often as it should, and say how many are complete."""
        return ledger.verify([prompt.prompt_id for prompt in self._prompts], self._parts)

    def state(self) -> dict[str, Any]:
        return self._order.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._order = ShuffledOrder.from_state(state, self._parts)
