"""The job ``ppo``: a policy that is improved against a reward and held near a reference by KL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

from rlhf_ray.config.checks import algorithm as algorithm_checks
from rlhf_ray.config.checks import colocation
from rlhf_ray.config.checks import rollout as rollout_checks
from rlhf_ray.config.checks.data import (
    gold_knows_the_prompts,
    has_no_pairs_to_cut,
    learns_no_demonstrations,
    world_has_enough_prompts,
)
from rlhf_ray.config.checks.one_process import no_engine_is_vllm
from rlhf_ray.config.checks.service import exposes_a_reward_model
from rlhf_ray.config.checks.shared_gpus import SharedGpus, colocated_gpus, shared_gpus
from rlhf_ray.config.facts import Amount, Placement, Role, Sampling, Size, Work, present_roles
from rlhf_ray.config.files.models import engine_problems, length_problems
from rlhf_ray.config.files.places import key_problems, token_problems
from rlhf_ray.config.files.reward_record import recorded_training
from rlhf_ray.config.files.rows import form_problems, label_problems, template_problems
from rlhf_ray.config.files.sampled import replay_problems, sampling_problems
from rlhf_ray.config.files.tokenizers import stop_token_problems, tokenizer_problems
from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.config.jobs.sizes import role_sizes, shares, updates
from rlhf_ray.config.problems import Problem, Rule, unless_absent
from rlhf_ray.config.sections.algorithm import AlgorithmConfig
from rlhf_ray.config.sections.base import Positive
from rlhf_ray.config.sections.batch import BatchConfig
from rlhf_ray.config.sections.data import SourceConfig
from rlhf_ray.config.sections.evaluation import PpoEvaluationConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.rewards import COMPARED, VERIFIERS, RewardConfig, RewardSourceConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.config.sections.service import ServiceConfig
from rlhf_ray.rows.labels import LabelReader
from rlhf_ray.rows.prompts import PromptReader
from rlhf_ray.user_code import existence_problems, required_parameters


class PpoConfig(TrainingJob):
    """PPO: a policy improved against a reward, held near a reference by KL."""

    trainer: ClassVar[str] = "rlhf_ray.trainers.ppo.build:train_ppo"
    length_key: ClassVar[str] = "steps"
    takes_turns: ClassVar[bool] = True

    kind: Literal["ppo"]
    batch: BatchConfig
    policy: RoleConfig
    critic: RoleConfig | None = None
    """None where the algorithm has no critic."""
    reference: RoleConfig | None = None
    """None: the starting policy, on one rank, forward only (``reference_role``)."""
    reward: RewardConfig
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    steps: Positive
    """PPO steps of the whole run: each samples ``batch.prompts_per_step`` prompts."""
    evaluation: PpoEvaluationConfig = PpoEvaluationConfig()
    expose: ServiceConfig | None = None
    """A port that answers with the scores of this run's reward models, while it runs."""

    @property
    def reference_role(self) -> RoleConfig | None:
        """The reference as it runs: ``reference``, or the starting policy without adapters; none where no KL is measured."""
        if not self.algorithm.kl.measure:
            return None
        if self.reference is not None:
            return self.reference
        start = self.policy.model.model_copy(update={"lora": None, "gradient_checkpointing": False})
        values = {
            "model": start,
            "resources": self.policy.resources,
            "placement": self.policy.placement,
            "max_tokens_per_micro_batch": self.policy.max_tokens_per_micro_batch,
        }
        return RoleConfig.with_gaps(values, ())  # its parts were checked as the policy's, and are not reported twice

    @property
    def max_staleness(self) -> int:
        """How many publications older than the newest the weights may be that sampled a token of a step."""
        bound = self.algorithm.max_staleness
        return self.rollout.staleness if bound is None else bound

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of the policy (and of the critic) in one PPO step."""
        batch = self.batch
        return batch.passes_per_step * updates(batch.sequences_per_step, batch.sequences_per_update)

    def roles(self) -> dict[str, Role]:
        update = Work(
            items=lambda: Amount(self.batch.sequences_per_update, "batch.sequences_per_update"),
            longest=self._longest_sequence,
            budget=lambda: self.batch,
        )
        step = Work(
            items=lambda: Amount(self.batch.sequences_per_step, "batch.prompts_per_step x samples_per_prompt"),
            longest=self._longest_sequence,
            budget=lambda: self.batch,
        )
        in_loss = unless_absent(lambda: self.algorithm.entropy_coefficient != 0.0, False)
        roles = {
            "policy": lambda: Role(self.policy, trained=True, head=False, work=update, entropy_in_loss=in_loss),
            "critic": lambda: None if self.critic is None else Role(self.critic, trained=True, head=True, work=update),
            "reference": lambda: self._reference(step),
        }
        models: dict[str, RoleConfig] = unless_absent(lambda: self.reward.roles, {})
        rewards = {key: Role(role, head=True, work=step) for key, role in models.items()}
        return present_roles(roles) | rewards

    def model_sections(self) -> Iterator[tuple[str, ModelConfig]]:
        yield from super().model_sections()
        none: list[tuple[str, ModelConfig]] = []
        yield from unless_absent(lambda: self.reward.averaged_models, none)

    def placements(self) -> list[Placement]:
        rollout = self.rollout
        own = [*super().placements(), Placement("rollout", rollout.engines, rollout.resources, rollout.placement)]
        return colocation.taking_turns(own) if self.cluster.colocate else own

    def shared_gpus(self) -> SharedGpus | None:
        placements = self.placements()
        return colocated_gpus(placements) if self.cluster.colocate else shared_gpus(placements)

    def sampling(self) -> Sampling:
        return Sampling(self.rollout, self.roles()["policy"], self.batch.sequences_per_step, self.updates_per_step)

    def longest_sequence(self) -> int:
        return self.rollout.max_model_tokens

    def rules(self) -> list[Rule]:
        return [
            *super().rules(),
            lambda: rollout_checks.rollout_repeats_exactly(self.rollout, self.run),
            lambda: rollout_checks.longest_sequence_fits(self.rollout, self._first_answer()),
            lambda: rollout_checks.every_engine_has_a_prompt(self.rollout, self.batch.prompts_per_step),
            lambda: rollout_checks.mode_keeps_to_the_bound(self.rollout, self.algorithm),
            lambda: rollout_checks.window_collects_by_itself(self.rollout, self.algorithm, self.run),
            lambda: rollout_checks.environment_gives_the_rewards(self.rollout, self.reward),
            lambda: rollout_checks.lengths_are_of_one_answer(self.rollout, self.algorithm.shaping),
            lambda: rollout_checks.engine_has_its_devices(self.rollout),
            lambda: rollout_checks.engine_keeps_to_its_share(self.rollout, colocate=self.cluster.colocate),
            lambda: colocation.engines_can_sleep(self.cluster, self.rollout, self.expose),
            lambda: colocation.roles_can_leave(self.cluster, self.roles()),
            lambda: world_has_enough_prompts(self.data, self.batch.prompts_per_step, self.evaluation.prompts),
            lambda: gold_knows_the_prompts(self.data, self._functions()),
            lambda: has_no_pairs_to_cut(self.data),
            lambda: learns_no_demonstrations(self.data),
            lambda: exposes_a_reward_model(self.expose, self.reward),
            lambda: algorithm_checks.critic_where_needed(self.algorithm, self.critic),
            lambda: algorithm_checks.samples_to_compare(self.algorithm, self.batch.samples_per_prompt),
            self._judges_compare_groups,
            lambda: algorithm_checks.reference_is_used(self.algorithm, self.reference),
            lambda: algorithm_checks.teacher_is_named(self.algorithm, self.reference),
            lambda: algorithm_checks.penalties_fit(self.algorithm.shaping, self.rollout.max_new_tokens),
            lambda: algorithm_checks.policy_computes_the_same_twice(self.policy),
            lambda: algorithm_checks.policy_trains_at_all(self.algorithm, self.steps),
        ]

    def _judges_compare_groups(self) -> Iterator[Problem]:
        sizes = {"batch": self.batch.samples_per_prompt, "evaluation": self.evaluation.samples_per_prompt}
        for section, samples in sizes.items():
            yield from algorithm_checks.judges_compare_groups(self.reward, f"{section}.samples_per_prompt", samples)
        if (best_of := self.evaluation.best_of) > 1:
            yield from algorithm_checks.judges_compare_groups(self.reward, "evaluation.best_of", best_of)

    def one_process_rules(self) -> list[Rule]:
        return [*super().one_process_rules(), lambda: no_engine_is_vllm(self.rollout)]

    def files(self) -> list[Rule]:
        return [
            *super().files(),
            lambda: tokenizer_problems(self.policy.model, {"critic": self.critic, "reference": self.reference}),
            lambda: engine_problems(self.rollout, self.policy.model),
            lambda: sampling_problems(self.rollout, self.policy.model),
            lambda: replay_problems(self.rollout, self.policy.model),
            self._readers_read_the_longest,
            self._label_problems,
            self._form_problems,
            lambda: template_problems(self.policy.model, self.data, self.row_reader),
            *(partial(source_files, key, source) for key, source in self._reward_sources().items()),
            self._gold_file,
            self._environment_file,
            self._own_part_files,
            lambda: stop_token_problems(self.rollout.stop_tokens, self.policy.model),
            lambda: token_problems("expose.token_file", self.expose.token_file if self.expose else None),
        ]

    def length_done(self, state: Mapping[str, Any]) -> float:
        return float(state["progress"]["step"])

    def row_reader(self, source: SourceConfig) -> PromptReader:
        reader = self.data.prompt_reader(source)
        return replace(reader, labels=self._label_reader(source))

    def sizes(self, rows: int | None) -> Iterator[Size]:
        batch, longest = self.batch, self._longest_sequence()
        prompts, samples, engines = batch.prompts_per_step, batch.samples_per_prompt, self.rollout.engines
        passes, steps = batch.passes_per_step, f"{self.steps} steps"
        yield Size(
            "sequences per step", str(batch.sequences_per_step), f"{prompts} prompts x {samples} samples of each"
        )
        yield Size(
            "updates per step",
            str(self.updates_per_step),
            f"{passes} passes over updates of {batch.sequences_per_update} sequences",
        )
        yield Size("updates in all", str(self.steps * self.updates_per_step), steps)
        yield Size("prompts in all", str(self.steps * prompts), steps)
        yield Size("prompts per engine and step", shares(prompts, engines), f"{engines} engines")
        origin = "max_prompt_tokens + max_new_tokens" if self.rollout.environment is None else "max_model_tokens"
        yield Size("longest sequence", f"{longest.value} tokens", origin)
        for name, role in self.roles().items():
            if role.trained:
                yield from role_sizes(name, role, "sequences")

    def _form_problems(self) -> Iterator[Problem]:
        records = {key: (role.model.path, recorded_training(role.model)) for key, role in self.reward.roles.items()}
        texts = {key: str(path) for key, (path, record) in records.items() if record and record.forms == ("text",)}
        yield from form_problems(texts, self.data, self.row_reader)

    def _longest_sequence(self) -> Amount:
        if self.rollout.environment is not None:  # an episode of several turns ends where an engine has no room
            return Amount(self.rollout.max_model_tokens, f"rollout.max_model_tokens {self.rollout.max_model_tokens}")
        return self._first_answer()

    def _first_answer(self) -> Amount:
        prompt, answer = self.data.max_prompt_tokens, self.rollout.max_new_tokens
        return Amount(prompt + answer, f"data.max_prompt_tokens {prompt} + rollout.max_new_tokens {answer}")

    def _reference(self, work: Work) -> Role | None:
        if self.reference is not None:
            return Role(self.reference, head=False, work=work)
        reference = self.reference_role
        return None if reference is None else Role(reference, head=False, work=work, derived=True)

    def _label_reader(self, source: SourceConfig) -> LabelReader:
        """What the rewards, and on held-out rows the gold score, need of the labels of ``source``."""
        is_held_out = source == self.data.evaluation_file or self.data.evaluation_fraction
        gold = [self.evaluation.gold] if is_held_out else []
        return label_reader(source, [*self.reward.sources.values()], gold)

    def _label_problems(self) -> Iterator[Problem]:
        """Functions of the user's own that ask for labels find some."""
        names = {f"{key}.function": source.function for key, source in self.reward.sources.items()}
        asking = {key: name for key, name in names.items() if name and "labels" in required_parameters(name)}
        judges = {f"{key}.judge": source.judge for key, source in self.reward.sources.items()}
        asking |= {f"{key}.reference": "the judge" for key, judge in judges.items() if judge and judge.reference}
        yield from label_problems(asking, self.data, self.row_reader)

    def _functions(self) -> dict[str, str | None]:
        """Every function that scores answers, by its key."""
        rewards: dict[str, str | None] = {
            f"{key}.function": source.function for key, source in self.reward.sources.items()
        }
        return rewards | {"evaluation.gold": self.evaluation.gold}

    def _reward_sources(self) -> Mapping[str, RewardSourceConfig]:
        return unless_absent(lambda: self.reward.sources, {})

    def _readers_read_the_longest(self) -> Iterator[Problem]:
        for key, role in (("critic", self.critic), ("reference", self.reference)):
            if role is not None and role.model.path != self.policy.model.path:
                yield from length_problems(
                    f"{key}.model", role.model, "rollout.max_model_tokens", self.rollout.max_model_tokens
                )

    def _gold_file(self) -> Iterator[Problem]:
        if self.evaluation.gold is not None:
            yield from (("evaluation.gold", text) for text in existence_problems(self.evaluation.gold))

    def _environment_file(self) -> Iterator[Problem]:
        if self.rollout.environment is not None:
            for text in existence_problems(self.rollout.environment.name):
                yield "rollout.environment.name", text

    def _own_part_files(self) -> Iterator[Problem]:
        for key, name in self.algorithm.own_parts.items():
            yield from ((f"algorithm.{key}", text) for text in existence_problems(name))


def source_files(key: str, source: RewardSourceConfig) -> Iterator[Problem]:
    """The code and the token file of one place that rewards come from."""
    for name in ("function", "source"):
        code = source.__dict__.get(name)
        if code is not None:
            yield from ((f"{key}.{name}", text) for text in existence_problems(code))
    yield from token_problems(f"{key}.token_file", source.token_file)
    if source.judge is not None:
        yield from key_problems(f"{key}.judge", source.judge, source.token_file)


def label_reader(
    source: SourceConfig, rewards: Sequence[RewardSourceConfig], also: Sequence[str | None] = ()
) -> LabelReader:
    """What ``rewards``, and functions that score besides them, need of the labels of ``source``."""
    functions = [(name or "").removeprefix(VERIFIERS) for name in (*(one.function for one in rewards), *also)]
    verifiers = [name for name in functions if name in COMPARED]
    # a number asks more of a label than a text
    verifier = max(verifiers, key=lambda name: COMPARED[name] == "number", default="")
    used = any((*functions, *(one.source or one.judge for one in rewards)))
    return LabelReader(source.label_key, COMPARED.get(verifier, ""), verifier, used=used)
