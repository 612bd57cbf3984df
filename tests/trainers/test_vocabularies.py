"""A critic or reference that reads the policy's ids has its tokenizer, whether it is made, in files or of a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.cli.main import main
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.data.tokenizers import make_word_tokenizer
from rlhf_ray.errors import RequestError
from rlhf_ray.models import make_model
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.ppo.build import train_ppo
from tests.models.conftest import word_tokenizer

TINY_PPO = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
ONE_PROCESS = ["policy.ranks=1", "policy.engine.zero=0", "rollout.backend=transformers", "rollout.engines=1",
               "monitoring.ray_metrics=false", "evaluation.prompts=4", "steps=1"]  # fmt: skip


def save(directory: Path, tokenizer: Any, rows: int) -> Path:
    make_model("llama-tiny", rows, seed=3, pad_token_id=0, eos_token_id=1).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def overrides(root: Path, role: str, model: Path) -> list[str]:
    """The policy is made, and this role is in files."""
    head = ", head_init: hf" if role == "critic" else ""
    return [f"run.root={root}", *ONE_PROCESS, f"{role}.model={{path: {model}, dtype: fp32{head}}}"]


@pytest.mark.parametrize("role", ["critic", "reference"])
def test_another_tokenizer_in_files_than_the_made_one_of_the_policy_is_refused(
    tmp_path: Path, role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    size = len(make_word_tokenizer())
    other = save(tmp_path / "other", word_tokenizer(size), size)
    words = overrides(tmp_path, role, other)
    config = load_config(TINY_PPO, words, kind="ppo", files=True)
    run = RunDirectory.create(tmp_path / "run", dump_config(config))
    told = rf"{role}\.model: its tokenizer \({other}\) is not the policy's \(made from world, .*\), whose token ids the {role}"
    with pytest.raises(RequestError, match=told):
        train_ppo(config, run, None, place=ThisProcess(config.cluster))
    assert main(["check", str(TINY_PPO), *words]) == 2
    captured = capsys.readouterr()
    assert f"{role}.model: its tokenizer ({other}) is not the policy's (made from world" in captured.err
    assert captured.out == ""


def test_the_same_tokenizer_in_files_with_another_padding_is_fine(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    same = save(tmp_path / "same", make_word_tokenizer(), len(make_word_tokenizer()) + 13)
    words = overrides(tmp_path, "critic", same)
    config = load_config(TINY_PPO, words, kind="ppo", files=True)
    run = RunDirectory.create(tmp_path / "run", dump_config(config))
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    assert (run.final / "config.json").is_file()
    assert main(["check", str(TINY_PPO), *words]) == 0


def test_a_tokenizer_that_no_library_can_read_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = save(tmp_path / "broken", make_word_tokenizer(), 600)
    (broken / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nothing"}, "added_tokens": []}')
    assert main(["check", str(TINY_PPO), f"policy.model={{path: {broken}, dtype: fp32}}"]) == 2
    assert "tokenizer that can be read" in capsys.readouterr().err
