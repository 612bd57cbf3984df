"""Part ``generate``: tokens a second of ``rlhf-ray generate`` against vLLM's own offline ``LLM.generate``.

Invariants: both sides have one vLLM engine of one thread, the same weights and the same requests, each answer a request of its
own with the log-prob of every token. They take turns; what they load and compile is not counted. vLLM counts with the faster
of its two ways, eager and compiled. On our side the time goes from the first request to the last answer on disk, and the
driver, Ray and the disk work beside the engine on the machine's other core.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from benchmarks.figures import Figure, Figures
from benchmarks.peers.line_process import LineProcess
from benchmarks.peers.ppo_material import Material, make_material
from benchmarks.sequences import REAL_PAIRS
from rlhf_ray.environment import for_process
from rlhf_ray.launch.sampling import generate as product
from rlhf_ray.launch.sampling.answers import read_answers
from rlhf_ray.launch.sampling.collecting import answer_all
from rlhf_ray.launch.sampling.request import generate_config

PROMPTS, SAMPLES, NEW_TOKENS, CONTEXT, TURNS = 64, 8, 64, 160, 3
KV_CACHE_GIB = 0.5
WAYS = ("eager", "compiled")


def measure(quick: bool = False) -> Figures:
    """The ratio; ``quick`` runs our side alone, with few prompts."""
    if not REAL_PAIRS.is_file():
        raise FileNotFoundError(f"{REAL_PAIRS} is not there: generation is measured on real prompts")
    with TemporaryDirectory() as name, ExitStack() as opened:
        material = make_material(Path(name), REAL_PAIRS)
        rows = material.prompts.read_text("utf-8").splitlines(keepends=True)[: 4 if quick else PROMPTS]
        material.prompts.write_text("".join(rows), encoding="utf-8")
        peers = {} if quick else {way: opened.enter_context(peer(way)) for way in WAYS}
        ours, theirs = list[float](), {way: list[float]() for way in peers}
        for turn in range(1 if quick else TURNS + 1):
            ours.append(tokens_per_second(material, Path(name) / f"{turn}.jsonl"))
            for way, process in peers.items():
                process.send(**order(material, len(rows)))
                answer = process.receive()
                theirs[way].append(answer["tokens"] / answer["seconds"])
    if quick:
        return {"generate.tokens_per_second": Figure(ours[0], "tokens/s", True, "a quick run")}
    rates = {way: median(each[1:]) for way, each in theirs.items()}  # the first turn compiles and warms up
    mine, best = median(ours[1:]), max(rates.values())
    return {
        "generate.vs_vllm_offline": Figure(
            mine / best, "ratio", True,
            f"tokens a second of rlhf-ray generate on Ray over those of vLLM's LLM.generate; llama-14m in bf16, {len(rows)} "
            f"real prompts of 81 tokens x {SAMPLES} answers of up to {NEW_TOKENS} tokens with log-probs, one engine of one "
            f"thread; {mine:.0f} from the first request to the last answer on disk, "
            f"{', '.join(f'{rate:.0f} {way}' for way, rate in rates.items())}; median of {TURNS} turns",
        )
    }  # fmt: skip


def peer(way: str) -> LineProcess:
    """vLLM by itself, with its own defaults but for threads."""
    variables = {**os.environ, **for_process(device="cpu")}
    variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    return LineProcess([sys.executable, "-m", "benchmarks.peers.vllm_offline", way], variables)


def order(material: Material, prompts: int) -> dict[str, Any]:
    """The same requests for vLLM."""
    return {
        "engine": {
            "model": str(material.policy),
            "dtype": "bfloat16",
            "max_model_len": CONTEXT,
            "generation_config": "vllm",
            "kv_cache_memory_bytes": int(KV_CACHE_GIB * 2**30),
            "disable_log_stats": True,
        },
        "prompts": [ids for ids in material.ids[:prompts] for _ in range(SAMPLES)],
        "sampling": {
            "max_tokens": NEW_TOKENS,
            "temperature": 1.0,
            "logprobs": 0,
            "detokenize": False,
            "ignore_eos": True,
            "stop_token_ids": [json.loads((material.policy / "config.json").read_text())["eos_token_id"]],
        },
    }


def tokens_per_second(material: Material, output: Path) -> float:
    """Of one command, without what it takes to start and to end."""
    keys = {
        "rollout.dtype": "bf16",
        "rollout.max_new_tokens": NEW_TOKENS,
        "rollout.max_model_tokens": CONTEXT,
        "rollout.kv_cache_gib": KV_CACHE_GIB,
        "data.max_prompt_tokens": CONTEXT - NEW_TOKENS,
        "samples": SAMPLES,
    }
    config = generate_config(material.policy, material.prompts, overrides=[f"run.name=turn-{output.stem}"], **keys)
    seconds = list[float]()

    def timed(*arguments: Any, **more: Any) -> Iterator[Any]:
        began = time.monotonic()
        yield from answer_all(*arguments, **more)
        seconds.append(time.monotonic() - began)

    with patch.object(product, "answer_all", timed):
        product.sample_answers(config, output)
    _, answered = read_answers(output)
    return sum(answer.tokens for prompt in answered for answer in prompt.answers) / seconds[0]
