"""The job ``distill``: a policy learns from a teacher at every token of answers that are there already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from rlhf_ray.config.facts import Role
from rlhf_ray.config.files.models import length_problems
from rlhf_ray.config.files.tokenizers import tokenizer_problems
from rlhf_ray.config.jobs.sft import SftConfig
from rlhf_ray.config.problems import Rule, unless_absent
from rlhf_ray.config.sections.distillation import DistillationConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig


class DistillConfig(SftConfig):
    """Distillation of a teacher into a policy, on demonstrations."""

    trainer: ClassVar[str] = "rlhf_ray.trainers.supervised.sft:train_distill"

    kind: Literal["distill"]  # type: ignore[assignment]
    teacher: ModelConfig
    """Lies frozen beside the policy on each of its ranks."""
    loss: DistillationConfig = DistillationConfig()

    def roles(self) -> dict[str, Role]:
        teacher = unless_absent(lambda: self.teacher, None)
        return {key: replace(role, beside=teacher) for key, role in super().roles().items()}

    def model_sections(self) -> Iterator[tuple[str, ModelConfig]]:
        yield from super().model_sections()
        teacher = unless_absent(lambda: self.teacher, None)
        if teacher is not None:
            yield "teacher", teacher

    def files(self) -> list[Rule]:
        return [
            *super().files(),
            lambda: tokenizer_problems(
                self.policy.model, {"teacher": RoleConfig.with_gaps({"model": self.teacher}, ())}
            ),
            lambda: length_problems("teacher", self.teacher, "data.max_tokens", self.data.max_tokens),
        ]
