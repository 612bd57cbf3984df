"""What a user gets wrong: one message that names the thing, the value and the way out, the right code, no stack trace.

Nothing of it may start Ray or a driver: every process that such a command makes is refused here.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.errors import EXIT_NO_CAPACITY, EXIT_WRONG_REQUEST
from rlhf_ray.monitoring.report.summary import Summary
from rlhf_ray.runs.directory import RunDirectory

GOOD_ROW = json.dumps({"prompt": "two and two?", "answer": "four"})


class NoProcess(subprocess.Popen):
    """Refuses to start anything."""

    def __init__(self, *arguments: object, **options: object) -> None:
        raise AssertionError(f"a process was started: {arguments}")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, on a machine without a cluster, where no process may be started."""

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(subprocess, "Popen", NoProcess)
    return tmp_path


class Refused:
    """Runs a command that must be refused, and keeps its message."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str, code: int = EXIT_WRONG_REQUEST) -> str:
        assert main(arguments) == code
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        assert captured.out == ""
        return captured.err


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    return Refused(capsys)


COMMANDS = (("check",), ("plan",), ("submit",), ("train", "sft"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_misspelt_key_names_its_nearest_neighbour(refused, command):
    message = refused(*command, "demo-sft", "batch.sequences_per_updat=8")
    assert "batch.sequences_per_updat" in message
    assert "did you mean" in message and "sequences_per_update" in message


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_type_error_names_the_key_the_value_and_what_was_wanted(refused, command):
    message = refused(*command, "demo-sft", "policy.ranks=two")
    assert "policy.ranks" in message and "two" in message and "whole number" in message


def test_every_error_is_listed_at_once(refused):
    message = refused(
        "train",
        "sft",
        "demo-sft",
        "epochz=1",
        "run.seed=none_of_it",
        "policy.ranks=-1",
        "data.world=null",
        "data.path=gone.jsonl",
    )
    for key in ("epochz", "run.seed", "policy.ranks", "gone.jsonl"):
        assert key in message


def test_a_line_of_a_file_is_named(refused, here):
    (here / "own.yaml").write_text("kind: sft\nrun: {name: own}\nepochs: many\n")
    message = refused("check", "own.yaml")
    assert "own.yaml" in message and "epochs" in message and "line 3" in message


@pytest.mark.parametrize("command", [("check",), ("train", "sft")], ids=" ".join)
def test_a_model_path_that_does_not_exist(refused, command):
    message = refused(*command, "demo-sft", "policy.model.make=null", "policy.model.path=models/that/is/gone")
    assert (
        "policy.model.path" in message
        and "models/that/is/gone does not exist" in message
        and "name a model directory" in message
    )


@pytest.mark.parametrize("command", [("check",), ("train", "sft")], ids=" ".join)
@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("gone.jsonl", None, ("gone.jsonl", "does not exist")),
        ("empty.jsonl", "", ("empty.jsonl", "holds no rows")),
        ("bad.jsonl", f"{GOOD_ROW}\n" + '{"prompt": "and three?"}\n', ("bad.jsonl:2", "'answer'", "'prompt'")),
        ("torn.jsonl", f"{GOOD_ROW}\n" + '{"prompt": "and', ("torn.jsonl:2",)),
    ],
    ids=["missing", "empty", "a row without its keys", "a torn row"],
)
def test_data_that_cannot_be_used(refused, here, command, name, content, parts):
    if content is not None:
        (here / name).write_text(content)
    message = refused(
        *command, "demo-sft", "data.world=null", f"data.path={name}", "policy.model.make.tokenizer_from=world"
    )
    for part in parts:
        assert part in message
    assert not (here / "runs").exists()


def test_sizes_that_do_not_divide(refused, tmp_path):
    message = refused("plan", "demo-ppo", "batch.prompts_per_step=64", "batch.sequences_per_update=48")
    assert (
        "sequences_per_update" in message
        and "48 does not divide the 64" in message
        and "nearest size that does is" in message
    )


def test_more_ranks_than_this_machine_has(refused, here):
    message = refused(
        "train",
        "sft",
        "demo-sft",
        "policy.ranks=100",
        "batch.sequences_per_update=100",
        "cluster.num_cpus=2",
        code=EXIT_NO_CAPACITY,
    )
    assert "20 CPU needed, 2 free" in message
    table = [[cell.strip() for cell in line.strip("│").split("│")] for line in message.splitlines() if "│" in line]
    assert ["policy", "100", "0.2", "0", "20", "0"] in table
    assert next(row for row in table if row[0] == "free")[-2] == "2"
    assert not (here / "runs").exists()


def test_a_run_that_came_from_a_larger_machine(refused, here):
    own = "policy.ranks=100", "batch.sequences_per_update=100", "cluster.num_cpus=2", "run.name=large"
    (here / "runs/large").mkdir(parents=True)
    (here / "runs/large/config.yaml").write_text(dump_config(load_config("demo-sft", own)))
    assert "20 CPU needed, 2 free" in refused("resume", "runs/large", code=EXIT_NO_CAPACITY)


def test_a_kind_that_is_not_the_configs(refused):
    message = refused("train", "ppo", "demo-sft")
    assert "sft" in message and "ppo was asked for" in message


def test_a_command_without_arguments_names_those_it_needs(capsys):
    with pytest.raises(SystemExit):
        main(("train",))
    assert "the following arguments are required: kind, config\n" in capsys.readouterr().err


def test_a_recipe_that_is_not_there(refused):
    assert "did you mean demo-sft?" in refused("check", "demo-stf")


def test_what_is_not_an_override(refused):
    assert "learning_rate" in refused("check", "demo-sft", "learning_rate")


@pytest.mark.parametrize("command", ["resume", "status", "report"])
def test_a_directory_that_is_no_run(refused, here, command):
    (here / "nothing").mkdir()
    assert "nothing is not a run directory: it has no config.yaml" in refused(command, "nothing")


@pytest.fixture
def finished(here):
    run = RunDirectory.create(here / "runs/done", dump_config(load_config("demo-sft", ["run.name=done"])))
    run.write_summary(Summary())
    run.release()
    return run


def test_a_finished_run_says_so_and_stays_as_it_is(finished, project_log):
    before = {path: path.read_bytes() for path in finished.path.rglob("*") if path.is_file()}
    assert main(["resume", "runs/done"]) == 0
    assert "the run runs/done has finished: there is nothing left to do; to train it further" in project_log.getvalue()
    assert "rlhf-ray resume runs/done epochs=N, with N above 1" in project_log.getvalue()
    assert {path: path.read_bytes() for path in finished.path.rglob("*") if path.is_file()} == before


def test_a_finished_run_changes_only_if_it_becomes_longer(finished, refused):
    message = refused("resume", "runs/done", "checkpoint.keep=5")
    assert (
        "runs/done has finished, so checkpoint.keep: 2 -> 5 would change nothing: make it longer too (epochs=N"
        in message
    )


def test_what_a_run_may_not_change_is_refused_all_at_once(finished, refused):
    message = refused("resume", "runs/done", "run.seed=9", "policy.model.dtype=bf16", "epochs=3")
    assert "runs/done: 2 problems" in message
    assert "run.seed: it is 0 in this run and cannot become 9" in message
    assert "policy.model.dtype: it is fp32 in this run and cannot become bf16" in message


def test_a_cluster_that_does_not_answer(refused):
    message = refused("submit", "demo-sft", "--address", "http://127.0.0.1:9")
    assert "no Ray cluster answers at http://127.0.0.1:9" in message and "ray start --head" in message


def test_a_service_is_not_trained(refused):
    message = refused("submit", "serve", "reward.model.path=org/name", "--address", "http://127.0.0.1:9")
    assert "serve" in message and "rlhf-ray serve" in message


def test_check_says_what_it_could_not_look_at(here, capsys):
    assert main(["check", "hh-rm", "data.path=org/rows", "reward.model={path: org/model}"]) == 0
    assert (
        "not looked at, since only a hub has it: reward.model.path org/model, data.path org/rows"
        in capsys.readouterr().err
    )
    (here / "rows.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    assert main(["check", "hh-rm", "data.path=rows.jsonl"]) == 0
    assert "not looked at" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ppo.steps=many", "sft.epochz=2"], "sft.epochz: unknown key; did you mean epochs?"),
        (["ppo.steps=many", "sft.epochz=2"], "ppo.steps: 'many' is not a whole number"),
        (["ppo.algo.kl.init_coef=0.1"], "ppo.algo.kl.init_coef: OpenRLHF's algo.kl.init_coef is algorithm.kl.coefficient here"),
        (["steps=10"], "steps=10: a setting of the demo begins with the job that it is for, sft, rm or ppo"),
        (["foo.x=1"], "foo.x=1: a setting of the demo begins with the job that it is for, sft, rm or ppo"),
        (["ppo.nosuch=1"], "ppo.nosuch: unknown key"),
        (["rm.data.world=null", "rm.data.path=p.jsonl", "rm.data.evaluation_fraction=0.1"], "rm.data.world: null, but"),
        (["--algo.kl.init_coef", "0.1"], "--algo.kl.init_coef: a setting of the demo begins with the job that it is for"),
    ],
)  # fmt: skip
def test_settings_of_the_demo_are_checked_before_its_first_job(refused, words, message):
    assert message in refused("demo", *words)
