"""A checkpoint that is not of this run: one sentence that says what it is and how to go on, with 2; nothing is moved."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.loading import dump_config
from rlhf_ray.data.order import Part, ShuffledOrder
from rlhf_ray.errors import EXIT_WRONG_REQUEST, RequestError
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.resuming import resume_run
from rlhf_ray.storage.manifest import MANIFEST, _render
from tests.trainers.small_runs import config_of

STATES: dict[str, Any] = {
    "sft": {"progress": {"update": 2, "examples": 8}, "order": ShuffledOrder(0, [Part(16, 16)]).state()},
    "ppo": {"progress": {"step": 2}, "prompts": {}},
}


def made(root: Path, kind: str, *, roles: tuple[str, ...], state: Any) -> RunDirectory:
    """A run of this kind with a checkpoint that holds these roles and this state."""
    run = RunDirectory.create(root / "late", dump_config(config_of(kind, root)))
    pending = run.checkpoints.begin(2)
    for role in roles:
        (pending.path / role).mkdir()
        (pending.path / role / "shard").write_bytes(b"numbers")
    run.checkpoints.commit(pending, about={"state": state})
    run.release()
    return run


def as_of_version(run: RunDirectory, number: int) -> None:
    """Write the manifest as a version would whose format has this number, with the checksum that belongs to it."""
    path = run.checkpoints.checkpoint_path(2) / MANIFEST
    content = json.loads(path.read_bytes())
    content.pop("checksum")
    content["format"] = number
    path.write_bytes(_render({**content, "checksum": hashlib.sha256(_render(content)).hexdigest()}))


CASES: dict[str, tuple[str, tuple[str, ...], Any, str]] = {
    "PPO in an SFT": ("sft", ("policy",), STATES["ppo"], r"is not of a job of kind sft \(it has no 'order'\)"),
    "SFT in a PPO": ("ppo", ("policy",), STATES["sft"], r"is not of a job of kind ppo \(it has no 'step'\)"),
    "a reward model in an SFT": ("sft", ("reward",), STATES["sft"], "holds the training of reward, and this run trains policy"),
    "another algorithm": (
        "ppo", ("critic", "policy"), STATES["ppo"], "holds the training of critic and policy, and this run trains policy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_another_job_is_refused_with_what_it_holds(name: str, tmp_path: Path) -> None:
    kind, roles, state, sentence = CASES[name]
    run = made(tmp_path, kind, roles=roles, state=state)
    with pytest.raises(RequestError, match=sentence + ".*put the checkpoints of this run back") as refused:
        resume_run(run.path)
    assert refused.value.exit_code == EXIT_WRONG_REQUEST
    assert run.checkpoints.steps() == [2] and not run.is_owned() and len(run.attempts.read()) == 1


def test_a_checkpoint_of_another_version_is_no_damage(tmp_path: Path) -> None:
    run = made(tmp_path, "sft", roles=("policy",), state=STATES["sft"])
    as_of_version(run, 2)
    with pytest.raises(
        RequestError, match="another version of rlhf_ray, in format 2; this one reads format 1: go on with"
    ):
        resume_run(run.path)
    assert run.checkpoints.steps() == [2], "it is not set aside"
    as_of_version(run, 1)
    assert run.checkpoints.latest_valid() is not None, "so the checksum was right"


@pytest.mark.parametrize("name", ["metrics", "attempts", "ledger", "incidents", "set_aside", "metrics.void"])
def test_a_torn_last_line_of_any_journal_hinders_nothing(name: str, tmp_path: Path) -> None:
    run = made(tmp_path, "sft", roles=("policy",), state=STATES["sft"])
    run.metrics.append({"step": 2, "timestamp": 1e9, "time/step": 1.0})
    if name == "metrics.void":
        shutil.copy(run.metrics.path, run.path / "metrics.void.jsonl")
    if name == "ledger":
        run.ledger.append(1, [0])
        run.ledger.append(2, [1])
    with (run.path / f"{name}.jsonl").open("a") as stream:
        stream.write('{"step": 3, "timest')
    resumed = resume_run(run.path)
    assert resumed is not None and resumed.checkpoint is not None and resumed.checkpoint.step == 2
    assert [line["step"] for line in run.metrics.read()] == [2] and len(run.attempts.read()) == 2
    resumed.run.release()
