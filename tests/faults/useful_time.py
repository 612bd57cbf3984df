"""``python -m tests.faults.useful_time [--steps N] [--kills N] [--seed S] [--latency S] [--keep]``: useful time under fire.

A rank of a role that is drawn is killed in each of some steps that are drawn too, of a PPO run on a real Ray with a commit
after every step. Prints the share of the run's time that became committed steps, and where the rest went. With steps of about
15 s and a kill in a tenth of them it should be 0.8 or more.

Most of a step's 15 s is the latency of a reward function, as of a service that judges one answer after another: the run's own
work stays small, so that it fits beside others on two cores. A step that is done again waits for that function again.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.figures import REFERENCE, Figure, record
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.launch.driver import train_new_run
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.reporting import time_of
from tests.faults.groups import CONFIG, SETTINGS, Killer

WORK = {
    "policy": ("log_probs", "accumulate", "apply"),
    "critic": ("values", "accumulate", "apply"),
    "reference": ("log_probs",),
    "reward-taste": ("score",),
}
"""What a rank is doing when it is killed, by its role."""
SAMPLES = 8
"""Samples of a step."""
JUDGE = """
import time

def judge(responses):
    time.sleep({seconds} * len(responses))
    return [0.0] * len(responses)
"""
"""A reward function that takes its time for every answer and likes all of them alike."""


def settings_of(root: Path, steps: int, latency_s: float) -> list[str]:
    """A run below ``root`` of small steps in which the reward function takes ``latency_s`` seconds."""
    file = root / "judge.py"
    file.write_text(JUDGE.format(seconds=latency_s / SAMPLES))
    model = "{make: {shape: llama-tiny, tokenizer_from: world, seed: 3}, head_init: inv_sqrt, dtype: fp32}"
    taste = f"taste: {{weight: 1.0, model: {model}, resources: {{cpus_per_rank: 0.2}}}}"
    return [
        *SETTINGS, f"batch.prompts_per_step={SAMPLES}", f"batch.sequences_per_update={SAMPLES}", f"steps={steps}",
        f"data.world.prompts={SAMPLES * steps}", f"run.root={root}", "run.name=useful",
        f"reward={{mixture: {{{taste}, judge: {{weight: 1.0, function: '{file}:judge'}}}}}}",
    ]  # fmt: skip


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
    parser.add_argument("--latency", type=float, default=12.0, help="seconds that the reward function takes in a step")
    parser.add_argument("--root", type=Path, help="where the run is to stay")
    parser.add_argument("--keep", action="store_true", help="keep the share as a figure")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    due = draw(options.steps, options.kills, options.seed)
    with ExitStack() as stack:
        root = options.root or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = [*settings_of(root, options.steps, options.latency), *options.overrides]
        config = load_config(CONFIG, settings, kind="ppo")
        with RandomKiller(due) as killer:
            train_new_run(dump_config(config))
        run = RunDirectory.open(root / "useful")
        assert not killer.due and len(run.incidents.read()) >= options.kills, (killer.due, run.incidents.read())
        for incident in run.incidents.read():
            print(f"step {incident.step + 1}: {incident.role} in {incident.phase}, back after {incident.seconds:.1f} s")
        found = time_of(run)
    print(f"useful {found.share:.3f} of {found.whole_s:.0f} s; lost: " + ", ".join(
        f"{reason} {seconds:.1f} s" for reason, seconds in found.lost_s.items()
    ))  # fmt: skip
    if options.keep:
        method = (
            f"of {found.whole_s:.0f} s of a PPO run of {options.steps} steps with a commit each, {options.latency:g} s of each "
            f"in a reward function, and {options.kills} kills of ranks that are drawn; 2 cores"
        )
        record({"faults.useful_share": Figure(found.share, "share", True, method)}, REFERENCE)


if __name__ == "__main__":
    main()
