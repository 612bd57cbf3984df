"""Build the reward source of a PPO run from its config: models, functions, scoring backends, or a mixture of them.

Invariants: token ids reach a reward model only if it has the policy's tokenizer and, for conversations, the policy's chat
template with the same variables, and reads prompts of their form; else it gets texts or messages. A user's function runs in
a process of its own, which ends with the run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from rlhf_ray.actors.cluster import group_of
from rlhf_ray.config.files.tokens import read_tokens
from rlhf_ray.config.sections.rewards import FROM_ENVIRONMENT, NO_REWARD, RewardConfig, RewardSourceConfig
from rlhf_ray.config.sections.roles import Form
from rlhf_ray.console import get_logger
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.tokenizers import fingerprint, template_fingerprint
from rlhf_ray.environments.source import EnvironmentSource
from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.pending import Pending
from rlhf_ray.processes import spans
from rlhf_ray.rewards import verifiers
from rlhf_ray.rewards.client import RewardClient
from rlhf_ray.rewards.function_process import FunctionProcess
from rlhf_ray.rewards.function_source import FunctionSource, InThisProcess
from rlhf_ray.rewards.functions import RewardFunction
from rlhf_ray.rewards.judge.comparing import ComparingSource
from rlhf_ray.rewards.judge.making import make_judge
from rlhf_ray.rewards.judge.source import Judge, JudgeSource
from rlhf_ray.rewards.mixture import EnsembleSource, MixtureSource, Part, Term
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rewards.source import ModelSource, RewardSource, Scorer, compares
from rlhf_ray.rewards.steps.source import SteppedSource
from rlhf_ray.rewards.user_source import make_user_source
from rlhf_ray.world.gold import world_arithmetic, world_gold

SHIPPED: Mapping[str, RewardFunction] = {
    "gsm8k": verifiers.gsm8k,
    "exact_match": verifiers.exact_match,
    NO_REWARD: verifiers.none,
    "world.gold": world_gold,
    "world.arithmetic": world_arithmetic,
}


class Rewarded(Protocol):
    """A job, or a part of one, whose answers get rewards."""

    @property
    def reward(self) -> RewardConfig:
        """Where they come from."""


class Described(Scorer, Protocol):
    """A reward model in processes of this job."""

    def describe(self) -> Pending[dict[str, Any]]:
        """What it was trained on and reads, and its statistics."""


class RemoteScorer:
    """A scoring backend over HTTP. Each call is one attempt: the run itself repeats what may pass (``reward.hold_s``)."""

    def __init__(self, client: RewardClient) -> None:
        self.client = client

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        """One result a request, in order."""
        return Pending(lambda: self._ask(requests))

    def _ask(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        try:
            return self.client.score(requests)
        except RequestError as error:  # refused: a token that was revoked, a body that is too large
            raise ScoringError(str(error), may_pass=False) from error


class Recorded:
    """What scores outside of the ranks of a group, which record for themselves: its batches are spans of a lane of its own."""

    def __init__(self, key: str, scores: Any) -> None:
        self.reads: str = getattr(scores, "reads", "")
        self.compares = compares(scores)
        self._role, self.scores = group_of(key), scores

    def score(self, batch: Sequence[Any]) -> Pending[list[ScoreResult]]:
        """What it says of the batch."""
        sent = spans.sending(self._role, "score")
        answer: Pending[list[ScoreResult]] = self.scores.score(batch)

        def wait() -> list[ScoreResult]:
            with spans.waiting(sent, for_all=True):
                results = answer.result()
                spans.answered_elsewhere(sent)
            return results

        return Pending(wait, answer.ready)


def make_reward_source(
    config: Rewarded,
    groups: Mapping[str, Described],
    policy: ChatFormat,
    *,
    forms: Collection[Form],
    cleanup: ExitStack,
    stop_tokens: Collection[int] = (),
    judges: Path | None = None,
) -> RewardSource:
    """The source that the config names.

    ``groups`` holds the reward models by the keys of their sections; ``policy`` is the format that prompts were encoded with;
    ``stop_tokens`` end an answer; ``forms`` are those of the prompts; ``cleanup`` closes the connections and processes that
    are opened here; the directory ``judges`` keeps what judges have spent.
    """

    def read(key: str, source: RewardSourceConfig, scorer: Scorer, description: Mapping[str, Any]) -> ModelSource:
        mean, std = _statistics(key, description) if source.normalize else (0.0, 1.0)
        _check_forms(key, description, forms)
        return ModelSource(scorer, policy=passes_ids(description), stop_tokens=stop_tokens, mean=mean, std=std)

    def passes_ids(description: Mapping[str, Any]) -> ChatFormat | None:
        reads = description.get("reads") or {}
        conversations = "conversation" in forms
        if not {*forms} <= {*reads.get("forms", forms)} or (conversations and reads.get("scored_token") == "rendering"):
            return None
        template = description.get("template"), reads.get("template_variables", {})
        same_template = template == (template_fingerprint(policy.tokenizer), dict(policy.variables))
        same_tokenizer = description.get("fingerprint") == fingerprint(policy.tokenizer)
        if not same_tokenizer or (conversations and not same_template):
            return None
        return policy if _ends_alike(policy, reads) else None

    def read_models(key: str, source: RewardSourceConfig) -> RewardSource:
        at = {name: f"{key}{name}" for name in source.members}
        models = {name: read(one, source, groups[one], groups[one].describe().result()) for name, one in at.items()}
        if source.reduction == "weights" or not source.ensemble:
            return models[""]
        named = {f"model_{name.rpartition('.')[2]}": model for name, model in models.items()}
        return EnsembleSource(named, source.reduction, source.k)

    def stepped(source: RewardSource) -> RewardSource:
        return source if config.reward.steps is None else SteppedSource(source, config.reward.steps)

    def make_source(key: str, source: RewardSourceConfig) -> RewardSource:
        if source.function == FROM_ENVIRONMENT:
            return EnvironmentSource()
        if source.function is not None:
            function = make_function_source(source.function, source, cleanup, steps=config.reward.steps is not None)
            return Recorded(key, stepped(function))
        if source.source is not None:
            return Recorded(key, stepped(make_user_source(key, source, policy.tokenizer, cleanup)))
        if source.judge is not None:
            return Recorded(key, make_judge(key, source, judges))
        if source.url is None:
            return read_models(key, source)
        token = next(iter(read_tokens(source.token_file)), None)
        client = RewardClient(source.url, token=token, timeout_s=source.timeout_s, hold_s=0.0)
        cleanup.callback(client.close)
        return read(key, source, Recorded(key, RemoteScorer(client)), client.info())

    sources = {key: make_source(key, source) for key, source in config.reward.sources.items()}
    if not config.reward.mixture:
        return sources["reward"]
    terms = {
        name: Term(sources[f"reward.mixture.{name}"], Part(term.weight, term.gate))
        for name, term in config.reward.mixture.items()
    }
    return MixtureSource(terms, config.reward.floor)


def judges_of(source: RewardSource) -> list[Judge[Any]]:
    """The judges behind a source."""
    if isinstance(source, MixtureSource):
        return [judge for term in source.terms.values() for judge in judges_of(term.source)]
    inner = source.scores if isinstance(source, Recorded) else source
    return [inner.judge] if isinstance(inner, JudgeSource | ComparingSource) else []


def _ends_alike(policy: ChatFormat, reads: Mapping[str, Any]) -> bool:
    """Whether answers of the policy end in the token at which a reward model is read that reads one form of prompts."""
    if len(reads.get("forms", ())) != 1 or not reads.get("end_token"):
        return True
    talks = reads["forms"][0] == "conversation"
    return bool(reads["end_token"] == (policy.ending.token if talks else policy.tokenizer.eos_token))


def make_function_source(
    name: str, settings: RewardSourceConfig, cleanup: ExitStack, *, steps: bool = False
) -> FunctionSource:
    """The function ``name`` as a source: one of this project runs in this process, a user's in a process of its own."""
    if name in SHIPPED:
        return FunctionSource(name, InThisProcess(name, SHIPPED[name], settings.timeout_s), settings.samples_per_call)
    process = FunctionProcess(name, settings.timeout_s)
    cleanup.callback(process.close)
    return FunctionSource(name, process, settings.samples_per_call, steps=steps)


