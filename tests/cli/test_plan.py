"""``plan`` prints the memory of every role, and refuses what the GPUs that it knows cannot hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.cli import plan
from rlhf_ray.cli.main import main
from rlhf_ray.planning import gpus
from tests.planning.recipes import PUBLISHED

TINY_PPO = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
RECIPE = ("qwen3-8b-rm-lora", f"reward.model.path={PUBLISHED / 'Qwen3-8B'}")


def test_a_directory_with_a_config_alone_is_enough_for_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *RECIPE]) == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["weights", "15.3"] in rows and ["every", "GPU", "must", "have", "23"] in rows


def test_a_job_that_gpus_of_this_size_do_not_hold_is_refused_after_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", *RECIPE, "--gpu-gb", "16"]) == 3
    captured = capsys.readouterr()
    assert "must have" in captured.out
    assert "a rank of reward needs 22.7 GB of its GPU (backward: weights 15.3, " in captured.err
    assert "reward.resources.gpus_per_rank 1 of 16 GB is 16.0 GB" in captured.err
    assert main(["plan", *RECIPE, "--gpu-gb", "24"]) == 0


def test_the_gpus_of_this_machine_count_where_no_size_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "gpu_bytes", lambda: 16 * 10**9)
    assert main(["plan", *RECIPE]) == 3
    assert main(["plan", *RECIPE, "cluster.address=10.0.0.1:6379"]) == 0, "the GPUs of a cluster are others"


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "many"])
def test_a_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *RECIPE, "--gpu-gb", size])
    assert stopped.value.code == 2 and size in capsys.readouterr().err


def test_a_model_in_the_cache_of_the_hub_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *a, **k: str(PUBLISHED / "Qwen3-8B/config.json")
    )
    monkeypatch.chdir(tmp_path)
    from rlhf_ray.config.sections.models import ModelConfig

    found, shapes = plan.files_here(ModelConfig(path="Qwen/Qwen3-8B"))
    assert found.path == str(PUBLISHED / "Qwen3-8B") and shapes["model.embed_tokens.weight"] == (151936, 4096)


def test_the_age_of_answers_is_printed(capsys) -> None:
    assert main(["plan", str(TINY_PPO), "rollout.mode=one_step_off"]) == 0
    assert "mean age of answers" in capsys.readouterr().out


def test_the_nodes_that_are_given_show_which_rank_goes_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-3-70b-4nodes", "--nodes", "4x80x8"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "0 of 8 policy 0-7" in shown
    assert main(["plan", "llama-3-70b-4nodes", "--nodes", "4x80x7"]) == 0
    assert "node 4: the job does not fit: " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("shape", ["4x8", "0x8x8", "4x0x8", "axbxc"])
def test_what_is_no_shape_of_nodes_is_refused(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "demo-ppo", "--nodes", shape])
    assert f"{shape} is not nodes x CPUs x GPUs, such as 4x64x8" in capsys.readouterr().err
