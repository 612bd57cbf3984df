"""Part ``gym_turns``: what GRPO learns where a second turn reacts to the first answer and full marks need both.

Invariants: those of part ``gym``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.figures import Figures
from benchmarks.gym import learn


def measure(quick: bool = False) -> Figures:
    """Train a policy that answers twice, and compare how often both answers are right before and after GRPO."""
    with tempfile.TemporaryDirectory() as directory:
        return learn("gym.two_turns", "gym-turns-grpo", Path(directory), quick=quick)
