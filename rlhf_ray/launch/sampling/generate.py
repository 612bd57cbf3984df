"""``rlhf-ray generate``: answers to every prompt of a file, sampled by PPO's engines, scored and chosen among.

Invariants: every prompt has its answers once, in one line that is on disk before anything counts it; the same command goes on
after an interruption, and what was begun and lost is sampled again, with other draws where the run is not deterministic.
What is wrong with files, prompts and rewards is told before an engine starts. Rows are chosen when all answers are there, so
that another choice among finished answers costs no sampling.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from rlhf_ray.actors.cluster import Cluster, group_of
from rlhf_ray.actors.engines import load_fixed_fleet, place_engines
from rlhf_ray.actors.place import Place, place_reward_group
from rlhf_ray.actors.workers.reward import RewardSetup
from rlhf_ray.actors.workers.rollout import RolloutSetup
from rlhf_ray.config.jobs.generate import GenerateConfig
from rlhf_ray.config.sections.rewards import RewardConfig
from rlhf_ray.config.sections.roles import Form, TokenBudget
from rlhf_ray.console import get_logger, progress
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encode import TOO_LONG
from rlhf_ray.data.ends import EndTokens
from rlhf_ray.data.load import TokenizedPrompt, load_prompts
from rlhf_ray.errors import DataError, RequestError, ResumableStop, ScoringError
from rlhf_ray.launch.lasting_group import LastingGroup
from rlhf_ray.launch.sampling.answers import answered_prompt, first_line, read_answers
from rlhf_ray.launch.sampling.collecting import answer_all
from rlhf_ray.launch.sampling.figures import GenerationReport, answer_figures, best_of, kl_of_choice
from rlhf_ray.launch.sampling.selection import Choice, choose
from rlhf_ray.launch.score import model_files
from rlhf_ray.models import load_end_tokens, load_tokenizer
from rlhf_ray.models.weights.checkpoint import find_directory
from rlhf_ray.rewards.encoding import longest_read
from rlhf_ray.rewards.ensembles.weights import with_averages
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample, text_sample
from rlhf_ray.rewards.source import RewardSource, score_or_hold
from rlhf_ray.rewards.user_source import check_user_source
from rlhf_ray.rollout.fleet import Answered, Pump
from rlhf_ray.rollout.requests import GenerationRequest, make_requests, request_seed
from rlhf_ray.storage import OutputFile
from rlhf_ray.storage.growing import UNFINISHED, GrowingFile
from rlhf_ray.trainers.ppo.rewards import make_reward_source
from rlhf_ray.trajectories.columns import FinishReason

if TYPE_CHECKING:
    from rlhf_ray.actors.groups import RewardGroup

SEQUENCES = 256
"""Answers that an engine is taken to sample at once where ``rollout.max_num_seqs`` does not say."""
QUEUED = 2
"""How many times as many are given to it, so that it never waits for new ones."""
MOMENT_S = 1.0
"""How long an engine samples before its answers are fetched; nobody waits for single ones."""
SAMPLING_KEYS = ("max_new_tokens", "stop_tokens", "temperature", "top_p", "top_k", "min_p", "dtype", "max_model_tokens")
REWARD_KEYS = (
    "model", "function", "url", "source", "parameters", "form", "scored_token", "normalize", "judge", "weight", "gate", "floor",
    "ensemble", "reduction", "k",
)  # fmt: skip
JUDGE_LIMITS = {"max_requests", "max_tokens", "max_cost", "prompt_price", "reply_price", "concurrency", "tries"}
"""Keys of a judge that decide no reward: what it may cost, and how fast it is asked."""


@dataclass(frozen=True)
class Prepared:
    """What is known before an engine starts."""

    config: GenerateConfig
    chat: ChatFormat
    ends: EndTokens
    prompts: Sequence[TokenizedPrompt]

    @property
    def forms(self) -> set[Form]:
        """Whether the prompts are texts, conversations, or some of them both."""
        return {"text" if prompt.messages is None else "conversation" for prompt in self.prompts}

    def made_of(self) -> dict[str, Any]:
        """What decides the answers and their rewards, as plain JSON."""
        config, digest = self.config, hashlib.sha256()
        for prompt in self.prompts:
            digest.update(json.dumps([prompt.prompt_id, prompt.token_ids, str(prompt.label)]).encode())
        seed = {"seed": config.run.seed} if config.run.deterministic else {}
        identity = {
            "model": config.model.model_dump(),
            "files": model_files(config.model.path),
            "prompts": digest.hexdigest(),
            "samples": config.samples,
            "greedy": config.greedy,
            "ends": sorted(self.ends.ids),
            "sampling": {key: getattr(config.rollout, key) for key in SAMPLING_KEYS},
            "reward": None if config.reward is None else _identity(config.reward),
            **seed,
        }
        return dict(json.loads(json.dumps(identity)))


@dataclass(frozen=True)
class Asked:
    """The part of a job that says where rewards come from."""

    reward: RewardConfig


def generate(config: GenerateConfig, output: OutputFile, *, place: Place | None = None) -> GenerationReport:
    """Answer every prompt, score the answers, and write the rows that ``config.select`` takes to ``output``.

    All answers are kept beside it (:func:`answers_path`). Engines and reward models run in ``place``, or on Ray if there is
    none. Raises :class:`ResumableStop` where answers are missing that the same call would sample.
    """
    output.check()
    kept = answers_path(output.path)
    sample_answers(config, kept, place=place)
    return _write_rows(config, kept, output)


def sample_answers(config: GenerateConfig, kept: Path, *, place: Place | None = None) -> None:
    """Have every prompt answered and scored in the file ``kept``; what it holds already is not sampled again.

    Raises :class:`ResumableStop` where answers are missing that the same call would sample.
    """
    prepared = prepare(config)
    made_of = prepared.made_of()
    if not _is_finished(kept, made_of):
        reads = [Path(path) for _, path in config.data_paths()]
        with _resumable(kept), GrowingFile(kept, made_of, reads) as journal:
            _answer_the_rest(prepared, journal, made_of, place)


def answers_path(output: Path) -> Path:
    """Where all answers are kept whose chosen rows are at ``output``: best.jsonl has best.answers.jsonl beside it."""
    return output.with_name(f"{output.stem}.answers.jsonl")


def prepare(config: GenerateConfig) -> Prepared:
    """Read and encode the prompts; refuses those that are too long, and a reward source that cannot be made."""
    if config.reward is not None:
        for key, source in config.reward.sources.items():
            check_user_source(key, source)
    chat = ChatFormat(load_tokenizer(config.policy), config.data.template_variables)
    split = load_prompts(config.data, chat.tokenizer, config.run.seed, config.row_reader)
    if split.dropped[TOO_LONG] and not config.data.drops_bad_rows:
        most = config.data.max_prompt_tokens
        raise DataError(
            f"{split.dropped[TOO_LONG]} of {len(split.train) + sum(split.dropped.values())} prompts have more than {most} "
            "tokens (data.max_prompt_tokens): raise that and rollout.max_model_tokens with it, or leave them out with "
            "data.bad_rows=drop"
        )
    talks = any(prompt.messages is not None for prompt in split.train)
    ends = load_end_tokens(config.policy, chat, config.rollout.stop_tokens, conversations=talks)
    ends.log("generate")
    return Prepared(config, chat, ends, split.train)


def _is_finished(kept: Path, made_of: Mapping[str, Any]) -> bool:
    """Whether all answers are there already, from an earlier call that asked for the same."""
    if not kept.is_file() or kept.with_name(kept.name + UNFINISHED).exists():
        return False
    before, prompts = read_answers(kept)
    if before == made_of:
        errors = [answer.error for prompt in prompts for answer in prompt.answers if answer.error is not None]
        get_logger().info(
            "%s holds all answers already; rows are chosen of these%s", kept,
            f"; {len(errors)} have no reward, such as: {errors[0]} (remove the file to begin anew)" if errors else "",
        )  # fmt: skip
        return True
    changed = ", ".join(sorted(key for key in {*before, *made_of} if before.get(key) != made_of.get(key)))
    raise RequestError(
        f"{kept} holds the answers of another job (other {changed}): remove it, or name another --output"
    )


@contextmanager
def _resumable(kept: Path) -> Iterator[None]:
    """Turn an interrupt into a :class:`ResumableStop`: each line is on disk as soon as it is written."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise ResumableStop(
            f"stopped on request; the answers that are there are kept in {kept}, and the same command goes on after them"
        ) from error


