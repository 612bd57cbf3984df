"""The summary that a run writes at its end: what its report shows besides the metrics.

Invariant: a summary is plain JSON on disk, and reading it back gives an equal one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import TypeAdapter, ValidationError

from rlhf_ray.errors import IntegrityError


@dataclass(frozen=True)
class Figure:
    """One headline number, as text, with a note in small print."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under headers; the first cell of a row is its name."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Answer:
    """The answer of one policy, ``label``, to a prompt.

    ``scores`` holds its rewards by name; ``finished`` is false for an answer that was cut off at the longest length.
    """

    label: str
    text: str
    scores: dict[str, float] = field(default_factory=dict)
    finished: bool = True


@dataclass(frozen=True)
class Sample:
    """One prompt and the answers of several policies to it."""

    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Check:
    """One line of the self-check at start-up: what was measured, and the bound that it must keep."""

    name: str
    value: str
    bound: str
    passed: bool


@dataclass(frozen=True)
class BestOf:
    """Best-of-n sampling of the starting policy by the learned reward.

    ``kl`` is its KL from the starting policy in nats a sequence, ``gold`` the mean gold score of the samples it picks.
    """

    n: int
    kl: float
    gold: float
    win_rate: float | None = None
    """How often it beats the first answer of the starting policy; none in a summary of version 0.1."""


@dataclass(frozen=True)
class PreferencePage:
    """How a reward model scores held-out preference pairs.

    ``calibration`` has a bin a row: mean confidence, accuracy, number of pairs. ``histograms`` has, for the chosen and
    the rejected side, the share of answers whose score lies between two neighbours in ``edges``. ``sources`` has the
    figures of each data source and ``worst`` the pairs that the model gets most wrong. ``probes`` says, in the generated
    world, how much the model rewards each quality of an answer.
    """

    calibration: tuple[tuple[float, float, int], ...]
    edges: tuple[float, ...]
    histograms: dict[str, tuple[float, ...]]
    sources: Table
    worst: Table
    probes: Table | None = None


@dataclass(frozen=True)
class MemoryRecord:
    """Memory at its peak, in GB (1e9 bytes), and ``history``: seconds since the start and the total then.

    ``nodes`` has the share of each node in the peak, by host name.
    """

    pss_gb: float
    object_store_gb: float
    processes: int
    history: tuple[tuple[float, float], ...] = ()
    nodes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """The whole summary; a part that a kind of job does not have stays empty."""

    facts: dict[str, str] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    closing: Table | None = None
    samples: tuple[Sample, ...] = ()
    checks: tuple[Check, ...] = ()
    best_of: tuple[BestOf, ...] = ()
    preferences: PreferencePage | None = None
    memory: MemoryRecord | None = None

    def to_json(self) -> str:
        """The summary as JSON text."""
        return _SUMMARY.dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "summary") -> Summary:
        """The summary that :meth:`to_json` wrote; ``source`` names it in the ``IntegrityError`` of a damaged one."""
        try:
            return _SUMMARY.validate_json(text)
        except ValidationError as error:
            raise IntegrityError(f"{source} is damaged: {error}") from error


_SUMMARY = TypeAdapter(Summary)
