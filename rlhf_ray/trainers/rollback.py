"""What a run does when updates were skipped: say so, and after too many of them go back to a commit, or stop.

Invariants: a run goes back to weights that were committed before the first of the skipped updates, and never more often than
``guards.max_going_back``; the newest such commit is kept for it, and where there is none, it stops. Going back undoes updates
and nothing else: steps, rows and the ledger go on, so that the rows on which they were made are not met again, as PaLM
skipped the batches around a spike (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1). The step is committed at once: a
resumed run does not meet them either.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray import storage
from rlhf_ray.console import get_logger
from rlhf_ray.errors import IntegrityError
from rlhf_ray.runs.incidents import Action, Incident
from rlhf_ray.trainers.checkpointing import Checkpointer
from rlhf_ray.trainers.guards import Guards

NOT_FINITE = "NaN or Inf in a loss or gradient"


class SkipPolicy:
    """Watches the skipped updates of one run; ``most`` of them in a row are too many, whatever the guards say."""

    def __init__(self, checkpoints: Checkpointer, most: int, advice: str) -> None:
        self.checkpoints, self.most, self.advice = checkpoints, most, advice

    def report(self, guards: Guards, role: str, step: int, skipped: int, stood_out: Sequence[str]) -> None:
        """Log the ``skipped`` updates of a step, and write them down. Commits from now on keep the one to go back to."""
        self.checkpoints.skipped_since = guards.may_go_back_before
        if not skipped:
            return
        cause = "; ".join(stood_out) or NOT_FINITE
        get_logger("runs").warning("step %d: %d updates changed no weight: %s", step, skipped, cause)
        self._write(role, step, cause, "skipped", step, time.time())

    def go_back(self, guards: Guards, skips: int, role: str, step: int) -> bool:
        """Give the trained groups earlier weights if too many updates were skipped up to ``step``, the last ``skips`` in a row.

        Returns whether they have them: ``step`` must then be committed before anything else is done.
        """
        if guards.config.on_budget != "go_back" or not (guards.spent or skips >= self.most):
            return False
        at, first = time.time(), guards.first_skip
        self.checkpoints.settle()
        if guards.went_back >= guards.config.max_going_back:
            get_logger("runs").error("the run went back %d times already (guards.max_going_back)", guards.went_back)
            return False
        back_to = self._load(first)
        if back_to is None:
            get_logger("runs").error("no commit from before step %d is kept, to go back to", first)
            return False
        guards.forget_skips()
        cause = f"too many updates were skipped since step {first}"
        get_logger("runs").warning("%s: the weights are those of step %d again", cause, back_to)
        self._write(role, step, cause, "rolled_back", back_to, at)
        return True

    def refuse(self, guards: Guards, skips: int, step: int, state: Mapping[str, Any]) -> None:
        """Raise :class:`NumericalError` if too many updates were skipped; what was learned before them is committed."""
        too_many = ""
        if guards.spent:
            too_many = f"{guards.skipped} of the last {guards.config.window} updates were skipped (guards.budget)"
        self.checkpoints.refuse_skips(skips, self.most, step, state, self.advice, too_many)

    def _load(self, before: int) -> int | None:
        """Load the newest whole commit of a step ``before`` this one into every group; returns its step, if there is one."""
        store = self.checkpoints.run.checkpoints
        for step in reversed([step for step in store.steps() if step < before]):
            path = store.checkpoint_path(step)
            try:
                storage.verify(path)
            except IntegrityError as error:
                get_logger("runs").error("%s: it cannot be gone back to", error)
                continue
            for loading in [group.load(str(path / name)) for name, group in self.checkpoints.groups.items()]:
                loading.result()
            return step
        return None

    def _write(self, role: str, step: int, cause: str, action: Action, back_to: int, at: float) -> None:
        lost, seconds = step - back_to, time.time() - at
        self.checkpoints.run.incidents.add(
            Incident(at, step, "update", role, None, "numeric", cause, action, back_to, lost, seconds)
        )