def _answer_the_rest(prepared: Prepared, journal: GrowingFile, made_of: Mapping[str, Any], place: Place | None) -> None:
    """Answer every prompt that has no line yet."""
    if journal.done == 0:
        journal.extend([first_line(made_of)])
    _, there = read_answers(journal.path)
    done = {prompt.prompt_id for prompt in there}
    rest = [prompt for prompt in prepared.prompts if prompt.prompt_id not in done]
    if done and rest:
        get_logger().info("%s: %d prompts are answered already; %d are left", journal.path, len(done), len(rest))
    aside: list[int] = []
    if rest:
        config = prepared.config
        if config.reward is not None:
            averages = with_averages(config.reward, journal.path.with_suffix(".averages"))
            prepared = replace(prepared, config=config.model_copy(update={"reward": averages}))
        with ExitStack() as opened:
            here = place or opened.enter_context(Cluster.for_job(prepared.config, together=True))
            aside = _sample(prepared, rest, journal, here, opened, len(done))
    if aside:
        raise ResumableStop(
            f"{len(aside)} of {len(prepared.prompts)} prompts have no answers, because three engines died with each of them, "
            f"such as row {aside[0]} (from 0) of the prompts: leave them out, or let the same command try them again"
        )
    journal.finish()


def _sample(
    prepared: Prepared,
    prompts: Sequence[TokenizedPrompt],
    journal: GrowingFile,
    place: Place,
    cleanup: ExitStack,
    done: int,
) -> list[int]:
    """Start what answers and scores, and have every prompt answered; returns the ids of those that were set aside."""
    config = prepared.config
    engines = place_engines(place, config.rollout)
    source = _make_source(prepared, place, cleanup, journal.path.with_suffix(".judges"))
    setup = RolloutSetup(
        config.rollout,
        str(find_directory(config.model.path, config.model.revision)),
        prepared.ends.ids,
        config.run.seed if config.run.deterministic else request_seed(config.run.seed, done, 0, 0) >> 1,
        config.run.deterministic,
    )
    fleet = load_fixed_fleet(engines, setup, place.config.start_timeout_s)
    cleanup.callback(fleet.stop)  # before the engines end, whose deaths would be taken for failures
    requests = [_requests(config, prompt) for prompt in prompts]
    sequences = QUEUED * (config.rollout.max_num_seqs or SEQUENCES)
    stopped = Event()
    cleanup.callback(stopped.set)  # before the sources close, which a thread that scores would start again
    pump = Pump(fleet, timeout_s=config.rollout.timeout_s, at_once=sequences, moment_s=MOMENT_S)
    finish = partial(_finish, _Finishing(prepared, source, journal, {one.prompt_id: one for one in prompts}, stopped))
    in_work = math.ceil(sequences / config.samples) * config.rollout.engines + 1
    answered = answer_all(pump, requests, finish, in_work=in_work)
    ended = progress(answered, f"prompts answered, {config.samples} answers each", total=len(prompts))
    return [one.requests[0].prompt_id for one in ended if not one.generations]