def _check_forms(key: str, description: Mapping[str, Any], forms: Collection[Form]) -> None:
    """Refuse conversations for a reward model that reads texts, and say where texts become turns of a conversation."""
    reads = description.get("reads") or {}
    read_forms, recorded = reads.get("forms", forms), reads.get("recorded", False)
    if "conversation" in forms and "conversation" not in read_forms:
        raise RequestError(
            f"{key}: the prompts are conversations, but the reward model reads plain texts"
            f"{', on which it was trained' if recorded else ''}: give one that was trained on conversations"
            + ("" if recorded else f", or set {key}.form to conversation if this one was")
            + ", or write the prompts as texts"
        )
    if "text" in forms and "text" not in read_forms:
        get_logger("rewards").warning(
            "%s: the prompts are plain texts, but the reward model reads conversations%s: it gets each prompt as a turn of the "
            "user and its answer as one of the assistant. data.apply_chat_template=true lets the policy read them so too%s",
            key,
            ", on which it was trained" if recorded else " as far as its chat template tells",
            "" if recorded else f"; {key}.form=text joins prompt and answer, for a model that was trained on texts",
        )


def _statistics(key: str, description: Mapping[str, Any]) -> tuple[float, float]:
    """The mean and standard deviation of a reward model that is to be normalised."""
    if description.get("mean") is None or not description.get("std"):
        raise RequestError(f"{key}.normalize is true, but the reward model's config.json has no mean and std: train it "
                           f"here with held-out pairs, or set {key}.normalize to false")  # fmt: skip
    return float(description["mean"]), float(description["std"])
