"""Whether a run that was killed and resumed ended as the run that never was.

Always true: each difference is named; no list of differences means the same files, weights bit for bit, and the same
prompts in the same steps, each once.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlhf_ray.runs.directory import RunDirectory


def weight_differences(run: Path, whole: Path) -> list[str]:
    """Weights below ``final/`` that are not bit for bit those of ``whole``."""
    files = _weight_files(whole)
    if not files:
        raise AssertionError(f"{whole} has no final weights to compare with")
    if _weight_files(run) != files:
        return [f"final/ holds {sorted(map(str, _weight_files(run)))}, not {sorted(map(str, files))}"]
    return [f"{file}: {name}" for file in sorted(files) for name in _different(run / file, whole / file)]


def ledger_differences(run: Path, whole: Path) -> list[str]:
    """Prompts that were used twice, or in another step than in ``whole``."""
    ours, theirs = _prompts(run), _prompts(whole)
    counts = Counter(prompt for _, prompts in ours for prompt in prompts)
    twice = [f"prompt {prompt} was used {count} times" for prompt, count in counts.items() if count > 1]
    steps = [] if [step for step, _ in ours] == [step for step, _ in theirs] else [f"{len(ours)} steps in the ledger"]
    other = [f"step {a[0]} has other prompts" for a, b in zip(ours, theirs, strict=False) if a != b]
    return twice + steps + other


def _weight_files(run: Path) -> set[Path]:
    return {path.relative_to(run) for path in (run / "final").rglob("*.safetensors")}


def _different(ours: Path, theirs: Path) -> list[str]:
    a, b = load_file(ours), load_file(theirs)
    if a.keys() != b.keys():
        return ["other names"]
    return [name for name in b if a[name].dtype != b[name].dtype or not _same_bits(a[name], b[name])]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _prompts(run: Path) -> list[tuple[int, tuple[int, ...]]]:
    return [(entry.step, entry.prompt_ids) for entry in RunDirectory.open(run).ledger.entries()]
