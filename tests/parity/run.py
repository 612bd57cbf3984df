"""Compare this project with independent implementations, on the same inputs, in this run.

    python -m tests.parity.run [--write] [NAME ...]

Inputs are those of the committed files, and the committed values are checked too. ``--write`` makes the inputs anew and
replaces the files. The independent implementation always runs, in an environment of its own, and knows nothing of this
project but the files that it is given.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rlhf_ray.environment import prepare

from . import environment
from .expected import TOLERANCE, Expected, differences

Inputs = Mapping[str, Any]
REAL_PAIRS = environment.ROOT.parent / "shared/data/hh_harmless_pairs.jsonl.gz"
"""Real preferences beside a checkout of the project, where there are some."""


@dataclass(frozen=True)
class Comparison:
    """One independent implementation and how to ask it and us the same."""

    name: str
    """Also of the expected file."""
    make_inputs: Callable[[], dict[str, Any]]
    prepare: Callable[[Inputs, Path], None]
    """Write what the oracle reads."""
    ours: Callable[[Inputs], dict[str, np.ndarray]]
    oracle: str = ""
    """The script ``oracle_ORACLE.py``; empty for the one of its own name."""
    judged: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict
    """What is compared of what the oracle says."""
    bar: float = TOLERANCE
    committed: bool = True
    """Whether inputs and values lie in ``expected/``; those from data that are not ours to give away do not."""

    def ask_oracle(self, inputs: dict[str, Any]) -> Expected:
        """Run the independent implementation on ``inputs``."""
        with TemporaryDirectory() as name:
            directory = Path(name)
            self.prepare(inputs, directory)
            environment.run(Path(__file__).parent / f"oracle_{self.oracle or self.name}.py", directory)
            with np.load(directory / "values.npz") as values:
                return Expected(
                    inputs, self.judged(dict(values)), json.loads((directory / "versions.json").read_text())
                )


def comparisons() -> list[Comparison]:
    """All of them."""
    from . import (
        algorithms,
        chat_renderers,
        openrlhf_models,
        reward_losses,
        trl_log_probs,
        trl_preferences,
        trl_reward,
        trl_sft,
        trl_training,
    )

    modules = {
        "trl_reward": trl_reward,
        "trl_sft": trl_sft,
        "trl_preferences": trl_preferences,
        "trl_log_probs": trl_log_probs,
        "openrlhf_models": openrlhf_models,
    }
    found = [Comparison(name, each.make_inputs, each.prepare, each.ours) for name, each in modules.items()]
    found.append(
        Comparison("reward_losses", reward_losses.make_inputs, reward_losses.prepare, reward_losses.ours, bar=1e-6)
    )
    for name, ours in algorithms.COMPARISONS.items():
        found.append(Comparison(name, algorithms.make_inputs, algorithms.prepare, ours, bar=1e-6))
    found.append(
        Comparison(
            "chat_renderers",
            chat_renderers.make_inputs,
            chat_renderers.prepare,
            chat_renderers.ours,
            bar=0.0,
            committed=False,
        )
    )
    training = Comparison(
        "trl_training",
        trl_training.make_inputs,
        trl_reward.prepare,
        trl_training.ours,
        oracle="trl_reward",
        judged=trl_training.judged,
        bar=1e-4,
    )
    found.append(training)
    if REAL_PAIRS.is_file():
        make = partial(trl_training.real_pairs, REAL_PAIRS)
        found.append(replace(training, name="trl_training_real_pairs", make_inputs=make, bar=1e-3, committed=False))
    return found


def compare(comparison: Comparison, *, write: bool) -> bool:
    """Print the table of one comparison; whether everything agrees."""
    fresh = write or not comparison.committed
    inputs = comparison.make_inputs() if fresh else Expected.read(comparison.name).inputs
    theirs = comparison.ask_oracle(inputs)
    if write and comparison.committed:
        print(f"wrote {theirs.write(comparison.name).relative_to(environment.ROOT)}")
    ours = grouped(differences(comparison.ours(inputs), theirs.values))
    committed = Expected.read(comparison.name).values if comparison.committed else theirs.values
    kept = grouped(differences(committed, theirs.values))
    print(f"\n{comparison.name}: {', '.join(f'{package} {version}' for package, version in theirs.versions.items())}")
    print(f"  {'largest absolute difference':44}{'ours':>10}{'committed':>12}   bar {comparison.bar:g}")
    for name in ours | kept:
        pair = ours.get(name, float("inf")), kept.get(name, float("inf"))
        held = f"{pair[1]:12.1e}" if comparison.committed else f"{'not kept':>12}"
        print(f"  {name:44}{pair[0]:10.1e}{held}   {'ok' if max(pair) <= comparison.bar else 'DIFFERS'}")
    return max([*ours.values(), *kept.values()]) <= comparison.bar


def grouped(found: Mapping[str, float]) -> dict[str, float]:
    """The worst of each group: all weights of one case are one line."""
    lines: dict[str, float] = {}
    for name, difference in found.items():
        line = ": ".join(name.split("/")[:2])
        lines[line] = max(lines.get(line, 0.0), difference)
    return lines


def main(arguments: list[str]) -> int:
    """Run the comparisons that were named, or all."""
    prepare()
    known = {comparison.name: comparison for comparison in comparisons()}
    parser = argparse.ArgumentParser(prog="python -m tests.parity.run", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--write", action="store_true", help="make the inputs anew and replace the expected files")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(known)
    if unknown:
        parser.error(f"no comparison is called {', '.join(sorted(unknown))}: choose of {', '.join(known)}")
    environment.python()
    agree = [compare(known[name], write=options.write) for name in options.names or known]
    print("\nparity: everything agrees" if all(agree) else "\nparity: DIFFERENCES above the bar")
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
