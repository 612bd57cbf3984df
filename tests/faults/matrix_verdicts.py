"""The verdicts of cells: how each is read from the events of a run, the file that keeps them, and the table in the docs.

Always true: a verdict is of one hit; it counts as long as the files that its cell runs are those of its digest; the table shows
the newest verdict of each cell, and every cell that has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.faults.matrix_cells import FAULTS, PHASES, ROLES, Cell, cells, digest, where, why_not

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- matrix: made by python -m tests.faults.matrix -->", "<!-- end of matrix -->"
LONGEST_SILENCE_S = 120.0
IN_PLACE, PARENT, ENDED = "went on in place", "restarted by the parent", "ended"
WITH_DRIVER = "restarted with the driver"
"""By the parent, since the run's next fault was a kill of the driver, in the same step."""


@dataclass(frozen=True)
class Verdict:
    """What became of one cell."""

    role: str
    phase: str
    fault: str
    outcome: str
    """``went on in place``, ``restarted by the parent`` or ``ended``."""
    identical: bool
    """Whether the final weights are bit for bit those of the run that met nothing."""
    prompts_once: bool
    seconds: float | None
    """From the fault until the step was finished in which it was met and overcome; None if it never was."""
    detected_s: float | None
    """From the fault until it was noticed, by the incident that the run noted; None if it noted none."""
    back_s: float | None
    """From then until training went on, by the same incident."""
    lost_steps: int
    """Finished steps that were done again."""
    silence_s: float
    """The longest time without a sign of the driver (an event, an incident that begins or ends) until the step was finished."""
    left: list[str]
    """Processes and shared memory that were still there when the run had ended."""
    where: str
    commit: str
    seed: int
    command: str
    date: str
    digest: str
    note: str = ""
    """How the run ended, where it did not reach its end."""
    run: str = ""
    """Which run met it; others may have met it too."""
    drawn: bool = False
    """Whether the run met several kills that were drawn; such a verdict is none of the cell alone."""

    @property
    def cell(self) -> Cell:
        return Cell(self.role, self.phase, self.fault)  # type: ignore[arg-type]

    @property
    def as_promised(self) -> bool:
        """Whether everything holds that is promised of a cell."""
        kept = self.outcome in (IN_PLACE, WITH_DRIVER) or (self.role == "driver" and self.outcome == PARENT)
        whole = self.identical and self.prompts_once and not self.left and self.seconds is not None
        return kept and whole and self.silence_s <= LONGEST_SILENCE_S

    @property
    def is_stale(self) -> bool:
        """Whether a file that the cell runs has changed since."""
        return self.digest != digest(self.cell)

    def words(self) -> str:
        """The verdict in a cell of the table."""
        short = {IN_PLACE: "in place", PARENT: "by the parent", WITH_DRIVER: "with the driver", ENDED: "ended"}[
            self.outcome
        ]
        parts = [short] if self.seconds is None else [short, f"{self.seconds:.0f} s", f"{self.lost_steps}"]
        parts += [] if self.identical else ["other bits"]
        parts += [] if self.prompts_once else ["prompts twice"]
        parts += [f"left {len(self.left)}"] if self.left else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Reading:
    """What the events of a run say of one hit."""

    outcome: str
    seconds: float | None
    detected_s: float | None
    back_s: float | None
    lost_steps: int
    silence_s: float


def read_hit(events: Sequence[Mapping[str, Any]], cell: str, incidents: Sequence[Any] = ()) -> Reading | None:
    """What became of the hit of a cell; None where it was not hit. Events are in the order in which they happened."""
    events = sorted(events, key=lambda event: event["at"])
    found = [number for number, event in enumerate(events) if event["what"] == "hit" and event["cell"] == cell]
    if not found:
        return None
    hit = events[found[0]]
    before, after = events[: found[0]], events[found[0] + 1 :]
    next_hit = next((event["at"] for event in after if event["what"] == "hit"), float("inf"))
    begun = max((event["step"] for event in before if event["what"] == "phase"), default=1) or 1
    done = max((event["step"] for event in before if event["what"] == "step"), default=0)
    finished = _finished(after, begun)
    following = _finished(after, begun + 1) or finished
    # The driver notes those of others as it notices them and as it goes on; one of its own is noted because it was silent.
    signs = [moment for one in incidents if one.role != "driver" for moment in (one.at, one.at + one.seconds)]
    incidents = [one for one in incidents if hit["at"] <= one.at < next_hit]
    drivers = [event["at"] for event in after if event["what"] == "driver" and event["at"] < next_hit]
    troubled = [*drivers, *(one.at for one in incidents)]
    if finished and following and any(finished["at"] <= at <= following["at"] for at in troubled):
        finished = following  # who had no more work in its step is missed in the next one
    until = finished["at"] if finished is not None else float("inf")
    between = [event for event in after if event["at"] <= until]
    times = sorted([*(event["at"] for event in (hit, *between)), *(at for at in signs if hit["at"] <= at <= until)])
    noticed = next((one for one in incidents if one.at <= until), None)
    outcome = ENDED if finished is None else IN_PLACE
    starts = sum(event["what"] == "driver" for event in between)
    deaths = sum(event["what"] == "hit" and _kills_the_driver(event["cell"]) for event in between)
    if finished is not None and starts:
        outcome = PARENT if starts > deaths else WITH_DRIVER
    return Reading(
        outcome,
        None if finished is None else until - hit["at"],
        None if noticed is None else noticed.at - hit["at"],
        None if noticed is None else noticed.seconds,
        sum(event["what"] == "step" and event["step"] <= done for event in between),
        max((b - a for a, b in pairwise(times)), default=0.0),
    )


