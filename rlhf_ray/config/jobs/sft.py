"""The job ``sft``: supervised fine-tuning of a policy on demonstrations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from rlhf_ray.config.checks.data import compares_with_no_label, has_no_pairs_to_cut
from rlhf_ray.config.facts import Amount, Role, Size, Work, present_roles
from rlhf_ray.config.files.models import length_problems
from rlhf_ray.config.files.rows import template_problems
from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.config.jobs.sizes import epoch_sizes, epochs_done, role_sizes
from rlhf_ray.config.problems import Rule
from rlhf_ray.config.sections.base import PositiveFloat
from rlhf_ray.config.sections.batch import SequenceBatchConfig
from rlhf_ray.config.sections.data import SourceConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.rows.demonstrations import DemonstrationReader


class SftConfig(TrainingJob):
    """Supervised fine-tuning of a policy on demonstrations."""

    trainer: ClassVar[str] = "rlhf_ray.trainers.supervised.sft:train_sft"
    length_key: ClassVar[str] = "epochs"

    kind: Literal["sft"]
    batch: SequenceBatchConfig
    policy: RoleConfig
    epochs: PositiveFloat = 1.0

    def roles(self) -> dict[str, Role]:
        work = Work(
            items=lambda: Amount(self.batch.sequences_per_update, "batch.sequences_per_update"),
            longest=lambda: Amount(self.data.max_tokens, f"data.max_tokens {self.data.max_tokens}"),
            budget=lambda: self.batch,
        )
        return present_roles({"policy": lambda: Role(self.policy, trained=True, head=False, work=work)})

    def rules(self) -> list[Rule]:
        return [
            *super().rules(),
            lambda: has_no_pairs_to_cut(self.data),
            lambda: compares_with_no_label(self.data),
        ]

    def files(self) -> list[Rule]:
        return [
            *super().files(),
            lambda: length_problems("policy.model", self.policy.model, "data.max_tokens", self.data.max_tokens),
            lambda: template_problems(self.policy.model, self.data, self.row_reader),
        ]

    def length_done(self, state: Mapping[str, Any]) -> float:
        return epochs_done(state)

    def row_reader(self, source: SourceConfig) -> DemonstrationReader:
        return self.data.demonstration_reader(source)

    def sizes(self, rows: int | None) -> Iterator[Size]:
        if rows is None and self.data.world is not None:
            rows = self.data.world.demonstrations
        yield from epoch_sizes("sequences", self.batch.sequences_per_update, rows, self.epochs)
        yield Size("longest of the sequences", f"{self.data.max_tokens} tokens", "data.max_tokens")
        yield from role_sizes("policy", self.roles()["policy"], "sequences")
