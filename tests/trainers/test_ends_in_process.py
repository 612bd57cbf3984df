"""A policy that ends its answers with a token which only its own files name: trained, masked, scored and checked as ended."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.cli.main import main
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.ppo.build import train_ppo
from tests.models.conftest import word_tokenizer

VOCABULARY, LIMIT, CHANCE = 48, 24, 0.4
CONFIG = """
kind: ppo
run: {{name: ends, root: {root}}}
steps: 1
policy: {{model: {{path: {model}, dtype: fp32}}, engine: {{optimizer: {{learning_rate: 1e-3}}}}}}
critic: null
reward: {{function: exact_match}}
rollout: {{backend: transformers, max_new_tokens: {limit}, max_model_tokens: 64, dtype: fp32}}
data: {{path: {rows}, max_prompt_tokens: 4}}
batch: {{prompts_per_step: 8, samples_per_prompt: 4, sequences_per_update: 32}}
algorithm: {{name: grpo}}
monitoring: {{ray_metrics: false, samples_per_log: 32}}
"""


def save_policy(directory: Path) -> int:
    """A policy that ends with ``<end>``, which is not the tokenizer's end of sequence, with probability ``CHANCE`` a token."""
    tokenizer = word_tokenizer(VOCABULARY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    end = int(tokenizer.convert_tokens_to_ids("<end>"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=[end, tokenizer.eos_token_id],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(32)[0])  # the hidden state is the same after every token
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id, 0] = -9.0
        model.lm_head.weight[end, 0] = math.log(CHANCE / (1 - CHANCE) * (len(tokenizer) - 1)) / math.sqrt(32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    return end


@pytest.fixture
def job(tmp_path: Path) -> Any:
    torch.set_num_threads(1)
    end = save_policy(tmp_path / "model")
    rows = [{"prompt": f"w{number} " + "w3 " * (8 * (number > 15)), "label": "w5"} for number in range(5, 45)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CONFIG.format(root=tmp_path / "runs", model=tmp_path / "model", rows=tmp_path / "rows.jsonl", limit=LIMIT)
    (tmp_path / "job.yaml").write_text(text)
    return tmp_path, end


def train(config: Any) -> RunDirectory:
    run = RunDirectory.create(Path(config.run.root) / config.run.name, dump_config(config))
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    return run


def test_answers_end_where_config_json_says_in_rollout_masks_and_samples(job: Any, project_log: StringIO) -> None:
    directory, end = job
    run = train(load_config(directory / "job.yaml", kind="ppo", files=True))
    step = run.metrics.read()[0]
    assert step["truncated/share"] == 0.0 and step["length/response"] < 4 / CHANCE, "and not the limit"
    samples = [json.loads(line) for line in (run.samples / "step-000001.jsonl").read_text().splitlines()]
    assert len(samples) == 32 and all(sample["finished"] for sample in samples)
    for tokens in (sample["tokens"] for sample in samples):
        assert {"log_probs", "rollout_log_probs", "token_rewards", "advantages"} < tokens.keys()
        assert {len(column) for column in tokens.values()} == {len(tokens["text"])}
        assert not any(None in column for column in tokens.values())
        assert tokens["text"][-1] in ("</s>", "<end>") and tokens["log_probs"] == pytest.approx(
            tokens["rollout_log_probs"], abs=1e-3
        )
    assert f"an answer ends with '</s>' (2, the tokenizer and config.json) or '<end>' ({end}, config.json)" in (
        project_log.getvalue()
    )
    assert "were cut at" not in project_log.getvalue()


def test_a_run_whose_answers_are_all_cut_says_why_and_how_few_rows_are_left(job: Any, project_log: StringIO) -> None:
    directory, _ = job
    content = json.loads((directory / "model" / "config.json").read_text())
    (directory / "model" / "config.json").write_text(json.dumps(content | {"eos_token_id": 2}))
    train(load_config(directory / "job.yaml", kind="ppo", files=True))
    log = project_log.getvalue()
    (line,) = [line for line in log.splitlines() if "were cut at" in line]
    assert f"32 of 32 answers were cut at rollout.max_new_tokens {LIMIT}: no end ('</s>' (2)) came in " in line
    assert line.endswith("of them: if that ends an answer, name it in rollout.stop_tokens") and "'<end>' in " in line
    assert "of 40 training rows dropped: 29 too long: only 11 are left; raise data.max_prompt_tokens, or give" in log


def test_check_says_what_ends_an_answer_and_how_few_rows_are_left(job: Any, project_log: StringIO) -> None:
    directory, end = job
    assert main(["check", str(directory / "job.yaml")]) == 0
    log = project_log.getvalue()
    assert f"or '<end>' ({end}, config.json)" in log
    assert "of 40 training rows dropped: 29 too long: only 11 are left; raise data.max_prompt_tokens, or give" in log
    assert main(["check", str(directory / "job.yaml"), "data.max_prompt_tokens=1", "rollout.stop_tokens=[w7]"]) == 0
    log = project_log.getvalue()
    assert "'w7' (7, rollout.stop_tokens)" in log