def _kills_the_driver(cell: str) -> bool:
    role, _, fault = cell.split("/")
    return (role, fault) == ("driver", "SIGKILL")


def _finished(events: Iterable[Mapping[str, Any]], step: int) -> Mapping[str, Any] | None:
    """The event with which ``step``, or a later one, was finished: the end of the run finishes what comes after all steps."""
    return next(
        (event for event in events if event["what"] == "end" or (event["what"] == "step" and event["step"] >= step)),
        None,
    )


def append(verdicts: Iterable[Verdict], path: Path = RESULTS) -> None:
    """Add verdicts to the file."""
    with path.open("a") as stream:
        for verdict in verdicts:
            stream.write(json.dumps(asdict(verdict)) + "\n")


def read(path: Path = RESULTS) -> list[Verdict]:
    """All verdicts, the oldest first."""
    lines = path.read_text().splitlines() if path.is_file() else []
    names = {field.name for field in fields(Verdict)}
    return [Verdict(**{name: value for name, value in json.loads(line).items() if name in names}) for line in lines]


def newest(verdicts: Iterable[Verdict]) -> dict[Cell, Verdict]:
    """The last verdict of each cell."""
    return {verdict.cell: verdict for verdict in verdicts if not verdict.drawn}


def runs_with_several_kills(verdicts: Iterable[Verdict]) -> dict[str, bool]:
    """The runs that met several kills which were drawn, and whether each ended as promised of all of them."""
    runs: dict[str, bool] = {}
    for verdict in verdicts:
        if verdict.drawn:
            runs[verdict.run] = runs.get(verdict.run, True) and verdict.as_promised
    return runs


def open_cells(verdicts: Iterable[Verdict]) -> list[Cell]:
    """Cells without a verdict, and those whose files have changed since."""
    known = newest(verdicts)
    return [cell for cell in cells() if cell not in known or known[cell].is_stale]


def table(verdicts: Iterable[Verdict]) -> str:
    """The matrix as Markdown, one table a role."""
    verdicts = list(verdicts)
    known, several = newest(verdicts), runs_with_several_kills(verdicts)
    good = sum(verdict.as_promised for verdict in known.values())
    lines = [
        f"{len(known)} of {len(cells())} cells have been run, {good} of them ended as promised. "
        + (
            f"Of {len(several)} runs that met several drawn kills, {sum(several.values())} did."
            if several
            else "No run that meets several drawn kills has been made yet."
        ),
        "",
    ]
    for role in ROLES:
        lines += [f"| {role} | {' | '.join(FAULTS)} |", "|---" * (len(FAULTS) + 1) + "|"]
        for phase in PHASES:
            row = [_words(Cell(role, phase, fault), known) for fault in FAULTS]
            lines.append(f"| {phase.replace('_', '-')} | {' | '.join(row)} |")
        lines.append("")
    return "\n".join(lines)


def _words(cell: Cell, known: Mapping[Cell, Verdict]) -> str:
    if why_not(cell) is not None:
        return "-"
    if cell not in known:
        return "not run"
    mark = "" if known[cell].as_promised else " (!)"
    place = "" if where(cell) == "Ray" else " (one process)"
    return f"{known[cell].words()}{place}{mark}"


def write_table(verdicts: Iterable[Verdict], page: Path = PAGE) -> None:
    """Put the table into the page, in the place of the one that is there."""
    text = page.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(f"{text[:begin]}\n\n{table(verdicts)}\n{text[end:]}")
