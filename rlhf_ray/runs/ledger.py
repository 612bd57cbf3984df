"""The ledger of a run: which prompts were used in which step.

Invariants: every step has one line, which follows that of the step before. The line is on disk before the checkpoint of the
step is committed, so that a checkpoint never knows of a prompt that the ledger does not. Lines past the step that a resumed
run goes on from move to ``ledger.void.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.data.order import Part
from rlhf_ray.errors import IntegrityError
from rlhf_ray.runs.lines import ledger_problem
from rlhf_ray.storage.jsonl import JsonLines


@dataclass(frozen=True)
class LedgerEntry:
    """The prompts that one step used, in the order in which it took them; ``attempt`` counts the starts of the run from 1."""

    step: int
    attempt: int
    prompt_ids: tuple[int, ...]


class Ledger:
    """The file ``ledger.jsonl`` of a run. A prompt that a step took and dropped counts as used too."""

    def __init__(self, path: str | Path, attempt: int = 1) -> None:
        self.path = Path(path)
        self.attempt = attempt
        self._lines = JsonLines(self.path, ledger_problem)
        self._last_step: int | None = None

    @property
    def last_step(self) -> int:
        """The last step in the ledger; 0 if there is none."""
        if self._last_step is None:
            entries = self.entries()
            self._last_step = entries[-1].step if entries else 0
        return self._last_step

    def append(self, step: int, prompt_ids: Sequence[int]) -> None:
        """Add the prompts of a step; call it before the step's checkpoint is committed."""
        if step != self.last_step + 1:
            raise IntegrityError(f"{self.path}: step {step} cannot follow step {self.last_step}; each is written once")
        self._lines.append(
            {"step": step, "attempt": self.attempt, "prompt_ids": [int(prompt) for prompt in prompt_ids]}
        )
        self._last_step = step

    def entries(self) -> list[LedgerEntry]:
        """All lines of the ledger, in order."""
        return [LedgerEntry(line["step"], line["attempt"], tuple(line["prompt_ids"])) for line in self._lines.read()]

    def void_after(self, step: int) -> int:
        """Move the lines past ``step`` to ``ledger.void.jsonl``, and return how many there were.

        Raises :class:`IntegrityError` if the ledger does not end at ``step`` then. A job without a ledger has no file, and
        nothing happens.
        """
        if not self.path.exists():
            return 0
        voided = self._lines.keep(lambda line: line["step"] <= step, JsonLines(self.path.with_suffix(".void.jsonl")))
        self._last_step = None
        if self.last_step != step:
            raise IntegrityError(
                f"{self.path} ends at step {self.last_step}, but the checkpoint is of step {step}: lines are missing, "
                "and nobody knows which prompts were used. Restore the file from a backup, or start a new run"
            )
        return voided

    def verify(self, prompt_ids: Sequence[int], parts: Sequence[Part] = ()) -> int:
        """The number of complete epochs; raises :class:`IntegrityError` if an epoch used a prompt more often than it should.

        ``parts`` divide ``prompt_ids`` into the files of the data, in order: an epoch takes ``per_epoch`` prompts of each
        file, and all prompts of a file equally often. Without parts an epoch takes each prompt once.
        """
        size = len(prompt_ids)
        if size == 0 or size != len(set(prompt_ids)):
            raise ValueError(f"{size} prompts with {len(set(prompt_ids))} different ids: each needs an id of its own")
        parts = parts or [Part(size, size)]
        part_of = dict(zip(prompt_ids, (part for part in parts for _ in range(part.size)), strict=True))
        epoch_size = sum(part.per_epoch for part in parts)
        steps: dict[int, list[int]] = {}
        for consumed, (step, prompt) in enumerate(self._consumed()):
            if prompt not in part_of:
                raise IntegrityError(f"{self.path}: step {step} used prompt {prompt}, which is not in the data")
            epoch, used = consumed // epoch_size + 1, steps.setdefault(prompt, [])
            # Rounded up: a prompt may be used in the earliest epoch in which its share comes to another whole use.
            allowed = -(-part_of[prompt].per_epoch * epoch // part_of[prompt].size)
            if len(used) >= allowed:
                raise IntegrityError(
                    f"{self.path}: prompt {prompt} was used once too often in epoch {epoch}, "
                    f"in step {used[-1]} and in step {step}"
                )
            used.append(step)
        return sum(map(len, steps.values())) // epoch_size

    def _consumed(self) -> Iterator[tuple[int, int]]:
        """Pairs of step and prompt, in the order in which prompts were used."""
        for entry in self.entries():
            for prompt in entry.prompt_ids:
                yield entry.step, prompt
