"""What a judge may cost: requests, tokens and money, counted before they are spent and over all attempts of a run.

Invariants: what was spent and what may still be spent by questions under way never pass a limit together. The file of a budget
holds at least what was spent, at whatever moment the process is killed.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlhf_ray.errors import IntegrityError
from rlhf_ray.storage.atomic import write_file
from rlhf_ray.storage.failures import storage_errors

PROMISED_AHEAD = 50
"""For so many questions at once the file is written ahead; a killed run counts at most so many that were never asked."""
TOKENS_AROUND = 256
"""More than a chat template writes around the messages of a question."""
_MILLION = 1_000_000


@dataclass(frozen=True)
class Amount:
    """So many requests, so many tokens (prompts and replies), and so much money."""

    requests: int = 0
    tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.requests + other.requests, self.tokens + other.tokens, self.cost + other.cost)

    def __sub__(self, other: Amount) -> Amount:
        return self + other.times(-1)

    def times(self, factor: int) -> Amount:
        """The amount so many times."""
        return Amount(self.requests * factor, self.tokens * factor, self.cost * factor)

    def at_least(self, other: Amount) -> Amount:
        """The larger of both in each kind."""
        return Amount(max(self.requests, other.requests), max(self.tokens, other.tokens), max(self.cost, other.cost))

    def holds(self, other: Amount) -> bool:
        """Whether ``other`` is not more in any kind."""
        return self.at_least(other) == self


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens of prompts, and of replies."""

    prompt: float = 0.0
    reply: float = 0.0

    def amount(self, prompt_tokens: int, reply_tokens: int) -> Amount:
        """One request of so many tokens."""
        cost = (prompt_tokens * self.prompt + reply_tokens * self.reply) / _MILLION
        return Amount(1, prompt_tokens + reply_tokens, cost)

    def most(self, prompt: str, longest_reply: int) -> Amount:
        """What one request costs at most: a token is at least one byte of the text."""
        return self.amount(len(prompt.encode()) + TOKENS_AROUND, longest_reply)


@dataclass(frozen=True)
class Limits:
    """The most that may be spent; None where there is no limit."""

    requests: int | None = None
    tokens: int | None = None
    cost: float | None = None

    def allow(self, amount: Amount) -> bool:
        """Whether no limit is passed."""
        return self.passed(amount) is None

    def passed(self, amount: Amount) -> str | None:
        """The key and the value of the first limit that the amount passes."""
        limits = {"max_requests": self.requests, "max_tokens": self.tokens, "max_cost": self.cost}
        for (key, limit), spent in zip(limits.items(), asdict(amount).values(), strict=True):
            if limit is not None and spent > limit:
                return f"{key} {limit:g}" if isinstance(limit, float) else f"{key} {limit}"
        return None


class Budget:
    """What one judge has spent of its limits. Not for several threads at once."""

    def __init__(self, limits: Limits, path: Path | None = None) -> None:
        """``path`` is the file that keeps what was spent for the next attempt; without it nothing is kept."""
        self.limits, self.path = limits, path
        self.spent = _read(path)
        self.under_way = Amount()
        self._promised = self.spent

    def reserve(self, most: Amount) -> str | None:
        """Set ``most`` aside for one question; where that would pass a limit, nothing, and which limit that is."""
        wanted = self.spent + self.under_way + most
        passed = self.limits.passed(wanted)
        if passed is not None:
            return passed
        if not self._promised.holds(wanted):
            self._promise(self._ahead(wanted, most))
        self.under_way += most
        return None

    def settle(self, most: Amount, spent: Amount) -> None:
        """A question that ``most`` was set aside for has cost ``spent``."""
        self.under_way = replace(self.under_way - most, cost=max(0.0, self.under_way.cost - most.cost))
        self.spent += spent
        if not self._promised.holds(
            self.spent + self.under_way
        ):  # an endpoint that counts more tokens than there can be
            self._promise(self.spent + self.under_way)

    def keep(self) -> None:
        """Write exactly what was spent, and what is under way."""
        self._promise(self.spent + self.under_way)

    def _ahead(self, wanted: Amount, most: Amount) -> Amount:
        """What is promised at once: for some questions more, as far as the limits go."""
        ahead = wanted + most.times(PROMISED_AHEAD)
        limits = self.limits
        return Amount(
            ahead.requests if limits.requests is None else min(ahead.requests, limits.requests),
            ahead.tokens if limits.tokens is None else min(ahead.tokens, limits.tokens),
            ahead.cost if limits.cost is None else min(ahead.cost, limits.cost),
        )

    def _promise(self, amount: Amount) -> None:
        if self.path is not None and amount != self._promised:
            with storage_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, json.dumps(asdict(amount)))
        self._promised = amount


def _read(path: Path | None) -> Amount:
    """What the file says was spent; nothing where there is none."""
    if path is None or not path.exists():
        return Amount()
    with storage_errors(path, "read"):
        text = path.read_text()
    try:
        amount = Amount(**json.loads(text))
        if not all(math.isfinite(value) and value >= 0 for value in asdict(amount).values()):
            raise ValueError("a number is not finite, or below 0")
    except (ValueError, TypeError) as error:
        raise IntegrityError(
            f"{path} holds what a judge has spent, and cannot be read ({error}): write what its provider says, as "
            '{"requests": 0, "tokens": 0, "cost": 0.0}'
        ) from error
    return amount
