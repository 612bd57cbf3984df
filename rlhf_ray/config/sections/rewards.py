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
NO_REWARD = "none"
"""As a reward function: 0 for every answer, for a policy that learns from a teacher alone."""
SHIPPED_FUNCTIONS = ("gsm8k", "exact_match", *WORLD_FUNCTIONS)
"""Reward functions that this project brings."""
COMPARED: Mapping[str, Compared] = {"gsm8k": "number", "exact_match": "text", "world.arithmetic": "text"}
"""What those that verify an answer compare of its label."""
VERIFIERS = "rlhf_ray.rewards.verifiers:"
"""Where those of them that know nothing of the world are defined, in front of their names."""
PLACES = ("model", "ensemble", "function", "url", "source", "judge")
"""The keys that say where rewards come from; one of them is set."""


PartName = Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]
SENT = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "n", "stream")
"""Fields of a request to a judge that have keys of their own, or that would change what comes back."""


class RubricPartConfig(Section):
    """One respect in which a judge scores answers."""

    asks: str
    """What a good answer does in this respect, in words for the judge."""
    weight: float
    gate: float | None = None
    """A score below it makes the whole reward ``floor``."""


class JudgeConfig(Section):
    """A language model behind an endpoint that speaks OpenAI's chat completions, and what it is asked of an answer."""

    url: str
    """What ``/chat/completions`` is added to, such as ``https://api.openai.com/v1``."""
    model: str
    key_variable: str | None = "OPENAI_API_KEY"
    """The environment variable that holds the key, where ``token_file`` beside the judge names no file; null for an endpoint
    that asks for none."""
    rubric: str | None = None
    """What makes an answer good, in words for the judge."""
    parts: dict[PartName, RubricPartConfig] = {}  # noqa: RUF012 (pydantic copies it)
    """Respects that are scored one by one in one reply, by their names."""
    reference: bool = False
    """Whether the label of the prompt is shown as a right answer."""
    scale: tuple[float, float] = Field(default=(0.0, 10.0), strict=False)
    floor: float = 0.0
    """The reward where a gate of ``parts`` is not passed."""
    compare: Literal["pairs", "circle", "all"] | None = None
    """Which answers to a prompt are compared with each other, in the place of a score for each by itself."""
    ranking: Literal["win_share", "bradley_terry"] = "win_share"
    """What becomes of the comparisons."""
    both_orders: bool = True
    """Whether two answers are compared twice, each of them once shown first."""
    temperature: NonNegativeFloat | None = 0.0
    max_answer_tokens: Positive = 512
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    parameters: FreeValues = {}  # noqa: RUF012 (pydantic copies it)
    """Further fields of each request."""
    concurrency: Positive = 16
    tries: Positive = 3
    max_requests: Positive | None = None
    max_tokens: Positive | None = None
    max_cost: PositiveFloat | None = None
    prompt_price: NonNegativeFloat = 0.0
    """Money for a million tokens of what is asked."""
    reply_price: NonNegativeFloat = 0.0

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if "@" in self.url:  # the value is not repeated: it would stand in logs
            yield (
                "url",
                "it holds a password, which config.yaml and reports would show: give token_file or key_variable",
            )
        elif "?" in self.url or "#" in self.url:  # nor here: keys stand there
            yield (
                "url",
                "/chat/completions cannot follow what stands after ? or #: end it before them, and give a key by key_variable",
            )
        elif not self.url.startswith(("http://", "https://")):
            yield "url", f"{self.url!r} is not the address of an endpoint: write one such as https://api.openai.com/v1"
        if not self.model:
            yield "model", "it is empty: name a model that the endpoint serves"
        if self.rubric is None and not self.parts and not self.reference:
            yield "", "nothing says what makes an answer good: set rubric, parts, or reference to true"
        yield from self._number_conflicts()
        yield from self._comparison_conflicts()
        if self.max_cost is not None and self.prompt_price == self.reply_price == 0.0:
            yield "max_cost", f"{self.max_cost:g} is never reached without prices: set prompt_price and reply_price"
        for field in SENT:
            if field in self.parameters:
                yield "parameters", f"{field} is not for you to send: remove it"

    def _comparison_conflicts(self) -> Iterator[tuple[str, str]]:
        if self.compare is None:
            for key in ("ranking", "both_orders"):
                if not self.is_default(key):
                    yield key, f"{getattr(self, key)} is about comparisons of answers: set compare too, or remove it"
            return
        for key in ("parts", "scale"):
            if not self.is_default(key):
                yield key, f"answers are compared ({self.compare}) and have no scores of their own: remove one of them"
        if self.compare == "pairs" and self.ranking == "bradley_terry":
            yield (
                "ranking",
                "bradley_terry sets no answer of one pair against those of another: set compare to circle or all, or ranking "
                "to win_share",
            )

    def _number_conflicts(self) -> Iterator[tuple[str, str]]:
        low, high = self.scale
        if low >= high:
            yield "scale", f"[{low:g}, {high:g}] is no range: give the worst score and then the best, such as [0, 10]"
        if self.parts and all(part.weight == 0.0 for part in self.parts.values()):
            yield "parts", "every weight is 0, so that all answers have one reward: give a part a weight"
        for name, part in self.parts.items():
            if part.gate is not None and not low < part.gate <= high:
                yield (
                    f"parts.{name}.gate",
                    f"{part.gate:g} lets all pass or none: give a score above {low:g}, up to {high:g}",
                )
        if self.floor != 0.0 and all(part.gate is None for part in self.parts.values()):
            yield "floor", f"{self.floor:g} is the reward where a gate is not passed, and no part has one: remove it"


