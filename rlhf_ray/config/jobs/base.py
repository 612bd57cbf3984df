"""What every kind of job has, and what it must say about itself.

Invariants: checks, planning and the launch ask a job for its facts and never for its kind; what they ask for works on a
partial config too, as far as its values go.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, get_args

from rlhf_ray.config.checks.colocation import only_ppo_takes_turns
from rlhf_ray.config.checks.one_process import no_role_scores_in_vllm
from rlhf_ray.config.checks.roles import repeats_exactly, role_rules
from rlhf_ray.config.checks.shared_gpus import SharedGpus, ranks_have_gpus_of_their_own
from rlhf_ray.config.facts import Placement, Role, Sampling, Size
from rlhf_ray.config.files.architectures import architecture_problems
from rlhf_ray.config.files.encoders import encoder_problems
from rlhf_ray.config.files.models import model_problems
from rlhf_ray.config.files.places import root_problems
from rlhf_ray.config.files.reward_record import record_problems
from rlhf_ray.config.files.rows import data_paths, data_problems
from rlhf_ray.config.files.score_heads import head_problems
from rlhf_ray.config.problems import Problem, Rule, unless_absent
from rlhf_ray.config.sections.base import Section
from rlhf_ray.config.sections.data import DataConfig, SourceConfig
from rlhf_ray.config.sections.evaluation import EvaluationConfig
from rlhf_ray.config.sections.guards import GuardsConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.run import CheckpointConfig, ClusterConfig, MonitoringConfig, RunConfig
from rlhf_ray.config.trackers import missing_packages
from rlhf_ray.errors import RequestError
from rlhf_ray.rows.read import RowReader


class Job(Section):
    """One kind of job. A subclass narrows ``kind`` to its name, adds sections, and says what it does with them."""

    command: ClassVar[str]
    """The command line that runs such a job."""
    takes_turns: ClassVar[bool] = False
    """Whether its roles can take turns on the same GPUs."""

    kind: str
    run: RunConfig
    cluster: ClusterConfig = ClusterConfig()

    @classmethod
    def kind_name(cls) -> str:
        """The value of ``kind`` in a config of this class."""
        (name,) = get_args(cls.model_fields["kind"].annotation)
        return str(name)

    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """Every model that runs, by the key of its section, and what the job does with it."""

    @abstractmethod
    def sizes(self, rows: int | None) -> Iterator[Size]:
        """The batch arithmetic, line by line; ``rows`` is the number of training rows where it is known."""

    def rules(self) -> list[Rule]:
        """The rules between the sections of the job. They read values alone, no file."""
        return [*role_rules(self.roles()), self._gpu_problems, self._takes_no_turns]

    def files(self) -> list[Rule]:
        """The rules about what the job needs to find on this machine."""
        own_data = [path for _, path in self.data_paths()]
        models: list[Rule] = [partial(model_problems, key, model, own_data) for key, model in self.model_sections()]
        roles = [(key, role) for key, role in self.roles().items() if not role.derived]
        return [
            *models,
            *(
                partial(rule, key, role)
                for key, role in roles
                for rule in (encoder_problems, head_problems, record_problems)
            ),
            *(partial(self._architecture_problems, key, role) for key, role in roles),
        ]

    def _gpu_problems(self) -> Iterator[Problem]:
        return ranks_have_gpus_of_their_own(self.roles(), self.shared_gpus())

    def _takes_no_turns(self) -> Iterator[Problem]:
        if not self.takes_turns:
            yield from only_ppo_takes_turns(self.cluster, self.kind)

    def _architecture_problems(self, key: str, role: Role) -> Iterator[Problem]:
        return architecture_problems(key, role, self.longest_sequence())

    @abstractmethod
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that the models of the job read."""

    def placements(self) -> list[Placement]:
        """What the cluster must find room for, role by role."""
        return [
            Placement(key, role.config.ranks, role.config.resources, role.config.placement)
            for key, role in self.roles().items()
        ]

    def shared_gpus(self) -> SharedGpus | None:
        """The GPUs that the ranks of several roles share; none where every rank is placed by itself."""
        return None

    def tells_ray(self) -> bool:
        """Whether its ranks send metrics of their own to Ray."""
        return False

    def sampling(self) -> Sampling | None:
        """The engines that sample from a model of the job; none where nothing is sampled."""
        return None

    def model_sections(self) -> Iterator[tuple[str, ModelConfig]]:
        """The key and the value of every ``model`` section that is there."""
        for key, role in self.roles().items():
            model = _present_model(role)
            if model is not None and not role.derived:
                yield f"{key}.model", model

    def data_paths(self) -> Iterable[tuple[str, str]]:
        """The key and the value of every path or hub id of rows that is there."""
        return ()

    def to_train(self) -> TrainingJob:
        """The job itself if it trains; raises :class:`RequestError` with the command that runs it otherwise."""
        raise RequestError(f"a config of kind {self.kind} is not trained: run it with {self.command}")


class TrainingJob(Job):
    """A job that trains a model: it reads rows, commits checkpoints, and leaves a run directory."""

    command: ClassVar[str] = "rlhf-ray train KIND CONFIG"
    trainer: ClassVar[str]
    """What trains it, as ``module:function``; it is called with the job, its run directory and a checkpoint."""
    length_key: ClassVar[str] = ""
    """The key that says how long the run is, by which a finished run is trained further; empty where it cannot be."""

    data: DataConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    guards: GuardsConfig = GuardsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitoring: MonitoringConfig = MonitoringConfig()

    def tells_ray(self) -> bool:
        return self.monitoring.ray_metrics

    def length_done(self, state: Mapping[str, Any]) -> float:
        """How much of the run is behind the driver's state in a checkpoint, in the unit of ``length_key``."""
        return 0.0

    @abstractmethod
    def row_reader(self, source: SourceConfig) -> RowReader[Any]:
        """What the job reads the rows of ``source`` with."""

    def longest_sequence(self) -> int:
        return self.data.max_tokens

    def rules(self) -> list[Rule]:
        own = role_rules(self.roles(), lambda key, role: repeats_exactly(key, role, self.run))
        return [*own, self._gpu_problems, self._takes_no_turns]

    def one_process_rules(self) -> list[Rule]:
        """The rules of ``rlhf-ray train --in-process``: what cannot share a process with a training engine."""
        return [lambda: no_role_scores_in_vllm(self.roles())]

    def files(self) -> list[Rule]:
        own = [self._data_problems, lambda: root_problems(self.run), lambda: missing_packages(self.monitoring.trackers)]
        return [*super().files(), *own]

    def data_paths(self) -> Iterable[tuple[str, str]]:
        data = unless_absent(lambda: self.data, None)
        return () if data is None else data_paths(data)

    def further_data_paths(self) -> Iterable[tuple[str, str]]:
        """The key and the path of every file of rows outside the ``data`` section."""
        return ()

    def to_train(self) -> TrainingJob:
        return self

    def _data_problems(self) -> Iterator[Problem]:
        return data_problems(self.data, self.row_reader)


def _present_model(role: Role) -> ModelConfig | None:
    return unless_absent(lambda: role.config.model, None)
