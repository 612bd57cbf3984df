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
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rlhf_ray.environment import prepare

from . import environment
from .expected import TOLERANCE, Expected, differences

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One independent implementation and how to ask it and us the same."""

    name: str
    """Also of the expected file; the oracle is ``oracle_NAME.py``."""
    make_inputs: Callable[[], dict[str, Any]]
    prepare: Callable[[Inputs, Path], None]
    """Write what the oracle reads."""
    ours: Callable[[Inputs], dict[str, np.ndarray]]

    def ask_oracle(self, inputs: dict[str, Any]) -> Expected:
        """Run the independent implementation on ``inputs``."""
        with TemporaryDirectory() as name:
            directory = Path(name)
            self.prepare(inputs, directory)
            environment.run(Path(__file__).parent / f"oracle_{self.name}.py", directory)
            with np.load(directory / "values.npz") as values:
                return Expected(inputs, dict(values), json.loads((directory / "versions.json").read_text()))


def comparisons() -> list[Comparison]:
    """All of them."""
    from . import trl_log_probs, trl_reward

    modules = {"trl_reward": trl_reward, "trl_log_probs": trl_log_probs}
    return [Comparison(name, each.make_inputs, each.prepare, each.ours) for name, each in modules.items()]


def compare(comparison: Comparison, *, write: bool) -> bool:
    """Print the table of one comparison; whether everything agrees."""
    inputs = comparison.make_inputs() if write else Expected.read(comparison.name).inputs
    theirs = comparison.ask_oracle(inputs)
    if write:
        print(f"wrote {theirs.write(comparison.name).relative_to(environment.ROOT)}")
    ours = grouped(differences(comparison.ours(inputs), theirs.values))
    committed = grouped(differences(Expected.read(comparison.name).values, theirs.values))
    print(f"\n{comparison.name}: {', '.join(f'{package} {version}' for package, version in theirs.versions.items())}")
    print(f"  {'largest absolute difference':44}{'ours':>10}{'committed':>12}   bar {TOLERANCE:g}")
    for name in ours | committed:
        pair = ours.get(name, float("inf")), committed.get(name, float("inf"))
        print(f"  {name:44}{pair[0]:10.1e}{pair[1]:12.1e}   {'ok' if max(pair) <= TOLERANCE else 'DIFFERS'}")
    return max([*ours.values(), *committed.values()]) <= TOLERANCE


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