class RewardSourceConfig(Section):
    """One place that rewards come from: a ``model`` (then also a role, like every other), ``function``, ``url``, ``source`` or
    ``judge``."""

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
    """``package.module:name``, ``path.py:name``, one of :data:`SHIPPED_FUNCTIONS`, or one of the two words above."""
    url: str | None = None
    """``http://host:port`` of a scoring backend (``rlhf-ray serve``)."""
    source: str | None = None
    """A reward source of the user's own: ``package.module:name``, ``path.py:name``, or an installed entry point."""
    parameters: FreeValues = {}  # noqa: RUF012 (pydantic copies it)
    """What ``source`` is made with."""
    judge: JudgeConfig | None = None
    ensemble: list[str] = []  # noqa: RUF012 (pydantic copies it)
    """Paths of reward models that score every answer together; with ``model`` that is one more, and they share its settings."""
    reduction: Literal["mean_minus_std", "minimum", "mean", "weights"] = "mean_minus_std"
    """What becomes of their rewards; ``weights``: one model scores, whose weights are the average of theirs."""
    k: NonNegativeFloat = 1.0
    """How many standard deviations ``mean_minus_std`` takes off the mean."""
    token_file: str | None = None
    normalize: bool = False
    timeout_s: PositiveFloat = 60.0
    samples_per_call: Positive | None = None

    @property
    def role(self) -> ScoringRole | None:
        """The reward model as a role, of an ensemble the first; none where the rewards come from somewhere else."""
        return next(iter(self.members.values()), None)

    @property
    def members(self) -> dict[str, ScoringRole]:
        """The reward models as roles: one by the name ``""``, those of an ensemble by ``.ensemble.1`` and so on.

        Where the weights are averaged that is one, of the size of the first.
        """
        values = {key: value for key, value in self.__dict__.items() if key in ScoringRole.model_fields}
        absent = ScoringRole.model_fields.keys() - values.keys()
        values.pop("model", None)
        models, is_one = self.models, self.averages_weights or not self.__dict__.get("ensemble")
        names = [""] if is_one else [f".ensemble.{number}" for number in range(1, len(models) + 1)]
        # their parts are validated
        return {
            name: ScoringRole.with_gaps({**values, "model": one}, absent)
            for name, one in zip(names, models, strict=False)
        }

    @property
    def models(self) -> list[ModelConfig]:
        """The reward models: one, or those of an ensemble; none where the rewards come from somewhere else."""
        model, paths = self.__dict__.get("model"), self.__dict__.get("ensemble", [])
        shared = {} if model is None else {**model.__dict__, "make": None, "revision": None}
        return [
            *([] if model is None else [model]),
            *(
                ModelConfig(path=path) if model is None else ModelConfig.model_construct(**{**shared, "path": path})
                for path in paths
            ),
        ]

    @property
    def averages_weights(self) -> bool:
        """Whether one model scores that is the average of several."""
        return bool(self.__dict__.get("ensemble")) and self.__dict__.get("reduction") == "weights"

    def averaged(self, key: str) -> Iterator[tuple[str, ModelConfig]]:
        """The models that are averaged by the keys of their sections, but for the first, which stands for all as a role."""
        if self.averages_weights:
            yield from ((f"{key}.ensemble.{number}.model", model) for number, model in enumerate(self.models[1:], 2))

    @property
    def places(self) -> list[str]:
        """The keys of the places that are set; a valid section has one. A model beside an ensemble is one of it."""
        found = [name for name in PLACES if getattr(self, name) not in (None, [])]
        return [name for name in found if (name, *found[1:2]) != ("model", "ensemble")]

    def conflicts(self) -> Iterator[tuple[str, str]]:
        function, url = self.function, self.url
        problem = (
            spelling_problem(function, (*SHIPPED_FUNCTIONS, FROM_ENVIRONMENT, NO_REWARD))
            if function is not None
            else None
        )
        if problem is not None:
            yield "function", problem
        yield from self._own_source_conflicts()
        yield from self._judge_conflicts()
        yield from self._ensemble_conflicts()
        if url is not None and "@" in url:  # the value is not repeated: it would stand in logs
            yield (
                "url",
                "it holds a password, which config.yaml and reports would show: write it into a file, give token_file",
            )
        elif url is not None and not url.startswith(("http://", "https://")):
            yield "url", f"{url!r} is not the address of a scoring backend: write http://host:port"
        if self.token_file is not None and url is None and self.judge is None:
            yield "token_file", "it holds the token of a scoring backend or a judge: set url or judge too, or remove it"
        if self.normalize and function is not None:
            yield "normalize", "the mean and deviation stand in a reward model's directory: a function has none"
        if self.scorer != "packed" and self.role is None:
            yield "scorer", f"{self.scorer} runs a reward model: set model too, or remove it"
        for key in ("form", "scored_token"):
            if getattr(self, key) is not None and self.role is None:
                yield key, f"{getattr(self, key)} says how a reward model is read: set model too, or remove it"
        if self.role is not None:
            yield from self.role.conflicts()
        if self.samples_per_call is not None and self.role is not None:
            yield "samples_per_call", "a reward model forms its batches by tokens: set max_tokens_per_micro_batch"

    def _ensemble_conflicts(self) -> Iterator[tuple[str, str]]:
        if not self.ensemble:
            for key in ("reduction", "k"):
                if not self.is_default(key):
                    yield (
                        key,
                        f"{getattr(self, key)} is for an ensemble of reward models: set ensemble too, or remove it",
                    )
            return
        paths = [*self.ensemble, *([self.model.path] if self.model is not None else [])]
        if len(paths) < 2:
            yield "ensemble", f"{self.ensemble[0]} alone is no ensemble: name more models, or write model={{path: ...}}"
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            yield "ensemble", f"{twice} is named twice, and would agree with itself: name each model once"
        if self.model is not None and self.model.path is None:
            yield (
                "ensemble",
                "a model that is made here is none of it: name its directory in model.path, or remove model",
            )
        if self.reduction == "weights" and self.normalize:
            yield (
                "normalize",
                "averaged weights have no mean and deviation of their own: set it to false, or reduction to mean",
            )
        if self.reduction != "mean_minus_std" and not self.is_default("k"):
            yield "k", f"{self.k:g} is for the reduction mean_minus_std, but it is {self.reduction}: remove it"

    def _judge_conflicts(self) -> Iterator[tuple[str, str]]:
        if self.judge is not None and self.normalize:
            yield "normalize", "the mean and deviation stand in a reward model's directory: a judge has none"
        if self.judge is not None and self.samples_per_call is not None:
            yield "samples_per_call", "a judge is asked one question a request: set judge.concurrency"

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
    gate: float | None = None
    """A reward of this term below it makes the whole reward ``reward.floor``."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if len(self.places) != 1:
            yield "", "set exactly one of model, ensemble, function, url, source and judge"
        if self.weight == 0.0 and self.gate is None:
            yield "weight", "0 leaves the term without effect: remove it, or give it a weight or a gate"
        yield from super().conflicts()


class RewardConfig(RewardSourceConfig):
    """The whole section: one place, or a weighted mixture of several."""

    mixture: dict[PartName, RewardTermConfig] = {}  # noqa: RUF012 (pydantic copies it)
    """Terms by their names; the metric ``reward_term/NAME`` is the mean of each."""
    floor: float = 0.0
    """The reward where a gate of the mixture is not passed."""
    steps: Literal["sum", "min", "last"] | None = None
    """What becomes of the rewards of the steps of an answer: ``sum`` leaves each at the end of its step, with the others the
    answer has one. Null: answers have one reward."""
    on_failure: Literal["drop", "stop"] | None = None
    """Whether a prompt without a reward is left out of the step, or ends the run. Null: left out with a judge, else the end."""
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
        has_place = any(self.__dict__.get(name) not in (None, []) for name in PLACES)
        return {"reward": self, **terms} if has_place or not terms else terms

    @property
    def drops(self) -> bool:
        """Whether prompts without a reward are left out."""
        if self.on_failure is None:
            return any(source.judge is not None for source in self.sources.values())
        return self.on_failure == "drop"

    @property
    def averaged_models(self) -> list[tuple[str, ModelConfig]]:
        """The models that stand behind a role of another one, by the keys of their sections."""
        return [model for key, source in self.sources.items() for model in source.averaged(key)]

    @property
    def roles(self) -> dict[str, RoleConfig]:
        """Every reward model as a role, by the key of its section."""
        return {f"{key}{name}": role for key, source in self.sources.items() for name, role in source.members.items()}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        places = [*self.places, *(["mixture"] if self.mixture else [])]
        if len(places) != 1:
            suffix = f", found {' and '.join(places)}" if places else ""
            yield (
                "",
                "set exactly one of model (a reward model), ensemble (several), function (Python), url (a scoring backend), "
                f"source (Python), judge (a language model) and mixture{suffix}",
            )
        if self.steps is not None and (
            (self.source is None and self.function is None)
            or self.function in (*SHIPPED_FUNCTIONS, FROM_ENVIRONMENT, NO_REWARD)
        ):
            yield (
                "steps",
                f"{self.steps} is for a function or a source of your own, which gives steps: set one, or remove it",
            )
        if self.mixture and all(term.weight == 0.0 and term.gate is not None for term in self.mixture.values()):
            yield "mixture", "every term has weight 0, so that all answers have one reward: give one a weight"
        if self.floor != 0.0 and all(term.gate is None for term in self.mixture.values()):
            yield "floor", f"{self.floor:g} is the reward where a gate is not passed, and no term has one: remove it"
        yield from super().conflicts()
