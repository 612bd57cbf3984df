"""Part ``gym``: what GRPO learns on a task of reasoning-gym, in one turn. Part ``gym_turns`` is the same over two turns.

Invariants: the recipes are the shipped ones (``gym-sft``, ``gym-grpo``, ``gym-turns-grpo``); no question of the evaluation
is in the rows that anything was trained on; an answer counts as right only with full marks. The bars of :class:`Bars` are
checked: where one is missed the part fails, says which, and keeps no figure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.figures import Figure, Figures, table
from rlhf_ray.environments.protocol import Answer, Task
from rlhf_ray.environments.reasoning_gym import Twice, verify, write_files

FAMILY, SETTINGS = "spell_backward", {"max_word_len": 4}
SIZES = {"train": 1000, "test": 200}
CARELESS = 2
"""Careless demonstrations of each question, beside a right one."""
END = "<eos>"
"""The text of the token that ends an answer of the made policy."""
QUICK = ["policy.model.make.shape=llama-tiny", "data.max_rows=64", "epochs=1"]
QUICK_GRPO = ["steps=1", "evaluation.prompts=4", "batch.prompts_per_step=4"]


@dataclass(frozen=True)
class Bars:
    """What a run must reach; each bar is strict."""

    start: float = 0.4
    """Share of right answers before GRPO, at most."""
    right: float = 0.8
    """After GRPO, at least."""
    seconds: float = 600.0
    """Of the whole run of GRPO, at most."""
    constant: float = 0.2
    """Score of the best constant answer, at most."""

    def missed(self, figures: dict[str, float]) -> list[str]:
        """A sentence for each bar that ``figures`` miss."""
        at_most = [
            f"{name} is {figures[name]:.3g}, not below {bar:g}"
            for name, bar in (("start", self.start), ("seconds", self.seconds), ("constant", self.constant))
            if not figures[name] < bar
        ]
        return at_most + (
            [] if figures["right"] > self.right else [f"right is {figures['right']:.3g}, not above {self.right:g}"]
        )


def measure(quick: bool = False) -> Figures:
    """Train a policy that answers once, and compare how often it is right before and after GRPO."""
    with tempfile.TemporaryDirectory() as directory:
        return learn("gym.one_turn", "gym-grpo", Path(directory), quick=quick)


def learn(name: str, recipe: str, root: Path, *, quick: bool) -> Figures:
    """Figures of one recipe: rows, supervised fine-tuning, GRPO.

    Raises :class:`RuntimeError` where a bar is missed.
    """
    two = recipe == "gym-turns-grpo"
    demonstrated = 3000 if two else 4400
    sizes = {"demonstrations": demonstrated, **SIZES}
    write_files(FAMILY, root / "gym", sizes, END if two else None, careless=CARELESS, **SETTINGS)
    sft = ["run.name=gym-turns-sft", "epochs=2"] if two else []
    began = time.monotonic()
    _train(root, "sft", "gym-sft", *sft, *(QUICK if quick else []))
    start = time.monotonic()
    _train(root, "ppo", recipe, "rollout.backend=transformers", *(QUICK_GRPO if quick else []))
    seconds = time.monotonic() - start
    rows = [json.loads(line) for line in (root / "runs" / recipe / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "evaluation/pass_at_1" in row][-1]
    values = {
        "start": last["evaluation/pass_at_1_start"],
        "right": last["evaluation/pass_at_1"],
        "seconds": seconds,
        "constant": best_constant(root / "gym" / "test.jsonl", twice=two),
    }
    method = (
        f"{last['step']:.0f} steps of GRPO in one process, after supervised fine-tuning of {start - began:.0f} s on "
        f"{demonstrated} other questions, each with one right demonstration{' of each turn' if two else ''} and {CARELESS} "
        "careless ones"
    )
    figures = _figures(name, values, method, "episodes" if two else "answers")
    missed = [] if quick else Bars().missed(values)
    if missed:
        print(table(figures), flush=True)
        raise RuntimeError(f"{name} misses its bars: {'; '.join(missed)}")
    return figures


def best_constant(path: Path, *, twice: bool) -> float:
    """The best mean score over the rows of a file that one answer to all of them gets, tried with the answer to each.

    With ``twice`` it is the answer to both turns of :class:`Twice`.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    score = _score_twice if twice else verify
    return max(mean(score(row["label"], answer) for row in rows) for answer in {row["answer"] for row in rows})


def _score_twice(label: Any, answer: str) -> float:
    environment = Twice()
    environment.reset(Task("", label))
    return sum(environment.step(Answer(answer, finished=True)).reward for _ in range(2))


def _figures(name: str, values: dict[str, float], trained: str, tries: str) -> Figures:
    task = f"{SIZES['test']} unseen questions of {FAMILY} (words of 3 and 4 letters)"
    method = f"share of {task}, two {tries} each sampled at temperature 1, that get full marks; {trained}"
    return {
        f"{name}.start": Figure(values["start"], "share", True, f"{method}; before GRPO"),
        f"{name}.right": Figure(values["right"], "share", True, f"{method}; after GRPO"),
        f"{name}.seconds": Figure(
            values["seconds"], "s", False, f"the whole run of GRPO with its evaluations on {task}; {trained}"
        ),
        f"{name}.constant": Figure(
            values["constant"], "score", False, f"mean score of the best constant answer to {task}"
        ),
    }


def _train(root: Path, kind: str, recipe: str, *overrides: str) -> None:
    command = [sys.executable, "-m", "rlhf_ray", "train", kind, recipe, *overrides, "--in-process"]
    done = subprocess.run(command, cwd=root, timeout=900)
    if done.returncode != 0:
        raise RuntimeError(f"{recipe} ended with {done.returncode}")
