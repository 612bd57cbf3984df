"""``python -m tests.gpu.run [--only CHECK] [--results FILE]``: check and measure what needs a GPU.

Always true: each check says what it needs, is run where all of it is there, and is listed with the reason where it is
not; a check that fails costs no other check its run, and the exit code tells. A machine without a GPU leaves out
everything and succeeds.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figures, record, table
from rlhf_ray import environment
from tests.gpu.needs import missing

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu.json"
MODELS = ("cuda", "transformers", "jaxtyping", "rich")
"""What running a model of this project needs."""


@dataclass(frozen=True)
class Check:
    """One thing to see; ``run`` raises where it is not so, and returns what it has to say, or figures."""

    name: str
    needs: tuple[str, ...]
    run: Callable[[], str | Figures]


def _attention(attention: str, dtype: str) -> Callable[[], str]:
    def run() -> str:
        import torch

        from tests.gpu.agreement import attention_agrees

        torch.backends.cuda.matmul.allow_tf32 = False
        return attention_agrees(attention, getattr(torch, dtype), "cuda")

    return run


def _log_probs(dtype: str) -> Callable[[], str]:
    def run() -> str:
        import torch

        from tests.gpu.agreement import log_probs_agree

        torch.backends.cuda.matmul.allow_tf32 = False
        return log_probs_agree(getattr(torch, dtype), "cuda")

    return run


def _four_bit() -> str:
    from tests.gpu.agreement import four_bit_agrees

    return four_bit_agrees("cuda")


def _liger() -> str:
    from tests.gpu.agreement import liger_agrees

    return liger_agrees("cuda")


def _throughput(model: str) -> Callable[[], Figures]:
    def run() -> Figures:
        from tests.gpu.throughput import measure

        return measure(model, "cuda")

    return run


def _whole_stack() -> str:
    from tests.gpu.stack import train_ppo_on_one_gpu

    return train_ppo_on_one_gpu()


CHECKS = (
    Check("packed_varlen_equals_padded", MODELS, _attention("varlen", "bfloat16")),
    Check("packed_segments_equal_padded_fp32", MODELS, _attention("sdpa", "float32")),
    Check("packed_segments_equal_padded_bf16", MODELS, _attention("sdpa", "bfloat16")),
    Check(
        "packed_flash_attention_2_equals_padded", (*MODELS, "flash_attn"), _attention("flash_attention_2", "bfloat16")
    ),
    Check("chunked_log_probs_equal_naive_fp32", MODELS, _log_probs("float32")),
    Check("chunked_log_probs_equal_naive_bf16", MODELS, _log_probs("bfloat16")),
    Check("nf4_equals_its_dequantised_weights", (*MODELS, "bitsandbytes", "peft"), _four_bit),
    Check("liger_equals_plain", (*MODELS, "liger_kernel"), _liger),
    Check("throughput_llama_120m", MODELS, _throughput("llama-120m")),
    Check("throughput_qwen3_0.6b", MODELS, _throughput("qwen3-0.6b")),
    Check("ppo_on_one_gpu", (*MODELS, "pydantic", "ray", "deepspeed", "vllm"), _whole_stack),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what can be run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="tests.gpu.run", description="check and measure what needs a GPU")
    names = [check.name for check in CHECKS]
    parser.add_argument("--only", choices=names, metavar="CHECK", help=f"one of {', '.join(names)}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file for the figures")
    options = parser.parse_args(arguments)
    environment.prepare({"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"})
    endings = [_run(check, options.results) for check in CHECKS if options.only in (None, check.name)]
    counts = {ending: endings.count(ending) for ending in ("passed", "failed", "left out")}
    print(", ".join(f"{count} {ending}" for ending, count in counts.items()))
    return 1 if counts["failed"] else 0


def _run(check: Check, results: Path) -> str:
    """Run a check if all that it needs is there; prints and returns how that ended."""
    lacking = missing(check.needs)
    if lacking:
        print(f"left out  {check.name}: {', '.join(lacking)}", flush=True)
        return "left out"
    try:
        summary = check.run()
    except Exception:
        print(f"failed    {check.name}\n{traceback.format_exc()}", flush=True)
        return "failed"
    if not isinstance(summary, str):
        record(summary, results)
        summary = "\n" + table(summary)
    print(f"passed    {check.name}: {summary}", flush=True)
    return "passed"


if __name__ == "__main__":
    sys.exit(main())
