"""A limit that callers share: none of them can take so much of it that nothing is left for the next one.

Invariants: a caller holds at most half of what the others leave, so that each further caller finds something free; what is
given back is free at once, and a caller that holds nothing is forgotten.
"""

from __future__ import annotations

from collections import Counter


class SharedLimit:
    """``limit`` units of something; thresholds as in Choudhury and Hahne, "Dynamic Queue Length Thresholds" (1998)."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        """Of all callers together."""
        self._of: Counter[str] = Counter()

    def take(self, caller: str, units: int) -> bool:
        """Take more for a caller; without effect and false where that is more than its share."""
        own = self._of[caller] + units
        if own > (self.limit - (self.held - self._of[caller])) // 2:
            return False
        self._of[caller] = own
        self.held += units
        return True

    def give_back(self, caller: str, units: int) -> None:
        """Give back what a caller has taken."""
        self.held -= units
        self._of[caller] -= units
        if not self._of[caller]:
            del self._of[caller]
