"""What an operator watches, as Prometheus text: requests by route and status, forwards, items, tokens, the queue."""

from __future__ import annotations

from collections import Counter


class Counters:
    """Counts since the start."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._forwards = 0
        self._items = 0
        self._tokens = 0
        self._seconds = 0.0

    def request(self, route: str, status: int) -> None:
        """One answered request."""
        self._requests[route, status] += 1

    def forward(self, *, items: int, tokens: int, seconds: float) -> None:
        """One batch through the model."""
        self._forwards += 1
        self._items += items
        self._tokens += tokens
        self._seconds += seconds

    def text(self, *, waiting: int) -> str:
        """All of it in Prometheus' exposition format."""
        lines = ["# TYPE rlhf_scoring_requests_total counter"]
        lines += [
            f'rlhf_scoring_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self._requests.items())
        ]
        counters = {
            "forwards": self._forwards,
            "items": self._items,
            "tokens": self._tokens,
            "forward_seconds": round(self._seconds, 6),
        }
        for name, value in counters.items():
            lines += [f"# TYPE rlhf_scoring_{name}_total counter", f"rlhf_scoring_{name}_total {value}"]
        lines += ["# TYPE rlhf_scoring_waiting_items gauge", f"rlhf_scoring_waiting_items {waiting}"]
        return "\n".join(lines) + "\n"
