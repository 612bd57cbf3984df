"""What the loop asks of a mode, whichever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from rlhf_ray.trainers.ppo.sampling import Collected, Phase


class Mode(Protocol):
    """Decides when the samples of a step are generated. All methods are called by the loop, from one thread."""

    trains_on_newest: bool
    """Whether the samples of a step are those of the newest weights, so that log-probs of the engines and of the trainer can be
    compared at each step."""

    def collect(self, step: int, version: int, phase: Phase) -> Collected:
        """The samples of ``step``, counted from 0; ``version`` is that of the weights that are published and trained.

        Raises what generating them ended in, and :class:`StaleWeightsError` where a token is older than the bound.
        """

    def pause(self) -> None:
        """Return once the engines may take weights.

        An error of what they did is raised by the next :meth:`collect`.
        """

    def settle(self) -> None:
        """Return once the engines have nothing in work for this mode, and may answer somebody else."""

    def before_checkpoint(self) -> None:
        """Return once all is finished that a checkpoint should hold."""

    def position(self, step: int) -> dict[str, Any]:
        """The position of the prompts before ``step`` takes any, as plain JSON; all steps before it have finished."""

    def save(self, directory: Path, step: int) -> None:
        """Write the finished samples of the steps from ``step`` on into a checkpoint, if there are any."""

    def restore(self, directory: Path) -> None:
        """Take back what :meth:`save` wrote; the prompts are at the position that went with it."""

    def go_back(self, position: dict[str, Any], directory: Path | None) -> None:
        """Forget every sample, end what is under way, and take prompts from ``position`` on.

        ``directory`` is that of the checkpoint which this run made at that position, whose samples are taken back; there need
        be none.
        """

    def close(self) -> None:
        """End what is still under way; nothing is collected after this."""
