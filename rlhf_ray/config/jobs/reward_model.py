"""The job ``rm``: training a reward model on preference pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from rlhf_ray.config.checks.data import (
    compares_with_no_label,
    has_pairs_to_learn,
    learns_no_demonstrations,
    says_what_is_held_out,
)
from rlhf_ray.config.facts import Amount, Role, Size, Work, present_roles
from rlhf_ray.config.files.models import length_problems
from rlhf_ray.config.files.rows import demonstration_problems, loss_problems, template_problems
from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.config.jobs.sizes import epoch_sizes, epochs_done, role_sizes
from rlhf_ray.config.problems import Problem, Rule
from rlhf_ray.config.sections.base import PositiveFloat
from rlhf_ray.config.sections.batch import PairBatchConfig
from rlhf_ray.config.sections.data import SourceConfig
from rlhf_ray.config.sections.evaluation import RewardEvaluationConfig
from rlhf_ray.config.sections.reward_training import NormalizationConfig, RewardLossConfig, RewardTrainingRole
from rlhf_ray.rows.preferences import PreferenceReader


class RewardModelConfig(TrainingJob):
    """Training a reward model on preference pairs."""

    trainer: ClassVar[str] = "rlhf_ray.trainers.supervised.reward_model:train_reward_model"
    length_key: ClassVar[str] = "epochs"

    kind: Literal["rm"]
    batch: PairBatchConfig
    reward: RewardTrainingRole
    loss: RewardLossConfig = RewardLossConfig()
    normalization: NormalizationConfig = NormalizationConfig()
    epochs: PositiveFloat = 1.0
    save: Literal["merged", "adapter"] = "merged"
    """What of a model with LoRA is written: whole weights with the adapter merged into them, or adapter and head alone."""
    evaluation: RewardEvaluationConfig = RewardEvaluationConfig()

    def roles(self) -> dict[str, Role]:
        work = Work(
            items=lambda: Amount(self.batch.pairs_per_update, "batch.pairs_per_update"),
            longest=self._longest_pair,
            budget=lambda: self.batch,
        )
        return present_roles({"reward": lambda: Role(self.reward, trained=True, head=True, work=work)})

    def rules(self) -> list[Rule]:
        return [
            *super().rules(),
            lambda: has_pairs_to_learn(self.data),
            lambda: compares_with_no_label(self.data),
            lambda: learns_no_demonstrations(self.data),
            lambda: says_what_is_held_out(self.data),
            self._saves_what_is_there,
            self._normalizes_over_what_is_there,
        ]

    def files(self) -> list[Rule]:
        return [
            *super().files(),
            lambda: demonstration_problems(
                "normalization.demonstrations_path", self.normalization.demonstrations_path, self.data
            ),
            lambda: loss_problems(self.loss, self.data),
            lambda: template_problems(self.reward.model, self.data, self.row_reader),
            lambda: length_problems("reward.model", self.reward.model, "data.max_tokens", self.data.max_tokens),
        ]

    def length_done(self, state: Mapping[str, Any]) -> float:
        return epochs_done(state)

    def further_data_paths(self) -> Iterator[tuple[str, str]]:
        if self.normalization.demonstrations_path is not None:
            yield "normalization.demonstrations_path", self.normalization.demonstrations_path

    def row_reader(self, source: SourceConfig) -> PreferenceReader:
        return self.data.preference_reader(source)

    def sizes(self, rows: int | None) -> Iterator[Size]:
        if rows is None and self.data.world is not None:
            rows = self.data.world.pairs
        yield from epoch_sizes("pairs", self.batch.pairs_per_update, rows, self.epochs)
        yield Size("longest of the pairs", f"{self._longest_pair().value} tokens", "data.max_tokens x 2")
        yield from role_sizes("reward", self.roles()["reward"], "pairs")

    def _longest_pair(self) -> Amount:
        tokens = self.data.max_tokens
        return Amount(2 * tokens, f"the two sides of a pair, data.max_tokens {tokens} each")

    def _saves_what_is_there(self) -> Iterator[Problem]:
        model = self.reward.model
        if self.save == "adapter" and (model.lora is None or model.path is None):
            lacks = (
                "reward.model.lora is null: there is no adapter" if model.lora is None else "a made model lies nowhere"
            )
            yield "save", f"adapter leaves the base where it lies, but {lacks}; set it to merged"

    def _normalizes_over_what_is_there(self) -> Iterator[Problem]:
        normalization = self.normalization
        if normalization.over != "demonstrations" or self.data.world is not None:
            return
        if normalization.demonstrations_path is None:
            yield "normalization.demonstrations_path", "missing: name a file whose rows have a prompt and an answer"
