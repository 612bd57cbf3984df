"""A run goes on as long as it is asked to, with the config, the data and the models that it knows; what changed is on record.

Whole runs of every kind in one process, without Ray. What must hold: a finished run stays as it is; one that becomes longer
goes on where it ended, with every row in its turn, at the rate that a run of the new length has there, and its ``final/`` is
replaced at its end; data, models and code that changed on disk are refused until they are accepted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_ray import storage
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.cli.main import main
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.errors import CapacityError, ConfigError, RequestError, ResumableStop
from rlhf_ray.launch import driver
from rlhf_ray.launch.driver import continue_run, train_new_run
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers import stopping
from rlhf_ray.trainers.ppo.loop import PpoTrainer

pytestmark = pytest.mark.early

SHARED: dict[str, Any] = {"run": {"name": "run", "seed": 5}, "monitoring": {"ray_metrics": False}}
OPTIMIZER = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_fraction": 0.25}
TINY = {"make": {"shape": "llama-tiny", "tokenizer_from": "world"}, "dtype": "fp32"}
PPO: dict[str, Any] = {
    **SHARED,
    "kind": "ppo",
    "steps": 2,
    "policy": {"model": TINY, "engine": {"optimizer": OPTIMIZER}},
    "reward": {"function": "PLACE/reward.py:length"},
    "rollout": {"backend": "transformers", "max_new_tokens": 4, "max_model_tokens": 64, "dtype": "fp32"},
    "data": {"path": "PLACE/rows.jsonl", "evaluation_fraction": 0.1, "max_prompt_tokens": 40},
    "batch": {"prompts_per_step": 8, "samples_per_prompt": 2, "sequences_per_update": 8,
              "max_tokens_per_micro_batch": 1024},
    "algorithm": {"name": "rloo", "kl": {"coefficient": 0.1, "target": 1.0, "horizon": 50}},
    "evaluation": {"prompts": 2},
    "checkpoint": {"every_steps": 1},
}  # fmt: skip
SFT: dict[str, Any] = {
    **SHARED,
    "kind": "sft",
    "epochs": 1.0,
    "policy": {"model": TINY, "engine": {"optimizer": OPTIMIZER}},
    "data": {"path": "PLACE/rows.jsonl", "evaluation_fraction": 0.1, "max_tokens": 64},
    "batch": {"sequences_per_update": 8},
    "checkpoint": {"every_steps": 1},
}
RM: dict[str, Any] = {
    **SHARED,
    "kind": "rm",
    "reward": {"model": {**TINY, "head_init": "inv_sqrt"}, "engine": {"optimizer": OPTIMIZER}},
    "data": {"path": "PLACE/pairs.jsonl", "evaluation_fraction": 0.1, "max_tokens": 64, "cache": None},
    "batch": {"pairs_per_update": 8},
    "checkpoint": {"every_steps": 1},
}
ROWS = 28
"""Of which 25 are trained on: the last update of an epoch is smaller than the others."""
Train = Callable[..., RunDirectory]


@pytest.fixture(autouse=True)
def single_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with data, a reward function, and room for runs."""
    rows = [{"prompt": f"dear customer {number}", "answer": f"thanks {number}"} for number in range(ROWS)]
    pairs = [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": "no"} for row in rows]
    for name, content in (("rows", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "reward.py").write_text("def length(responses):\n    return [float(len(one)) for one in responses]\n")
    return tmp_path


@pytest.fixture
def train(place: Path) -> Train:
    def new(content: dict[str, Any], *overrides: str, name: str = "run") -> RunDirectory:
        text = yaml.safe_dump(content).replace("PLACE", str(place))
        (place / "config.yaml").write_text(text)
        config = load_config(place / "config.yaml", [f"run.root={place}", f"run.name={name}", *overrides], files=True)
        train_new_run(dump_config(config), place=ThisProcess(config.cluster))
        return RunDirectory.open(place / name)

    return new


def resume(run: RunDirectory, *overrides: str, accept: tuple[str, ...] = ()) -> RunDirectory:
    config = load_config(run.config_path)
    continue_run(str(run.path), overrides, accept, place=ThisProcess(config.cluster))
    return RunDirectory.open(run.path)


def files(run: RunDirectory) -> dict[str, bytes]:
    """All but what whoever is at work in a run says of itself: its heartbeat, and what it did when."""
    found = [path for path in run.path.rglob("*") if path.is_file() and path != run.heartbeat.path]
    found = [path for path in found if run.spans not in path.parents]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in found}


def rates(run: RunDirectory) -> list[float]:
    names = ("learning_rate", "learning_rate/policy")
    return [line[name] for line in run.metrics.read() for name in names if name in line]


def test_ppo_finished_stays_as_it_is_and_goes_on_when_it_is_made_longer(place, train, project_log) -> None:
    run = train(PPO)
    before = files(run)
    resume(run)
    assert "has finished: there is nothing left to do" in project_log.getvalue()
    assert files(run) == before
    coefficient = [line["kl/coefficient"] for line in run.metrics.read() if "kl/coefficient" in line][-1]

    ends: list[dict[str, bytes]] = []
    step = PpoTrainer.step

    def watched(self: PpoTrainer) -> None:
        ends.append(files(run))
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PpoTrainer, "step", watched)
        longer = resume(run, "steps=4")
    assert [name for name in ends[-1] if name.startswith("final/")]
    for name in before:
        if name.startswith("final/"):
            assert ends[-1][name] == before[name], "final/ is that of the shorter run until the longer one is whole"
    storage.verify(longer.final)
    assert (longer.final / "model.safetensors").read_bytes() != before["final/model.safetensors"]
    assert longer.is_finished and longer.ledger.last_step == 4
    used = [prompt for entry in longer.ledger.entries() for prompt in entry.prompt_ids]
    assert len(used) == 32 and len(set(used[:25])) == 25, "every prompt once in the first epoch"
    steps = [line for line in longer.metrics.read() if "kl/coefficient" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    most = 0.2 * 16 / 50 + 1e-6  # how far a step of 16 sequences moves it at a horizon of 50
    goes_on, begins_again = (abs(steps[2]["kl/coefficient"] / earlier - 1.0) <= most for earlier in (coefficient, 0.1))
    assert goes_on and not begins_again, "the controller goes on"
    whole = train(PPO, "steps=4", name="whole")
    assert rates(longer)[2:] == rates(whole)[2:] and rates(longer)[:2] != rates(whole)[:2]
    (_, attempt) = longer.attempts.read()
    assert attempt["from_step"] == 2 and attempt["changes"] == [{"key": "steps", "from": 2, "to": 4}]
    assert load_config(longer.config_path).steps == 4


@pytest.mark.parametrize("content", [SFT, RM], ids=["sft", "rm"])
def test_supervised_training_goes_on_over_the_rows_that_an_undisturbed_run_takes(content, train) -> None:
    run = train(content)
    assert [line["step"] for line in run.metrics.read() if "learning_rate" in line] == [1, 2, 3, 4], "25 rows by 8"
    longer = resume(run, "epochs=2.0")
    lines = [line for line in longer.metrics.read() if "learning_rate" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8], "25 more rows by 8"
    state = longer.checkpoints.latest_valid().manifest.about["state"]
    assert state["progress"]["examples"] == 50 and state["order"]["taken"] == 50
    assert longer.is_finished and longer.attempts.read()[-1]["changes"][0]["to"] == 2.0
    assert lines[-1]["learning_rate"] == pytest.approx(0.0, abs=2e-4) and lines[4]["learning_rate"] > 3e-4


def test_a_finished_run_whose_driver_dies_is_not_trained_again(train, monkeypatch) -> None:
    run = train(SFT, "checkpoint.every_steps=0")
    before = files(run)
    monkeypatch.setattr(driver, "run_trainer", lambda *arguments, **options: pytest.fail("trained again"))
    assert driver.main(["--resume", str(run.path)]) == 0
    assert files(run) == before


def test_a_run_that_would_end_before_it_goes_on_is_refused_and_left_as_it_was(train) -> None:
    for content, shorter, done in ((PPO, "steps=1", "2"), (SFT, "epochs=0.5", "1")):
        run = train(content, name=content["kind"])
        (run.path / "summary.json").unlink()  # as if it had been killed before its end
        before = files(run)
        with pytest.raises(
            ConfigError, match=rf"{shorter.replace('=', ': ')} is less than the {done} that the run has done"
        ):
            resume(run, shorter)
        assert files(run) == before


def test_a_longer_run_that_is_stopped_on_the_way_has_not_finished(train, monkeypatch, capsys) -> None:
    run = train(SFT)
    taken = []
    monkeypatch.setattr(stopping._stop, "is_set", lambda: taken.append(1) or len(taken) > 3)
    with pytest.raises(ResumableStop):
        resume(run, "epochs=2.0")
    monkeypatch.undo()
    assert not RunDirectory.open(run.path).is_finished and (run.path / "summary.void.json").exists()
    assert main(["status", str(run.path)]) == 0
    assert f"rlhf-ray resume {run.path}" in capsys.readouterr().out
    ended = resume(run)
    assert ended.is_finished and ended.checkpoints.steps()[-1] == 8


def test_each_change_stands_in_the_attempts_and_is_shown(train, project_log, capsys) -> None:
    run = train(PPO)
    changed = resume(run, "steps=3", "batch.prompts_per_step=16", "policy.engine.optimizer.learning_rate=2e-3",
                     "checkpoint.keep=3", "evaluation.prompts=1")  # fmt: skip
    recorded = changed.attempts.read()[-1].get("changes", [])
    changes = {one["key"]: (one["from"], one["to"]) for one in recorded}
    assert changes == {
        "steps": (2, 3),
        "batch.prompts_per_step": (8, 16),
        "policy.engine.optimizer.learning_rate": (1e-3, 2e-3),
        "checkpoint.keep": (2, 3),
        "evaluation.prompts": (2, 1),
    }
    assert "steps: 2 -> 3 (the schedule of the learning rate" in project_log.getvalue()
    assert len(changed.ledger.entries()[-1].prompt_ids) == 16
    assert rates(changed)[-1] == 0.0, "a cosine ends at the last update: of 2 steps of 2, and 1 of 4"
    assert load_config(changed.config_path).batch.prompts_per_step == 16
    assert main(["status", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert "after step 2: " in shown and "steps 2 -> 3" in shown and "batch.prompts_per_step 8 -> 16" in shown
    assert main(["report", str(run.path)]) == 0
    assert "steps 2 -&gt; 3" in run.report_path.read_text()


def test_a_resume_that_is_refused_before_its_first_step_leaves_the_run_as_it_was(place, train, monkeypatch) -> None:
    run = train(SFT)
    before = files(run)
    rows = (place / "rows.jsonl").read_text()
    (place / "rows.jsonl").write_text(rows + json.dumps({"prompt": "one more", "answer": "row"}) + "\n")
    with pytest.raises(RequestError, match="the data set has 26 rows, but had 25"):
        resume(run, "epochs=2.0", accept=("data.path",))
    after = files(run)
    assert len(after.pop("attempts.void.jsonl", b"").splitlines()) == 1 and after == before
    (place / "rows.jsonl").write_text(rows)
    with monkeypatch.context() as patch, pytest.raises(CapacityError):
        patch.setattr(driver, "run_trainer", raising(CapacityError("the job does not fit")))
        resume(run, "epochs=2.0", "policy.resources.cpus_per_rank=99.0")
    assert {name: content for name, content in files(run).items() if name != "attempts.void.jsonl"} == before
    assert resume(run, "epochs=2.0").is_finished


def raising(error: Exception) -> Callable[..., None]:
    """A trainer that ends in ``error``."""

    def train(*job: object, **options: object) -> None:
        raise error

    return train


def test_a_driver_takes_changes_and_accepted_inputs_from_its_command_line(place, train, monkeypatch) -> None:
    run = train(SFT)
    (place / "rows.jsonl").write_text((place / "rows.jsonl").read_text().replace("dear", "near"))
    trained: list[Any] = []
    monkeypatch.setattr(driver, "run_trainer", lambda config, *rest, **place: trained.append(config))
    assert driver.main(["--resume", str(run.path), "epochs=2.0"]) == 2 and trained == []
    assert driver.main(["--resume", str(run.path), "epochs=2.0", "checkpoint.keep=4", "--accept", "data.path"]) == 0
    assert [(config.epochs, config.checkpoint.keep) for config in trained] == [(2.0, 4)]


def test_a_config_that_was_edited_by_hand_is_held_to_the_same_rules(place, train) -> None:
    run = train(SFT)
    text = run.config_path.read_text()
    for wrong, key in (("seed: 5", "run.seed"), (" dtype: fp32", "policy.model.dtype"), ("name: run", "run.name")):
        edited = {"seed: 5": "seed: 6", " dtype: fp32": " dtype: bf16", "name: run": "name: other"}[wrong]
        assert wrong in text
        run.config_path.write_text(text.replace(wrong, edited))
        with pytest.raises(ConfigError, match=rf"{key}: it is .* in this run and cannot become"):
            resume(run)
    run.config_path.write_text(text.replace("epochs: 1.0", "epochs: 2.0"))
    longer = resume(run)
    assert longer.is_finished and longer.attempts.read()[-1].get("changes") == [
        {"key": "epochs", "from": 1.0, "to": 2.0}
    ]
    resume(longer)
    assert len(longer.attempts.read()) == 2, "what is known is no change any more"
    copy = place / "copy"
    shutil.copytree(longer.path, copy)
    (copy / "config.yaml").write_text(longer.config_text().replace("name: run", "name: copy"))
    assert resume(RunDirectory.open(copy), "epochs=3.0").is_finished, (
        "a run that was copied may be named after its place"
    )


def test_an_input_that_changed_on_disk_is_refused_by_name_until_it_is_accepted(place, train) -> None:
    """Rows, models and the user's own code; the same size and time prove nothing."""
    start = train(SFT, name="start")
    run = train({**PPO, "policy": {**PPO["policy"], "model": {"path": str(start.final), "dtype": "fp32"}}})
    (run.path / "summary.json").unlink()
    for key, file, change in (
        ("data.path", place / "rows.jsonl", lambda old: old.replace(b"dear", b"near", 1)),
        ("policy.model.path", start.final / "model.safetensors", lambda old: old[:-1] + bytes([old[-1] ^ 1])),
        ("policy.model.path", start.final / "tokenizer.json", lambda old: old.replace(b"  ", b"\t ", 1)),
        ("reward.function", place / "reward.py", lambda old: old.replace(b"    return", b"\treturn")),
    ):
        before, earlier, stat = files(run), file.read_bytes(), file.stat()
        changed = change(earlier)
        assert changed != earlier
        file.write_bytes(changed)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(ConfigError, match=rf"{key}: what lies there has changed.*--accept {key}") as refused:
            resume(run)
        assert len(refused.value.problems) == 1 and files(run) == before
        if key == "policy.model.path":
            assert f"(in {file.name})" in str(refused.value)
        file.write_bytes(earlier)
    (place / "reward.py").write_text("def length(responses):\n    return [1.0 for one in responses]\n")
    again = resume(run, "steps=3", accept=("reward.function",))
    (accepted,) = again.attempts.read()[-1]["accepted"]
    assert accepted["key"] == "reward.function" and accepted["from"] != accepted["to"] and len(accepted["to"]) == 64
    resume(again, "steps=4")  # what was accepted is what the run knows now


def test_data_that_lies_elsewhere_is_the_same_and_other_data_is_not(place, train) -> None:
    run = train(SFT)
    moved = place / "elsewhere.jsonl"
    shutil.move(place / "rows.jsonl", moved)
    longer = resume(run, "epochs=2.0", f"data.path={moved}")
    assert longer.is_finished
    other = place / "other.jsonl"
    other.write_text(moved.read_text().replace("dear", "near"))
    with pytest.raises(ConfigError, match=r"data\.path: .*other\.jsonl does not hold what .*elsewhere\.jsonl held"):
        resume(longer, "epochs=3.0", f"data.path={other}")
    with pytest.raises(RequestError, match=r"--accept data\.pth: this is no input of the run .*data\.path"):
        resume(longer, "epochs=3.0", accept=("data.pth",))


def test_a_run_of_before_goes_on_with_one_line_about_what_is_not_known(train, project_log) -> None:
    run = train(SFT)
    run.inputs_path.unlink()
    longer = resume(run, "epochs=2.0")
    lines = [line for line in project_log.getvalue().splitlines() if "kept no fingerprints" in line]
    assert len(lines) == 1 and "data.path" in lines[0] and "policy.model.make.tokenizer_from" in lines[0]
    assert longer.is_finished and longer.inputs_path.exists(), "from now on it is known"
