"""A real ``rlhf-ray generate``, killed again and again at drawn moments: in the end every prompt has exactly its answers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rlhf_ray.launch.sampling.answers import read_answers
from tests.launch.sampling.conftest import SMALL

ROOT = Path(__file__).parents[3]
PROMPTS, SAMPLES = 240, 3
LIMIT_S = 120.0


def start(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "rlhf_ray", *words],
            cwd=log.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def kill_after(process: subprocess.Popen[bytes], kept: Path, lines: int) -> int:
    """Kill it with everything that it started once ``kept`` has so many lines; returns how many it has then."""
    end = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < end:
        if kept.exists() and kept.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(LIMIT_S)
    return kept.read_bytes().count(b"\n")


def killed_and_finished(words: Sequence[str], kept: Path, log: Path, seed: int, kills: int) -> list[int]:
    """Run the command, kill it ``kills`` times at drawn moments, and let it finish; the lines at each kill."""
    draw, counts = random.Random(seed), list[int]()
    for _ in range(kills):
        there = counts[-1] if counts else 1
        counts.append(kill_after(start(words, log), kept, there + draw.randint(1, PROMPTS // (kills + 1) - 10)))
    assert start(words, log).wait(LIMIT_S) == 0, log.read_text()
    return counts


def assert_exactly_once(kept: Path, output: Path, prompts: int, samples: int) -> None:
    _, answered = read_answers(kept)
    assert Counter(one.prompt_id for one in answered) == Counter(range(prompts))
    assert {len(one.answers) for one in answered} == {samples}
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) + sum(not one.response.strip() for each in answered for one in each.answers) == prompts * samples


@pytest.mark.early
@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.long)])
def test_killed_at_drawn_moments_every_prompt_has_exactly_its_answers(
    kills: int, policy: Path, prompts: Callable[[int], Path], tmp_path: Path
) -> None:
    output, kept = tmp_path / "rows.jsonl", tmp_path / "rows.answers.jsonl"
    words = [
        "generate",
        str(policy),
        "--prompts",
        str(prompts(PROMPTS)),
        "--output",
        str(output),
        "--samples",
        str(SAMPLES),
    ]
    small = [*SMALL, "--in-process", "rollout.max_num_seqs=6", "rollout.max_new_tokens=24"]
    counts = killed_and_finished([*words, *small], kept, tmp_path / "log", seed=7, kills=kills)
    assert counts == sorted(set(counts)), "each life added whole lines and lost none"
    assert counts[-1] < PROMPTS, "it was killed before it was done"
    assert_exactly_once(kept, output, PROMPTS, SAMPLES)
