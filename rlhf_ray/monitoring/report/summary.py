"""What a run has to say at its end, beside its metrics: the closing table, samples, self-check, memory.

Always true: a summary is plain JSON on disk and comes back equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import TypeAdapter, ValidationError

from rlhf_ray.errors import IntegrityError


@dataclass(frozen=True)
class Figure:
    """One headline number, as text."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under headers; the first column names the row."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Answer:
    """What one policy (``label``) answered to a prompt."""

    label: str
    text: str
    scores: dict[str, float] = field(default_factory=dict)
    finished: bool = True


@dataclass(frozen=True)
class Sample:
    """One prompt with the answers of several policies to it."""

    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Check:
    """One line of the self-check at start-up."""

    name: str
    value: str
    bound: str
    passed: bool


@dataclass(frozen=True)
class BestOf:
    """Best-of-n sampling of the starting policy by the learned reward: its KL in nats and its mean gold score."""

    n: int
    kl: float
    gold: float


@dataclass(frozen=True)
class PreferencePage:
    """Held-out pairs of a reward model: bins of confidence (confidence, accuracy, pairs), the shares of both sides' scores
    between ``edges``, figures by source, the worst pairs, and in the generated world what each quality is worth.
    """

    calibration: tuple[tuple[float, float, int], ...]
    edges: tuple[float, ...]
    histograms: dict[str, tuple[float, ...]]
    sources: Table
    worst: Table
    probes: Table | None = None


@dataclass(frozen=True)
class MemoryRecord:
    """The peak, and the total in GB over the seconds of the run."""

    pss_gb: float
    object_store_gb: float
    processes: int
    history: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Summary:
    """All of it; what a kind of job does not have stays empty."""

    facts: dict[str, str] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    closing: Table | None = None
    samples: tuple[Sample, ...] = ()
    checks: tuple[Check, ...] = ()
    best_of: tuple[BestOf, ...] = ()
    preferences: PreferencePage | None = None
    memory: MemoryRecord | None = None

    def to_json(self) -> str:
        """The summary as text."""
        return _SUMMARY.dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "summary") -> Summary:
        """The summary that :meth:`to_json` wrote."""
        try:
            return _SUMMARY.validate_json(text)
        except ValidationError as error:
            raise IntegrityError(f"{source} is damaged: {error}") from error


_SUMMARY = TypeAdapter(Summary)
