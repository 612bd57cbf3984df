"""Without a GPU all checks are left out with a reason; what they would do there is shown here on the CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_ray.config.loading import load_config
from rlhf_ray.models.actor import Actor
from rlhf_ray.models.disk_names import to_disk_names
from rlhf_ray.models.forward.segments import Group, Segments
from tests.gpu import agreement, throughput
from tests.gpu.run import CHECKS, Check, _run
from tests.gpu.stack import CONFIG, OVERRIDES


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU runs the checks: make gpu")
def test_without_a_gpu_everything_is_left_out_and_nothing_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu.run", "--results", str(tmp_path / "gpu.json")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr
    *lines, counts = done.stdout.splitlines()
    assert [line.split()[2].rstrip(":") for line in lines] == [check.name for check in CHECKS]
    assert all(line.startswith("left out") and "torch sees no GPU" in line for line in lines)
    assert counts == f"0 passed, 0 failed, {len(CHECKS)} left out"
    assert not (tmp_path / "gpu.json").exists()


def test_a_check_that_fails_is_a_failure_and_one_that_lacks_something_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> str:
        raise AssertionError("off by one")

    assert _run(Check("wrong", (), wrong), tmp_path / "gpu.json") == "failed"
    assert _run(Check("right", ("transformers",), lambda: "exact"), tmp_path / "gpu.json") == "passed"
    assert "off by one" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_log_probs_agree_on_the_cpu(dtype: torch.dtype) -> None:
    assert "hidden states off by" in agreement.attention_agrees("sdpa", dtype, "cpu", count=4, longest=60)
    assert "off by" in agreement.log_probs_agree(dtype, "cpu", tokens=300, vocabulary=4096)


def test_four_bits_agree_on_the_cpu_and_other_weights_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "off by" in agreement.four_bit_agrees("cpu", count=2, longest=30)
    write = agreement.save_pretrained

    def write_another(actor: Actor, tokenizer: None, directory: str) -> None:
        write(actor, tokenizer, directory, state={name: 1.1 * tensor for name, tensor in to_disk_names(actor.model)})

    monkeypatch.setattr(agreement, "save_pretrained", write_another)
    with pytest.raises(AssertionError, match="NF4 and its dequantised weights differ"):
        agreement.four_bit_agrees("cpu", count=2, longest=30)


def test_attention_that_looks_past_its_segment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_the_mask(self: Segments, group: Group, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(group.longest, group.context + group.longest, dtype=dtype)

    monkeypatch.setattr(Segments, "mask", forgets_the_mask)
    monkeypatch.setattr("rlhf_ray.models.actor.check_packing", lambda *models: None)
    with pytest.raises(AssertionError, match="hidden states of packs"):
        agreement.attention_agrees("sdpa", torch.bfloat16, "cpu", count=4, longest=60)


def test_throughput_has_its_figures_and_counts_a_known_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(throughput.CONFIGS, "tiny", lambda: throughput.make_config("llama-tiny", 128))
    monkeypatch.setattr(throughput, "REPEATS", 1)
    check = Check("speed", (), lambda: throughput.measure("tiny", "cpu", count=4, budget=600, roof_size=64))
    assert _run(check, tmp_path / "gpu.json") == "passed"
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    assert len(figures) == 4 and all(math.isfinite(f["value"]) and f["value"] > 0 for f in figures.values())
    model = torch.nn.Linear(3, 5, bias=False)
    model.config = throughput.make_config("llama-tiny", 128)
    model.config.tie_word_embeddings = True
    # 2 layers of 2 heads of 32: one token attends to itself, at 2 operations a weight and 2 a number of head size
    assert throughput.forward_operations(model, [1]) == 2 * 15 + 2 * 2 * 2 * 32


def test_the_config_of_the_whole_stack_is_accepted() -> None:
    assert load_config(CONFIG, OVERRIDES, kind="ppo").policy.resources.gpus_per_rank == 0.15
