"""``python -m tests.faults.useful_time [--steps N] [--kills N] [--seed S]``: the useful time of a run under fire.

A rank of a role that is drawn is killed in each of N steps that are drawn too, of a PPO run on a real Ray with a commit after
every step. Prints the share of the run's time that became committed steps, and where the rest went. With steps of about 15 s
(a larger ``batch.prompts_per_step``) and a kill in a tenth of them it should be 0.8 or more.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.launch.driver import train_new_run
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.reporting import time_of
from tests.faults.groups import CONFIG, SETTINGS, Killer

WORK = {
    "policy": ("log_probs", "accumulate", "apply"),
    "critic": ("values", "accumulate", "apply"),
    "reference": ("log_probs",),
    "reward": ("score",),
}
"""What a rank is doing when it is killed, by its role."""


class RandomKiller(Killer):
    """Kills one rank in each of some steps: ``due`` says of a step which role meets it in which call."""

    def __init__(self, due: dict[int, tuple[str, str]]) -> None:
        super().__init__({})
        self.due = dict(due)

    def is_due(self, role: str, method: str) -> bool:
        if self.recovery is None:
            return False
        step = self.recovery.checkpoints.run.ledger.last_step + 1
        if self.due.get(step) != (role, method):
            return False
        del self.due[step]
        return True


def draw(steps: int, kills: int, seed: int) -> dict[int, tuple[str, str]]:
    """Steps, counted from 1, with the role and the call that meet a death in them; the first step and the last have none."""
    rng: Any = random.Random(seed)
    chosen = sorted(rng.sample(range(2, steps), kills))
    roles = [rng.choice(sorted(WORK)) for _ in chosen]
    return {step: (role, rng.choice(WORK[role])) for step, role in zip(chosen, roles, strict=True)}


def main() -> None:
    """Run it and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    due = draw(options.steps, options.kills, options.seed)
    with tempfile.TemporaryDirectory() as root:
        settings = [*SETTINGS, f"steps={options.steps}", f"run.root={root}", "run.name=useful", *options.overrides]
        config = load_config(CONFIG, settings, kind="ppo")
        with RandomKiller(due) as killer:
            train_new_run(dump_config(config))
        run = RunDirectory.open(Path(root) / "useful")
        assert not killer.due and len(run.incidents.read()) >= options.kills, (killer.due, run.incidents.read())
        for incident in run.incidents.read():
            print(f"step {incident.step + 1}: {incident.role} in {incident.phase}, back after {incident.seconds:.1f} s")
        found = time_of(run)
    print(f"useful {found.share:.3f} of {found.whole_s:.0f} s; lost: " + ", ".join(
        f"{reason} {seconds:.1f} s" for reason, seconds in found.lost_s.items()
    ))  # fmt: skip


if __name__ == "__main__":
    main()
