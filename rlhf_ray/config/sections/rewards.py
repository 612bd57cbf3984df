"""The ``reward`` section of a PPO job: where rewards come from, alone or as a weighted mixture.

Invariant: a reward comes from exactly one place; a key that belongs to another place than the one that is set is refused,
not ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.sections.base import FreeValues, NonNegativeFloat, Positive, PositiveFloat, Section
from rlhf_ray.config.sections.engine import EngineConfig, PlacementConfig, ResourcesConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import Form, RoleConfig, ScoredToken, Scorer, ScoringRole
from rlhf_ray.rows.labels import Compared
from rlhf_ray.user_code import REWARD_SOURCES, spelling_problem

WORLD_FUNCTIONS = ("world.gold", "world.arithmetic")
FROM_ENVIRONMENT = "environment"
"""As a reward function: the rewards that ``rollout.environment`` gave."""
SHIPPED_FUNCTIONS = ("gsm8k", "exact_match", *WORLD_FUNCTIONS)
"""Reward functions that this project brings."""
COMPARED: Mapping[str, Compared] = {"gsm8k": "number", "exact_match": "text", "world.arithmetic": "text"}
"""What those that verify an answer compare of its label."""
VERIFIERS = "rlhf_ray.rewards.verifiers:"
"""Where those of them that know nothing of the world are defined, in front of their names."""
PLACES = ("model", "function", "url", "source")
"""The keys that say where rewards come from; one of them is set."""


class RewardSourceConfig(Section):
    """One place that rewards come from: ``model`` (then also a role, like every other), ``function``, ``url`` or ``source``."""

    model: ModelConfig | None = None
    engine: EngineConfig = EngineConfig()
    ranks: Positive = 1
    resources: ResourcesConfig = ResourcesConfig()
    placement: PlacementConfig = PlacementConfig()
    max_tokens_per_micro_batch: Positive | None = None
    scorer: Scorer = "packed"
    form: Form | None = None
    scored_token: ScoredToken | None = None
    function: str | None = None
    """``package.module:name``, ``path.py:name``, one of :data:`SHIPPED_FUNCTIONS`, or :data:`FROM_ENVIRONMENT`."""
    url: str | None = None
    """``http://host:port`` of a scoring backend (``rlhf-ray serve``)."""
    source: str | None = None
    """A reward source of the user's own: ``package.module:name``, ``path.py:name``, or an installed entry point."""
    parameters: FreeValues = {}  # noqa: RUF012 (pydantic copies it)
    """What ``source`` is made with."""
    token_file: str | None = None
    normalize: bool = False
    timeout_s: PositiveFloat = 60.0
    samples_per_call: Positive | None = None

    @property
    def role(self) -> ScoringRole | None:
        """The reward model as a role; none where the rewards come from somewhere else."""
        if self.model is None:
            return None
        values = {key: value for key, value in self.__dict__.items() if key in ScoringRole.model_fields}
        return ScoringRole.with_gaps(values, ScoringRole.model_fields.keys() - values.keys())  # its parts are validated

    @property
    def places(self) -> list[str]:
        """The keys of the places that are set; a valid section has one."""
        return [name for name in PLACES if getattr(self, name) is not None]

    def conflicts(self) -> Iterator[tuple[str, str]]:
        function, url = self.function, self.url
        problem = spelling_problem(function, (*SHIPPED_FUNCTIONS, FROM_ENVIRONMENT)) if function is not None else None
        if problem is not None:
            yield "function", problem
        yield from self._own_source_conflicts()
        if url is not None and "@" in url:  # the value is not repeated: it would stand in logs
            yield (
                "url",
                "it holds a password, which config.yaml and reports would show: write it into a file, give token_file",
            )
        elif url is not None and not url.startswith(("http://", "https://")):
            yield "url", f"{url!r} is not the address of a scoring backend: write http://host:port"
        if self.token_file is not None and url is None:
            yield "token_file", "it holds the token of a scoring backend: set url too, or remove it"
        if self.normalize and function is not None:
            yield "normalize", "the mean and deviation stand in a reward model's directory: a function has none"
        if self.scorer != "packed" and self.role is None:
            yield "scorer", f"{self.scorer} runs a reward model: set model too, or remove it"
        for key in ("form", "scored_token"):
            if getattr(self, key) is not None and self.role is None:
                yield key, f"{getattr(self, key)} says how a reward model is read: set model too, or remove it"
        if self.role is not None:
            yield from self.role.conflicts()
        if self.samples_per_call is not None and self.model is not None:
            yield "samples_per_call", "a reward model forms its batches by tokens: set max_tokens_per_micro_batch"

    def _own_source_conflicts(self) -> Iterator[tuple[str, str]]:
        if self.source is None:
            if self.parameters:
                yield "parameters", "they are for a reward source of your own: set source to one, or remove them"
            return
        problem = spelling_problem(self.source, (), REWARD_SOURCES)
        if problem is not None:
            yield "source", problem
        if self.normalize:
            yield (
                "normalize",
                "the mean and deviation stand in a reward model's directory: a source of your own has none",
            )
        if self.samples_per_call is not None:
            yield "samples_per_call", "a source of your own is asked for all samples of a step at once: remove it"


class RewardTermConfig(RewardSourceConfig):
    """One term of a mixture: the reward is the sum of ``weight`` times the reward of each."""

    weight: float = 1.0

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if len(self.places) != 1:
            yield "", "set exactly one of model, function, url and source"
        if self.weight == 0.0:
            yield "weight", "0 leaves the term without effect: remove it, or give it a weight"
        yield from super().conflicts()


class RewardConfig(RewardSourceConfig):
    """The whole section: one place, or a weighted mixture of several."""

    mixture: dict[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")], RewardTermConfig] = {}  # noqa: RUF012 (pydantic copies it)
    """Terms by their names; the metric ``reward_term/NAME`` is the mean of each."""
    on_failure: Literal["drop", "stop"] = "stop"
    """Whether a prompt without a reward is left out of the step, or ends the run."""
    hold_s: NonNegativeFloat = 100.0
    """Seconds for which a reward that failed is asked for again."""
    max_dropped_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Largest share of a step's prompts that ``on_failure: drop`` may leave out."""

    @property
    def sources(self) -> Mapping[str, RewardSourceConfig]:
        """Every place by the key of its section: ``reward``, or ``reward.mixture.NAME`` for each term.

        Of a section that is partial, or that names several places, all that is there, so that each can be checked.
        """
        terms = {f"reward.mixture.{name}": term for name, term in self.__dict__.get("mixture", {}).items()}
        has_place = any(self.__dict__.get(name) is not None for name in PLACES)
        return {"reward": self, **terms} if has_place or not terms else terms

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each place in the reward, by the key of its section; a single place has weight 1."""
        if self.mixture:
            return {f"reward.mixture.{name}": term.weight for name, term in self.mixture.items()}
        return {"reward": 1.0}

    @property
    def roles(self) -> dict[str, RoleConfig]:
        """Every reward model as a role, by the key of its section."""
        with_model = {key: source for key, source in self.sources.items() if "model" in source.__dict__}
        roles = {key: source.role for key, source in with_model.items()}
        return {key: role for key, role in roles.items() if role is not None}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        places = [*self.places, *(["mixture"] if self.mixture else [])]
        if len(places) != 1:
            suffix = f", found {' and '.join(places)}" if places else ""
            yield (
                "",
                f"set exactly one of model (a reward model), function (Python), url (a scoring backend), source (Python) and "
                f"mixture{suffix}",
            )
        yield from super().conflicts()
