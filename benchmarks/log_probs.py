"""Part ``log_probs``: peak memory of log-probabilities computed in chunks, against all logits at once.

Invariants: each side runs forward and backward in a process of its own, whose anonymous memory counts from the end of its
imports. Both compute the same values and gradients of the same inputs, which is checked before anything is reported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figure, Figures
from benchmarks.peers.line_process import anonymous

VOCABULARY, HIDDEN = 1 << 17, 512
AGREES_TO = 5e-6
"""The largest difference of values and gradients that counts as equal, as a share of the largest value: some tens of units in
the last place of fp32, since the two sides add up in another order, and each processor in its own."""


@dataclass(frozen=True)
class SideResult:
    """The peak memory of one side in bytes, and the file of its values and gradients."""

    peak: int
    results: Path


def measure(quick: bool = False) -> Figures:
    """The peak of all logits at once as a multiple of the peak in chunks, at two lengths."""
    from tempfile import TemporaryDirectory

    vocabulary, lengths = (1 << 12, (256, 512)) if quick else (VOCABULARY, (2048, 4096))
    ratios = {}
    for tokens in lengths:
        with TemporaryDirectory() as directory:
            sides = {side: _run(side, tokens, vocabulary, Path(directory)) for side in ("naive", "chunked")}
            off = _difference(sides["naive"].results, sides["chunked"].results)
        if not off <= AGREES_TO:
            raise AssertionError(f"at {tokens} tokens chunked and naive differ by {off:.2g}: nothing to compare")
        peaks = ", ".join(f"{side} {result.peak / 1e6:.0f} MB" for side, result in sides.items())
        conditions = f"{tokens} tokens, vocabulary {vocabulary}: {peaks}, values and gradients within {off:.1g}"
        ratios[tokens] = (sides["naive"].peak / sides["chunked"].peak, conditions)
    shorter, longer = (ratios[tokens] for tokens in lengths)
    method = (
        f"peak anonymous memory above the imported process, forward and backward in fp32, {HIDDEN} wide, weights and their "
        f"gradients included; {longer[1]}; {shorter[1]}"
    )
    return {
        "models.log_probs_memory_vs_naive": Figure(longer[0], "x", True, method),
        "models.log_probs_memory_vs_naive_at_half_length": Figure(shorter[0], "x", True, method),
    }


def _run(side: str, tokens: int, vocabulary: int, directory: Path) -> SideResult:
    """One side in a process of its own, watched from here."""
    results = directory / f"{side}.pt"
    command = [sys.executable, "-m", "benchmarks.log_probs", side, str(tokens), str(vocabulary), str(results)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    if json.loads(process.stdout.readline() or "null") != "imported":
        raise RuntimeError(f"the {side} side of log_probs did not start (exit code {process.wait()})")
    before = peak = anonymous(process.pid)
    process.stdin.close()
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.002)
    if process.returncode != 0:
        raise RuntimeError(f"the {side} side of log_probs at {tokens} tokens ended with exit code {process.returncode}")
    return SideResult(peak - before, results)


def _difference(one: Path, other: Path) -> float:
    import torch

    pairs = zip(torch.load(one, weights_only=True), torch.load(other, weights_only=True), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def _side(side: str, tokens: int, vocabulary: int, results: Path) -> None:
    """Log-probs of random targets and their gradients."""
    import torch

    from rlhf_ray.models.forward.log_probs import LogProbHead

    print(json.dumps("imported"), flush=True)
    sys.stdin.read()
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(HIDDEN, vocabulary, bias=False)
    with torch.no_grad():
        layer.weight.normal_(0.0, 0.1, generator=generator)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    if side == "chunked":
        log_probs, _ = LogProbHead.around(layer, None)(hidden, targets)
    else:
        log_probs = layer(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    log_probs.mean().backward()
    torch.save([log_probs.detach(), hidden.grad, layer.weight.grad], results)


if __name__ == "__main__":
    _side(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