def _requests(config: GenerateConfig, prompt: TokenizedPrompt) -> list[GenerationRequest]:
    return make_requests(
        [(prompt.prompt_id, prompt.token_ids)],
        samples_per_prompt=config.samples,
        max_new_tokens=config.rollout.max_new_tokens,
        run_seed=config.run.seed if config.run.deterministic else None,
        greedy=config.greedy,
    )


@dataclass(frozen=True)
class _Finishing:
    """What answers go through on their way to the disk."""

    prepared: Prepared
    source: RewardSource | None
    journal: GrowingFile
    prompts: Mapping[int, TokenizedPrompt]
    stopped: Event
    """That nobody waits for the answers any more."""


def _finish(to: _Finishing, ended: Sequence[Answered]) -> None:
    """Score the answers of some prompts, and keep each prompt with its answers in a line."""
    groups = [(to.prompts[one.requests[0].prompt_id], one.generations) for one in ended]
    tokenizer, stops = to.prepared.chat.tokenizer, frozenset(to.prepared.ends.ids)
    samples = [
        [
            text_sample(
                prompt,
                one.sample_index,
                one.token_ids,
                finished=one.finish_reason == FinishReason.STOP,
                tokenizer=tokenizer,
                stop_tokens=stops,
            )
            for one in generations
        ]
        for prompt, generations in groups
    ]
    flat = [sample for group in samples for sample in group]
    results = None if to.source is None else iter(_score(to.prepared.config.reward, to.source, flat, to.stopped))
    lines = [
        answered_prompt(prompt, generations, group, None if results is None else [next(results) for _ in group]).line()
        for (prompt, generations), group in zip(groups, samples, strict=True)
    ]
    to.journal.extend(lines)


