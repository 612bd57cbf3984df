"""``train --in-process``: the driver and all ranks in one process, for every kind of job.

What must hold: the run is a whole one, with one rank a role and no Ray; a breakpoint in a worker stops in the process that
was started; what needs a process of its own is refused with the way out, and leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.loading import load_config
from rlhf_ray.errors import ConfigError
from rlhf_ray.launch import driver, in_process
from rlhf_ray.launch.in_process import for_one_process, place_for_scoring, rank_environment, train_in_process
from rlhf_ray.processes import stacks

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


def train(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user types it, in a process of its own."""
    return run_python(directory, "-m", "rlhf_ray", "train", *arguments, "--in-process")


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


@dataclass(frozen=True)
class Session:
    """One process that trained all kinds of jobs, one after the other."""

    directory: Path
    done: subprocess.CompletedProcess[str]
    stops: list[dict[str, Any]]
    """Where a breakpoint in a worker stopped: the role, and the process."""

    def stops_of(self, run: str) -> list[dict[str, Any]]:
        return [stop for stop in self.stops if stop["run"] == run]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Supervised and reward training from Python, then PPO as on the command line, all with a breakpoint in the workers."""
    directory = tmp_path_factory.mktemp("session")
    (directory / "rm.yaml").write_text(TINY_REWARD_MODEL)
    notes = directory / "breakpoints.jsonl"
    done = run_python(
        directory, "-m", PROGRAM, str(TINY_PPO), PYTHONBREAKPOINT=f"{PROGRAM}.note", BREAKPOINTS=str(notes)
    )
    assert done.returncode == 0, done.stderr
    return Session(directory, done, [json.loads(line) for line in notes.read_text().splitlines()])


@pytest.mark.early
def test_every_kind_of_job_is_a_whole_run(session: Session) -> None:
    for run, role in (("demo-sft", "policy"), ("tiny-rm", "reward"), ("tiny", "policy")):
        assert_whole_run(session.directory / "runs" / run, role, session.done)


@pytest.mark.early
def test_a_breakpoint_stops_in_every_rank(session: Session) -> None:
    started = int(session.done.stdout.splitlines()[0])
    ppo = {"policy", "critic", "reference", "reward", "rollout"}
    for run, roles in (("demo-sft", {"policy"}), ("tiny-rm", {"reward"}), ("tiny", ppo)):
        stops = session.stops_of(run)
        assert {stop["role"] for stop in stops} == roles
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


def test_all_roles_of_one_process_compute_on_one_device() -> None:
    """DeepSpeed has one accelerator in a process."""
    roles = ("policy", "critic", "reference", "reward", "rollout")
    on_gpu = [f"{role}.resources.gpus_per_rank=0.2" for role in roles]
    further = ["rollout.backend=transformers", "run.deterministic=false", "policy.ranks=1"]
    with pytest.raises(
        ConfigError, match=r"rollout\.resources\.gpus_per_rank: the rollout is placed on cpu and the policy"
    ):
        for_one_process(load_config(TINY_PPO, [*further, *on_gpu[:-1]]).to_train())
    config = for_one_process(load_config(TINY_PPO, [*further, *on_gpu]).to_train())
    variables = rank_environment(config)
    assert variables["DS_ACCELERATOR"] == "cuda" and "CUDA_VISIBLE_DEVICES" not in variables


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda")])
def test_scoring_in_this_process_is_on_the_device_of_its_role(
    monkeypatch: pytest.MonkeyPatch, gpus: int, device: str
) -> None:
    """DeepSpeed takes the accelerator that the environment names when it is first imported."""
    monkeypatch.setenv("DS_ACCELERATOR", "neither")
    config = load_config("serve", ["reward.model.path=none", f"reward.resources.gpus_per_rank={gpus}"], kind="serve")
    assert isinstance(config, ServeConfig)
    place_for_scoring(config)
    assert os.environ["DS_ACCELERATOR"] == device


@pytest.mark.parametrize(
    ("override", "problem"),
    [("reward.ranks=2", r"reward\.ranks: 2 ranks need"), ("reward.scorer=vllm", r"reward\.scorer: vllm needs")],
)
def test_scoring_that_needs_more_processes_is_not_done_in_this_one(override: str, problem: str) -> None:
    config = load_config("serve", ["reward.model.path=anywhere", override], kind="serve")
    assert isinstance(config, ServeConfig)
    with pytest.raises(ConfigError, match=problem):
        place_for_scoring(config)


def test_what_the_whole_run_does_can_be_seen_where_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()
    stacks.offer("whoever calls it")
    monkeypatch.setattr(in_process, "rank_environment", lambda config: {})
    monkeypatch.setattr(driver, "train_new_run", lambda config, place: seen.append(stacks.describe([os.getpid()])))
    train_in_process(load_config(TINY_PPO, ["rollout.backend=transformers"], kind="ppo").to_train())
    assert "driver and ranks" in seen[0] and "in train_in_process" in seen[0]
