"""A new kind of job is one new file and one line of registration: nothing else knows kinds by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.config.jobs import registry
from rlhf_ray.config.jobs.registry import KINDS, JobKind, job_classes, trained_kinds
from rlhf_ray.config.loading import dump_config, load_config, parse_config
from rlhf_ray.config.preflight import hub_ids
from rlhf_ray.errors import ConfigError, RequestError
from rlhf_ray.launch.driver import continue_run, train_new_run
from rlhf_ray.runs import inputs

TOY_JOB = '''
"""The job ``toy``: a student that imitates a teacher, as far as a test needs it."""

from typing import ClassVar, Literal

from rlhf_ray.config.facts import Amount, Role, Size, Work, present_roles
from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.config.sections.base import Positive
from rlhf_ray.config.sections.batch import SequenceBatchConfig
from rlhf_ray.config.sections.roles import RoleConfig


class ToyConfig(TrainingJob):
    trainer: ClassVar[str] = "toy_job:train"

    kind: Literal["toy"]
    batch: SequenceBatchConfig
    student: RoleConfig
    teacher: RoleConfig
    lessons: Positive = 1

    def roles(self):
        work = Work(
            items=lambda: Amount(self.batch.sequences_per_update, "batch.sequences_per_update"),
            longest=lambda: Amount(self.data.max_tokens, "data.max_tokens"),
            budget=lambda: self.batch,
        )
        return present_roles(
            {
                "student": lambda: Role(self.student, trained=True, head=False, work=work),
                "teacher": lambda: Role(self.teacher, head=False, work=work),
            }
        )

    def rules(self):
        return [*super().rules(), self._lessons_go_round]

    def row_reader(self, source):
        return self.data.prompt_reader(source)

    def sizes(self, rows):
        yield Size("lessons", str(self.lessons), "lessons")

    def _lessons_go_round(self):
        if self.lessons < self.student.ranks:
            yield "lessons", f"{self.lessons} are too few for {self.student.ranks} ranks: raise it"


def train(config, run, checkpoint, *, place=None):
    run.metrics.append({"step": config.lessons, "timestamp": 0.0})
    (run.path / "place").write_text(f"{type(config).__name__} {checkpoint} {place}")
'''
CONFIG = """
kind: toy
run: {name: small}
student: {model: {path: org/student}, engine: {optimizer: {learning_rate: 1e-3}}}
teacher: {model: {path: org/teacher}, ranks: 2}
data: {path: rows.jsonl}
batch: {sequences_per_update: 8}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The config of a toy job, whose kind is registered as every other is."""
    (tmp_path / "toy_job.py").write_text(TOY_JOB)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p"}\n')
    (tmp_path / "toy.yaml").write_text(CONFIG)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(registry.KINDS, "toy", JobKind("toy_job:ToyConfig"))
    yield tmp_path / "toy.yaml"
    sys.modules.pop("toy_job", None)


def test_it_loads_and_comes_back_from_its_own_dump(toy):
    config = load_config(toy, kind="toy")
    assert parse_config(dump_config(config)) == config
    assert hub_ids(config) == ["org/student", "org/teacher"]


def test_it_is_checked_with_everything_that_is_wrong_at_once(toy, capsys):
    assert (
        main(["check", str(toy), "lessons=many", "student.rank=3", "teacher.ranks=9", "data.path=nowhere.jsonl"]) == 2
    )
    message = capsys.readouterr().err
    for problem in (
        "lessons: 'many' is not a whole number above 0",
        "student.rank: unknown key; did you mean student.ranks?",
        "teacher.ranks: 9 ranks cannot share 8 (batch.sequences_per_update)",
        "data.path: nowhere.jsonl does not exist",
    ):
        assert problem in message
    with pytest.raises(ConfigError, match="lessons: 1 are too few for 2 ranks"):
        load_config(toy, ["student.ranks=2"])
    with pytest.raises(ConfigError, match=r"teacher\.engine\.optimizer: this job does not train the teacher"):
        load_config(toy, ["teacher.engine.optimizer.learning_rate=1e-3"])


def test_it_is_planned(toy, capsys):
    assert main(["plan", str(toy), "lessons=5"]) == 0
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["lessons", "5", "lessons"] in lines
    assert ["student", "1", "1", "0", "1", "0"] in lines and ["teacher", "2", "1", "0", "2", "0"] in lines


def test_it_is_trained_and_resumed(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "fingerprint_inputs", lambda config: {})  # would ask the hub
    train_new_run(dump_config(load_config(toy, ["lessons=4"])))
    run = tmp_path / "runs" / "small"
    assert (run / "place").read_text() == "ToyConfig None None"
    assert '"step": 4' in (run / "metrics.jsonl").read_text().replace('"step":4', '"step": 4')
    (run / "place").unlink()
    continue_run(str(run))
    assert (run / "place").exists()


def test_the_command_line_offers_it(toy, capsys):
    with pytest.raises(SystemExit):
        main(["train", "toi", str(toy)])
    assert "toy" in capsys.readouterr().err


def test_kinds_that_train_are_those_that_the_registry_says():
    for kind, job in job_classes().items():
        assert job.kind_name() == kind
        assert KINDS[kind].trains == (kind in trained_kinds()) == hasattr(job, "trainer")


def test_a_kind_that_does_not_train_names_the_command_that_runs_it(texts):
    with pytest.raises(RequestError, match="kind serve is not trained: run it with rlhf-ray serve MODEL"):
        parse_config(texts["serve"]).to_train()
    assert parse_config(texts["sft"]).to_train().kind == "sft"
