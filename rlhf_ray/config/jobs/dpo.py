"""The job ``dpo``: training a policy on preferences directly, by DPO and its relatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from rlhf_ray.config.checks.data import compares_with_no_label, has_pairs_to_learn, says_what_is_held_out
from rlhf_ray.config.facts import Amount, Role, Size, Work, present_roles
from rlhf_ray.config.files.models import length_problems
from rlhf_ray.config.files.rows import template_problems
from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.config.jobs.sizes import epoch_sizes, epochs_done, role_sizes
from rlhf_ray.config.problems import Problem, Rule
from rlhf_ray.config.sections.base import PositiveFloat
from rlhf_ray.config.sections.batch import PreferenceBatchConfig
from rlhf_ray.config.sections.data import SourceConfig
from rlhf_ray.config.sections.evaluation import PreferenceEvaluationConfig
from rlhf_ray.config.sections.policy_training import PolicyLossConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.rows.judged import JudgedReader
from rlhf_ray.rows.preferences import PreferenceReader


class DpoConfig(TrainingJob):
    """Training a policy on preference pairs, or on single answers with labels."""

    trainer: ClassVar[str] = "rlhf_ray.trainers.supervised.dpo:train_dpo"
    length_key: ClassVar[str] = "epochs"

    kind: Literal["dpo"]
    batch: PreferenceBatchConfig
    policy: RoleConfig
    loss: PolicyLossConfig = PolicyLossConfig()
    epochs: PositiveFloat = 1.0
    evaluation: PreferenceEvaluationConfig = PreferenceEvaluationConfig()

    def roles(self) -> dict[str, Role]:
        work = Work(
            items=lambda: Amount(self.batch.per_update, f"batch.{self._size_key()}"),
            longest=self._longest_item,
            budget=lambda: self.batch,
        )
        return present_roles({"policy": lambda: Role(self.policy, trained=True, head=False, work=work)})

    def rules(self) -> list[Rule]:
        return [
            *super().rules(),
            lambda: has_pairs_to_learn(self.data),
            lambda: says_what_is_held_out(self.data),
            lambda: compares_with_no_label(self.data) if self.loss.reads_pairs else (),
            self._counts_what_the_loss_reads,
        ]

    def files(self) -> list[Rule]:
        return [
            *super().files(),
            lambda: template_problems(self.policy.model, self.data, self.row_reader),
            lambda: length_problems("policy.model", self.policy.model, "data.max_tokens", self.data.max_tokens),
        ]

    def length_done(self, state: Mapping[str, Any]) -> float:
        return epochs_done(state)

    def row_reader(self, source: SourceConfig) -> PreferenceReader | JudgedReader:
        return self.data.preference_reader(source) if self.loss.reads_pairs else self.data.judged_reader(source)

    def sizes(self, rows: int | None) -> Iterator[Size]:
        items = "pairs" if self.loss.reads_pairs else "answers"
        if rows is None and self.data.world is not None:
            rows = self.data.world.pairs * (1 if self.loss.reads_pairs else 2)
        yield from epoch_sizes(items, self.batch.per_update, rows, self.epochs)
        longest = self._longest_item()
        yield Size(f"longest of the {items}", f"{longest.value} tokens", longest.origin)
        yield from role_sizes("policy", self.roles()["policy"], items)

    def _size_key(self) -> str:
        return "pairs_per_update" if self.loss.reads_pairs else "answers_per_update"

    def _longest_item(self) -> Amount:
        tokens = self.data.max_tokens
        if self.loss.reads_pairs:
            return Amount(2 * tokens, f"the two sides of a pair, data.max_tokens {tokens} each")
        return Amount(tokens, f"data.max_tokens {tokens}")

    def _counts_what_the_loss_reads(self) -> Iterator[Problem]:
        key, name = self._size_key(), self.loss.name
        if getattr(self.batch, key) is None:
            other = "answers_per_update" if self.loss.reads_pairs else "pairs_per_update"
            what = "pairs" if self.loss.reads_pairs else "single answers with labels"
            yield f"batch.{other}", f"loss.name {name} reads {what}: set batch.{key} instead, and batch.{other}=null"
