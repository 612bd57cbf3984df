"""The job ``generate``: answers of a model to the prompts of a file, with their rewards, and the rows that are chosen of them.

Invariants: every key has an effect or is refused; what needs rewards is refused where none are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from string import Formatter
from typing import ClassVar, Literal

from rlhf_ray.config.checks.algorithm import judges_compare_groups
from rlhf_ray.config.checks.data import has_no_pairs_to_cut
from rlhf_ray.config.checks.one_process import no_engine_is_vllm, no_role_scores_in_vllm
from rlhf_ray.config.checks.rollout import engine_has_its_devices, longest_sequence_fits, rollout_repeats_exactly
from rlhf_ray.config.facts import Amount, Placement, Role, Size
from rlhf_ray.config.files.architectures import only_scores
from rlhf_ray.config.files.models import engine_problems, is_adapter, model_config_file
from rlhf_ray.config.files.rows import data_paths, data_problems, template_problems
from rlhf_ray.config.files.sampled import sampling_problems
from rlhf_ray.config.files.tokenizers import stop_token_problems
from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.jobs.ppo import label_reader, source_files
from rlhf_ray.config.problems import Problem, Rule, unless_absent
from rlhf_ray.config.sections.base import Positive, Section
from rlhf_ray.config.sections.data import DataConfig, SourceConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.rewards import FROM_ENVIRONMENT, NO_REWARD, RewardConfig, RewardSourceConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.environment import expand_home
from rlhf_ray.rows.prompts import PromptReader

Selection = Literal["all", "best", "top-k", "worst-best"]
"""Which answers become rows: every one, the best of each prompt, the ``top`` best, or the best and the worst as a pair."""
OF_TRAINING = (
    "mode", "window", "partial", "environment", "routing_replay", "weight_transport", "weight_delta", "lora", "sleep",
    "update_timeout_s",
)  # fmt: skip
"""Keys of ``rollout`` about weights that change, and about what a trainer needs besides answers."""
LABELS = ("reward", "decile")
"""What ``condition`` may name."""


class SampledModelConfig(Section):
    """The model that answers."""

    path: str
    revision: str | None = None


class GenerateConfig(Job):
    """Answers to prompts, their rewards, and a choice among them."""

    command: ClassVar[str] = "rlhf-ray generate MODEL --prompts FILE --output FILE"

    kind: Literal["generate"]
    model: SampledModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig | None = None
    """Null: answers have no rewards."""
    samples: Positive = 1
    """Answers to each prompt."""
    greedy: bool = False
    """Take the likeliest token each time, for one answer to each prompt."""
    select: Selection = "all"
    top: Positive = 1
    """Answers of each prompt that ``select: top-k`` takes."""
    cut_answers: Literal["drop", "keep"] = "drop"
    """Whether an answer that the model did not end itself may become a row."""
    condition: str | None = None
    """A text that tells each answer's reward before its prompt, with ``{reward}`` or ``{decile}``: conditional SFT."""

    @property
    def policy(self) -> ModelConfig:
        """The model that answers, as other jobs name one."""
        return ModelConfig(path=self.model.path, revision=self.model.revision, dtype=self.rollout.dtype)

    def roles(self) -> dict[str, Role]:
        reward = unless_absent(lambda: self.reward, None)
        return {} if reward is None else {key: Role(role, head=True) for key, role in reward.roles.items()}

    def model_sections(self) -> Iterator[tuple[str, ModelConfig]]:
        model = unless_absent(lambda: self.policy, None)
        if model is not None:
            yield "model", model
        yield from super().model_sections()
        reward = unless_absent(lambda: self.reward, None)
        yield from [] if reward is None else reward.averaged_models

    def placements(self) -> list[Placement]:
        rollout = self.rollout
        return [*super().placements(), Placement("rollout", rollout.engines, rollout.resources, rollout.placement)]

    def longest_sequence(self) -> int:
        return self.rollout.max_model_tokens

    def rules(self) -> list[Rule]:
        return [
            *super().rules(),
            self._only_samples,
            lambda: rollout_repeats_exactly(self.rollout, self.run),
            lambda: longest_sequence_fits(self.rollout, self._longest()),
            lambda: engine_has_its_devices(self.rollout),
            lambda: has_no_pairs_to_cut(self.data),
            self._holds_nothing_out,
            self._choice_is_possible,
            self._condition_is_a_label,
            self._rewards_are_possible,
        ]

    def one_process_rules(self) -> list[Rule]:
        """The rules of ``--in-process``."""
        return [lambda: no_role_scores_in_vllm(self.roles()), lambda: no_engine_is_vllm(self.rollout)]

    def files(self) -> list[Rule]:
        own = [
            self._is_no_adapter,
            self._is_no_reward_model,
            lambda: engine_problems(self.rollout, self.policy),
            lambda: sampling_problems(self.rollout, self.policy),
            lambda: stop_token_problems(self.rollout.stop_tokens, self.policy),
            lambda: data_problems(self.data, self.row_reader),
            lambda: template_problems(self.policy, self.data, self.row_reader),
        ]
        return [*super().files(), *own, *(partial(source_files, *source) for source in self._sources())]

    def row_reader(self, source: SourceConfig) -> PromptReader:
        """What the rows of ``source`` are read with; their labels are read where a function compares answers with them."""
        labels = label_reader(source, [one for _, one in self._sources()])
        return replace(self.data.prompt_reader(source), labels=labels)

    def data_paths(self) -> Iterable[tuple[str, str]]:
        data = unless_absent(lambda: self.data, None)
        return () if data is None else data_paths(data)

    def sizes(self, rows: int | None) -> Iterator[Size]:
        yield Size("answers to each prompt", str(self.samples), "samples")
        if rows is not None:
            yield Size("answers in all", str(rows * self.samples), f"{rows} prompts x {self.samples}")
        longest = self._longest()
        yield Size("longest sequence", f"{longest.value} tokens", "max_prompt_tokens + max_new_tokens")

    def _longest(self) -> Amount:
        prompt, answer = self.data.max_prompt_tokens, self.rollout.max_new_tokens
        return Amount(prompt + answer, f"data.max_prompt_tokens {prompt} + rollout.max_new_tokens {answer}")

    def _sources(self) -> list[tuple[str, RewardSourceConfig]]:
        reward = unless_absent(lambda: self.reward, None)
        return [] if reward is None else [*reward.sources.items()]

    def _only_samples(self) -> Iterator[Problem]:
        for name in OF_TRAINING:
            value = getattr(self.rollout, name)
            if value != RolloutConfig.model_fields[name].default:
                yield f"rollout.{name}", f"{value}, but nothing is trained here, so it has no effect: remove it"

    def _holds_nothing_out(self) -> Iterator[Problem]:
        for name in ("evaluation_path", "evaluation_split", "evaluation_fraction"):
            value = getattr(self.data, name)
            if value:
                yield f"data.{name}", f"{value}, but every prompt is answered and none is held out: remove it"

    def _choice_is_possible(self) -> Iterator[Problem]:
        if self.greedy and self.samples > 1:
            yield "greedy", f"true, but all {self.samples} answers to a prompt would be the same: set samples to 1"
        if self.select != "all" and self.reward is None:
            yield "select", f"{self.select} chooses by rewards, and none are asked for: give --reward, or set it to all"
        if self.select != "all" and self.samples == 1:
            yield "samples", f"1 leaves nothing to choose, but select is {self.select}: raise it, to 16 for example"
        if self.select == "top-k" and self.top > self.samples:
            yield "top", f"{self.top} of {self.samples} answers (samples): lower it"
        if self.select != "top-k" and self.top != 1:
            yield "top", f"{self.top} is for select=top-k, but select is {self.select}: remove it"

    def _condition_is_a_label(self) -> Iterator[Problem]:
        if self.condition is None:
            return
        if self.reward is None:
            yield "condition", "it tells the reward of an answer, and none are asked for: give --reward, or remove it"
        if self.select == "worst-best":
            yield "condition", "it is for answers that are learned from, but select is worst-best: set that to all"
        try:
            names = {name for _, name, _, _ in Formatter().parse(self.condition) if name is not None}
            self.condition.format(reward=0.0, decile=1)
        except (ValueError, LookupError, AttributeError):
            names = set()
        if not names or not names <= set(LABELS):
            yield "condition", f"{self.condition!r} must name {{reward}} or {{decile}}: write '<reward: {{decile}}> '"

    def _rewards_are_possible(self) -> Iterator[Problem]:
        reward = unless_absent(lambda: self.reward, None)
        if reward is not None and reward.max_dropped_share != RewardConfig.model_fields["max_dropped_share"].default:
            yield "reward.max_dropped_share", "it is about the prompts of a step, and here are no steps: remove it"
        if reward is not None:
            yield from judges_compare_groups(reward, "samples", self.samples)
        for key, source in self._sources():
            if source.function == FROM_ENVIRONMENT:
                yield f"{key}.function", f"{FROM_ENVIRONMENT} plays with a policy that learns: name another"
            if source.function == NO_REWARD:
                yield f"{key}.function", f"{NO_REWARD} gives every answer 0: leave reward out, or name another"

    def _is_no_reward_model(self) -> Iterator[Problem]:
        problem = only_scores(model_config_file(self.policy))
        if problem is not None:
            yield "model.path", f"{self.model.path}: {problem}"

    def _is_no_adapter(self) -> Iterator[Problem]:
        path = expand_home(self.model.path)
        if is_adapter(path):
            yield (
                "model.path",
                f"{path} holds an adapter alone, and the engines read whole models: merge it, with rlhf-ray export",
            )
