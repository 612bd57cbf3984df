"""What DPO learns in the generated world: gold that its pairs never show rises over that of the policy it starts from.

The recipe is that of ``demo-dpo``, on the pairs of raters who err, after ``demo-sft``, with one rank in this process. Every
seed makes a world, a start and an order of its own.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.launch.driver import run_trainer
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.world.generate import World
from rlhf_ray.world.gold import gold_score

PROMPTS, MOST_TOKENS = 300, 32
GAIN = 0.1
"""The mean gold of the start is about 0.5. Two samples of 300 answers of one policy differ by 0.02 now and then."""


def trained(root: Path, recipe: str, kind: str, seed: int, *settings: str) -> RunDirectory:
    shared = ["monitoring.ray_metrics=false", "policy.ranks=1", "checkpoint.every_steps=0", f"run.seed={seed}"]
    place = [f"run.root={root}", f"data.world.seed={seed}"]
    config: Any = load_config(recipe, [*place, *shared, *settings], kind=kind, files=True)
    run = RunDirectory.create(root / config.run.name, dump_config(config))
    run_trainer(config, run, None, place=ThisProcess(config.cluster))
    run.release()
    return run


@torch.no_grad()
def gold_of(model: Path, seed: int) -> float:
    """The mean gold of samples to held-out prompts, taken with transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = [row.text for row in World(seed).prompts("evaluation", PROMPTS)]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    torch.manual_seed(seed)
    ids = policy.generate(
        **batch, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=MOST_TOKENS,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )[:, batch["input_ids"].shape[1] :]  # fmt: skip
    scores = []
    for prompt, answer in zip(prompts, ids.tolist(), strict=True):
        finished = tokenizer.eos_token_id in answer
        text = tokenizer.decode(answer, skip_special_tokens=True)
        scores.append(gold_score(prompt, text, finished))
    return fmean(scores)


def gold_before_and_after(root: Path, seed: int, *settings: str) -> tuple[float, float]:
    """The gold of ``demo-sft``, and of ``demo-dpo`` with ``settings`` after it."""
    start = root / "demo-sft/final"
    if not start.exists():
        trained(root, "demo-sft", "sft", seed)
    after = trained(root, "demo-dpo", "dpo", seed, f"policy.model.path={start}", *settings)
    return gold_of(start, seed), gold_of(after.final, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dpo_improves_gold_over_its_start(tmp_path: Path, seed: int) -> None:
    torch.set_num_threads(1)
    before, after = gold_before_and_after(tmp_path, seed)
    assert 0.3 < before < 0.65
    assert after > before + GAIN