def _score(
    reward: RewardConfig | None, source: RewardSource, samples: Sequence[TextSample], stopped: Event
) -> list[ScoreResult]:
    """A result for each sample; raises :class:`ScoringError` where one has no reward and the config says to stop."""
    assert reward is not None, "a source comes from it"

    def pause(seconds: float) -> None:
        if stopped.wait(seconds):
            raise ScoringError("the command has been stopped, so that these answers are not scored again")

    results = score_or_hold(source, samples, hold_s=reward.hold_s, sleep=pause)
    failed = [result for result in results if result.reward is None]
    if failed and not reward.drops:
        passing = [result for result in failed if result.fault == "source"]
        tried = f", {len(passing)} of them after tries of {reward.hold_s:g} s" if passing else ""
        raise ScoringError(
            f"no reward for {len(failed)} of {len(samples)} answers{tried}, such as: {failed[0].error}; the answers before "
            "these are kept: mend the reward source and give the same command again, or set reward.on_failure to drop, which "
            "keeps answers without a reward and makes no rows of them"
        )
    return results


def _make_source(prepared: Prepared, place: Place, cleanup: ExitStack, judges: Path) -> RewardSource | None:
    """What gives the rewards, with reward models that are started again where they die; none where none are asked for.

    What judges have spent is kept in the directory ``judges``, over all attempts.
    """
    config = prepared.config
    if config.reward is None:
        return None
    groups = {key: LastingGroup(_Starter(config, place, key)) for key in config.reward.roles}
    return make_reward_source(
        Asked(config.reward),
        groups,
        prepared.chat,
        forms=prepared.forms,
        cleanup=cleanup,
        stop_tokens=prepared.ends.ids,
        judges=judges,
    )


class _Starter:
    """Starts the reward model at a key, and again in the place of one that failed."""

    def __init__(self, config: GenerateConfig, place: Place, key: str) -> None:
        assert config.reward is not None
        self._role, self._place, self._name, self._numbers = config.reward.roles[key], place, group_of(key), count(1)
        tokens = config.rollout.max_model_tokens
        self._setup = RewardSetup(
            self._role,
            config.run.seed,
            max_tokens=max(self._role.forward_tokens(TokenBudget()), tokens),
            max_item_tokens=tokens,
            max_item_bytes=longest_read(tokens),
        )

    def __call__(self, failed: Any) -> RewardGroup:
        if failed is not None and isinstance(self._place, Cluster):
            self._place.stop(failed.ranks)
        number = next(self._numbers)  # names of actors that end are free only a moment later
        name = self._name if number == 1 else f"{self._name}-{number}"
        return place_reward_group(self._place, self._setup, name=name, places=self._name).load().result()


def _write_rows(config: GenerateConfig, kept: Path, output: OutputFile) -> GenerationReport:
    """Choose rows of all answers, write them, and say what was sampled."""
    _, prompts = read_answers(kept)
    prompts.sort(key=lambda prompt: prompt.prompt_id)
    scored = config.reward is not None
    choice = Choice(config.select, config.top, config.cut_answers == "keep", config.condition, scored)
    rows, left_out = choose(prompts, choice)
    if not rows:
        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.items()) or "there were none"
        raise DataError(
            f"no answer is left to write to {output.path} ({reasons}): all are kept in {kept}; where they are cut off, raise "
            "rollout.max_new_tokens, name the token that ends an answer in rollout.stop_tokens, or set cut_answers to keep"
        )
    output.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    figures = {**answer_figures(prompts, scored=scored), "rows": float(len(rows))}
    rewards = [row[key] for row in rows for key in ("reward", "chosen_value") if key in row]
    if rewards:
        figures["chosen_reward"] = sum(rewards) / len(rewards)
    kl = kl_of_choice(prompts, choice)
    if kl is not None and scored:
        figures["kl"] = kl
    return GenerationReport(output.path, kept, figures, best_of(prompts), dict(left_out))


def _identity(reward: RewardConfig) -> dict[str, Any]:
    """Where rewards come from, without what only says how fast."""
    hidden = {"judge": JUDGE_LIMITS}
    return {
        key: {
            "files": [model_files(model.path) for model in source.models],
            **{
                name: value
                for name, value in source.model_dump(mode="json", exclude=hidden).items()
                if name in REWARD_KEYS
            },
        }
        for key, source in reward.sources.items()
    } | {"floor": reward.floor, "steps": reward.steps}
