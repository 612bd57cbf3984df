"""The job ``serve``: reward models served over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf_ray.config.checks.service import open_ports_have_keys
from rlhf_ray.config.facts import Placement, Role, Size, present_roles
from rlhf_ray.config.files.places import token_problems
from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.problems import Problem, Rule, unless_absent
from rlhf_ray.config.sections.base import Positive
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.service import ServiceConfig


class ServeConfig(Job, ServiceConfig):
    """Reward models served over HTTP."""

    command: ClassVar[str] = "rlhf-ray serve MODEL"

    kind: Literal["serve"]
    reward: ScoringRole
    name: Annotated[str, Field(min_length=1)] = "reward"
    """What requests may call it, besides its path."""
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z][\w.-]*$")], ScoringRole] = {}  # noqa: RUF012 (pydantic copies it)
    """Further models, by the names that requests call them."""
    replicas: Positive = 1
    max_tokens: Positive = 4096
    refuse_markers: bool = False
    """Refuse conversations, and prompts with responses, whose texts hold special tokens or what the template writes between
    turns: they would be read as turns that nobody had."""

    @property
    def served(self) -> dict[str, ScoringRole]:
        """Every model by its name, the one for requests that name none first."""
        return {self.name: self.reward, **self.models}

    def serving(self, name: str, role: ScoringRole) -> ServeConfig:
        """The same with another model under a name that is served."""
        if name == self.name:
            return self.model_copy(update={"reward": role})
        return self.model_copy(update={"models": {**self.models, name: role}})

    def roles(self) -> dict[str, Role]:
        further: dict[str, ScoringRole] = unless_absent(lambda: self.models, {})
        return present_roles({"reward": lambda: Role(self.reward)}) | {
            f"models.{name}": Role(role) for name, role in further.items()
        }

    def placements(self) -> list[Placement]:
        return [
            Placement(name, role.ranks * self.replicas, role.resources, role.placement)
            for name, role in self.served.items()
        ]

    def longest_sequence(self) -> int:
        return self.max_tokens

    def rules(self) -> list[Rule]:
        return [*super().rules(), self._named_once, lambda: open_ports_have_keys(self), self._requests_fit]

    def files(self) -> list[Rule]:
        return [*super().files(), lambda: token_problems("token_file", self.token_file)]

    def sizes(self, rows: int | None) -> Iterator[Size]:
        yield Size("tokens per batch", str(self.max_batch_tokens), "max_batch_tokens")
        yield Size("items that may wait", str(self.max_queue_items), "max_queue_items")

    def _named_once(self) -> Iterator[Problem]:
        if self.name in self.models:
            yield "name", f"{self.name} is also one of models: give the first model another name"

    def _requests_fit(self) -> Iterator[Problem]:
        if self.max_tokens > self.max_batch_tokens:
            yield (
                "max_batch_tokens",
                f"{self.max_batch_tokens} does not hold one item of max_tokens {self.max_tokens}: raise it to that",
            )
