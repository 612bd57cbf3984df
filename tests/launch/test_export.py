"""An export is plain Hugging Face, whole or not there, and never written over something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.cli.main import main
from rlhf_ray.models import Actor, get_llm_for_sequence_regression, make_model, save_adapter, save_pretrained
from rlhf_ray.models.regression import SequenceRegression
from tests.models.conftest import shake_adapters, word_tokenizer

IDS = torch.tensor([[5, 9, 7, 30, 2]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_model("llama-tiny", 48, seed=3, pad_token_id=0, eos_token_id=2).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def reward(base: Path, **options: object) -> SequenceRegression:
    model = get_llm_for_sequence_regression(
        str(base), "reward", param_dtype="fp32", init_value_head=True, head_init="hf", **options
    )
    shake_adapters(model)
    return model.eval()


def plain_score(directory: Path) -> Tensor:
    model, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model(IDS).logits[:, 0]


def test_an_adapter_is_merged_into_its_base(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = reward(base, lora_rank=2)
    save_adapter(model, None, tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    torch.testing.assert_close(plain_score(tmp_path / "out"), model(IDS), atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == word_tokenizer().get_vocab()


def test_a_policys_adapter_becomes_a_language_model_in_another_dtype(base: Path, tmp_path: Path) -> None:
    actor = Actor(str(base), param_dtype="fp32", lora_rank=2)
    shake_adapters(actor)
    save_adapter(actor, None, tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    difference = plain(IDS).logits.float() - actor(IDS, return_output=True).logits
    assert float(difference.detach().abs().max()) < 0.05


def test_a_run_is_its_final_model(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "rm"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("kind: rm\n")
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert f"rlhf-ray resume {run}" in capsys.readouterr().err and not (tmp_path / "out").exists()
    model = reward(base)
    save_pretrained(model, word_tokenizer(), run / "final", metadata={"mean": 0.5, "std": 2.0})
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    torch.testing.assert_close(plain_score(tmp_path / "out"), model(IDS), atol=1e-6, rtol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {"mean": 0.5, "std": 2.0, "problem_type": "regression", "pad_token_id": 0}.items() <= config.items()


def test_other_layouts_become_plain_and_openrlhfs_is_written_on_request(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL's bias stays as metadata, and that plain transformers reads another score is said."""
    file = base / "model.safetensors"
    head = {"v_head.summary.weight": torch.linspace(-1, 1, 32)[None], "v_head.summary.bias": torch.tensor([0.25])}
    save_file(load_file(file) | head, file, {"format": "pt"})
    model = get_llm_for_sequence_regression(str(base), "reward", param_dtype="fp32").eval()
    assert main(["export", str(base), str(tmp_path / "out")]) == 0
    torch.testing.assert_close(plain_score(tmp_path / "out") + 0.25, model(IDS), atol=1e-5, rtol=1e-5)
    assert main(["export", str(base), str(tmp_path / "openrlhf"), "--head-prefix", "value_head"]) == 0
    assert "value_head.weight" in load_file(tmp_path / "openrlhf" / "model.safetensors")
    assert json.loads((tmp_path / "openrlhf" / "config.json").read_text())["value_head_prefix"] == "value_head"


def test_a_tokenizer_without_a_pad_token_gets_one(base: Path, tmp_path: Path) -> None:
    save_pretrained(reward(base), None, tmp_path / "rm")
    word_tokenizer(pad=False).save_pretrained(tmp_path / "rm")
    assert main(["export", str(tmp_path / "rm"), str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert tokenizer.pad_token_id == config["pad_token_id"] == 48 and config["vocab_size"] == 56


def test_what_cannot_be_exported(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        f"{base} {base}": "exists already, and nothing is written over",
        f"{tmp_path / 'none'} {tmp_path / 'out'}": "does not exist: give a directory",
        f"{base} {tmp_path / 'out'} --head-prefix worth": "has none: leave it out",
    }
    for arguments, message in cases.items():
        assert main(["export", *arguments.split()]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_an_export_onto_a_full_disk_says_so_and_leaves_nothing(
    base: Path, small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(12)
    assert main(["export", str(base), str(disk / "out")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "disk full" in line]
    assert f"disk full: cannot write {disk}/out" in line and "are needed" in line
    assert list(disk.iterdir()) == []
