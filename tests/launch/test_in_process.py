"""``train --in-process``: the driver and all ranks in one process, for every kind of job.

What must hold: the run is a whole one, with one rank a role and no Ray; a breakpoint in a worker stops in the process that
was started; what needs a process of its own is refused with the way out, and leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_ray.config.loading import load_config
from rlhf_ray.errors import ConfigError
from rlhf_ray.launch.in_process import for_one_process, rank_environment

ROOT = Path(__file__).parents[2]
TINY_PPO = ROOT / "tests/e2e/ppo_tiny.yaml"
PROGRAM = "tests.launch.breakpoint_program"
TINY_REWARD_MODEL = """
kind: rm
run: {name: tiny-rm}
reward:
  model: {make: {shape: llama-tiny, tokenizer_from: world, seed: 3}, head_init: inv_sqrt, dtype: fp32}
  engine: {zero: 1, optimizer: {learning_rate: 1.0e-3}}
  ranks: 2
data: {world: {pairs: 64, evaluation_pairs: 16}, max_tokens: 96}
batch: {pairs_per_update: 32}
"""


def train(
    directory: Path, *arguments: str, module: str = "rlhf_ray", **variables: str
) -> subprocess.CompletedProcess[str]:
    """The command as a user types it, in a process of its own."""
    return run_python(directory, "-m", module, "train", *arguments, "--in-process", **variables)


def run_python(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python with ``arguments``, in ``directory``."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def assert_whole_run(run: Path, role: str, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert f"all in one process: {role}.ranks=1" in done.stderr + done.stdout
    assert yaml.safe_load((run / "config.yaml").read_text())[role]["ranks"] == 1
    assert (run / "final/model.safetensors").is_file() and (run / "report.html").is_file()
    assert "Ray" not in done.stderr + done.stdout, "no Ray is started"


@pytest.mark.early
def test_supervised_and_reward_training_one_after_the_other_from_python(tmp_path: Path) -> None:
    (tmp_path / "rm.yaml").write_text(TINY_REWARD_MODEL)
    program = """if True:
        import rlhf_ray
        small = {"policy.model.make.shape": "llama-tiny", "data.world.demonstrations": 64}
        for config, overrides, metric in (("demo-sft", small, "loss/sft"), ("rm.yaml", {}, "loss/rm")):
            run = rlhf_ray.train(config, overrides, in_process=True)
            assert run.status["state"] == "finished", run.status
            assert run.config.to_train().run.name == run.directory.name
            assert run.metrics()[metric].notna().any()
            assert run.report("page.html").read_text().startswith("<!")
        """
    done = run_python(tmp_path, "-c", program)
    assert_whole_run(tmp_path / "runs/demo-sft", "policy", done)
    assert_whole_run(tmp_path / "runs/tiny-rm", "reward", done)


@pytest.mark.early
def test_a_breakpoint_stops_in_every_rank_of_ppo(tmp_path: Path) -> None:
    options = ("rollout.backend=transformers", "steps=1", "evaluation.prompts=4")
    notes = tmp_path / "breakpoints.jsonl"
    done = train(
        tmp_path,
        "ppo",
        str(TINY_PPO),
        *options,
        module=PROGRAM,
        PYTHONBREAKPOINT=f"{PROGRAM}.note",
        BREAKPOINTS=str(notes),
    )
    assert_whole_run(tmp_path / "runs/tiny", "policy", done)
    stops = [json.loads(line) for line in notes.read_text().splitlines()]
    assert {stop["role"] for stop in stops} == {"policy", "critic", "reference", "reward", "rollout"}
    started = int(done.stdout.splitlines()[0])
    assert {stop["pid"] for stop in stops} == {stop["here"] for stop in stops} == {started}


def test_vllm_is_refused_with_the_way_out(tmp_path: Path) -> None:
    done = train(tmp_path, "ppo", str(TINY_PPO))
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert "rollout.backend: vllm needs a process of its own: set rollout.backend=transformers" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reward_model_in_vllm_is_refused_too(tmp_path: Path) -> None:
    overrides = [
        "rollout.backend=transformers",
        f"reward.model={{path: {tmp_path}, dtype: fp32}}",
        "reward.scorer=vllm",
    ]
    config = load_config(TINY_PPO, overrides).to_train()
    with pytest.raises(ConfigError, match=r"reward\.scorer: vllm needs a process of its own: set it to packed"):
        for_one_process(config)


def test_every_role_gets_one_rank_and_a_job_that_fits_stays_as_it_is() -> None:
    config = load_config(TINY_PPO, ["rollout.backend=transformers", "critic.ranks=2", "reward.ranks=3"]).to_train()
    changed = for_one_process(config)
    assert [role.config.ranks for role in changed.roles().values()] == [1, 1, 1, 1]
    assert not changed.monitoring.ray_metrics
    assert for_one_process(changed) is changed


def test_the_process_gets_the_environment_that_ranks_have() -> None:
    threads = ["rollout.backend=transformers", "reward.resources.threads_per_rank=3", "run.deterministic=false"]
    variables = rank_environment(load_config(TINY_PPO, threads).to_train())
    assert (variables["OMP_NUM_THREADS"], variables["HF_HUB_OFFLINE"], variables["CUDA_VISIBLE_DEVICES"]) == (
        "3",
        "1",
        "",
    )
