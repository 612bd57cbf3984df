"""``rlhf-ray rescore``: the samples of a PPO run, or answers of ``generate``, scored with another reward.

Invariants: nothing of a run is changed. Answers are compared with answers to the same prompt alone, in a run of the same step.
A sample without a reward, of then or of now, is counted and compared with none.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.config.files.tokens import read_tokens
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.rewards import RewardConfig
from rlhf_ray.console import get_logger, on_one_line, progress, say, table
from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.evaluation import pair_order, rank_correlation
from rlhf_ray.launch.sampling.answers import AnsweredPrompt, read_answers
from rlhf_ray.launch.score import load_scorer
from rlhf_ray.rewards.client import RewardClient
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import ModelSource, RewardSource, Scorer, score_or_hold
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.storage import OutputFile
from rlhf_ray.trainers.ppo.rewards import RemoteScorer, make_function_source

SAMPLES_PER_CALL = 512
MOST_CHANGED = 10
"""Prompts that are shown."""
MOST_REASONS = 3
SHOWN = 60
"""Characters of a prompt that are shown."""


@dataclass(frozen=True)
class Rescored:
    """A sample with its reward of then and of now."""

    group: str
    """The prompt that it answers, in a run with the step."""
    sample: TextSample
    before: float | None
    now: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Change:
    """The answers to one prompt, whose order has changed."""

    group: str
    prompt: str
    ordered: int
    flipped: int


@dataclass(frozen=True)
class RescoreReport:
    """What another reward makes of the samples."""

    figures: Mapping[str, float]
    """``samples``, ``without_reward``, ``mean_before``, ``mean_now``, ``rank_correlation`` over all samples,
    ``rank_correlation_within`` (the mean over prompts), ``pairs`` of one prompt that both rewards order, ``flipped`` (the share
    of them in another order). What has no value is left out."""
    changed: Sequence[Change]
    """The prompts with the most flips, the first with most."""
    rescored: Sequence[Rescored]


def read_samples(source: str | Path) -> list[Rescored]:
    """All samples that a run kept, or all answers of a file of ``generate``."""
    if Path(source).is_file():
        _, prompts = read_answers(Path(source))
        samples = [one for prompt in prompts for one in _of_answers(prompt)]
        if not samples:
            raise RequestError(f"{source} holds no answers: name a file that rlhf-ray generate keeps them in")
        return samples
    run = RunDirectory.open(source)
    run.read_samples()  # refuses a run that has none
    steps = run.sampled_steps()
    rows = [(step, number, row) for step in steps for number, row in enumerate(run.read_samples(step)[1])]
    if any("prompt_id" not in row for _, _, row in rows):
        get_logger().warning(
            "%s keeps of conversations only what the policy read, from before samples kept their messages: a reward model that "
            "reads conversations sees them as text of the user", run.path,
        )  # fmt: skip
    return [_of_row(step, number, row) for step, number, row in rows]


def rescore(
    samples: Sequence[Rescored], score: Callable[[Sequence[TextSample]], Sequence[ScoreResult]]
) -> RescoreReport:
    """Score all samples with ``score`` and compare."""
    done: list[Rescored] = []
    starts = range(0, len(samples), SAMPLES_PER_CALL)
    for start in progress(starts, f"rescoring {len(samples)} samples, {SAMPLES_PER_CALL} at a time"):
        part = samples[start : start + SAMPLES_PER_CALL]
        results = score([one.sample for one in part])
        done += [
            Rescored(one.group, one.sample, one.before, result.reward, result.error)
            for one, result in zip(part, results, strict=True)
        ]
    return compare(done)


def compare(rescored: Sequence[Rescored]) -> RescoreReport:
    """The figures of samples that have both rewards."""
    known = [(one, one.before, one.now) for one in rescored if one.before is not None and one.now is not None]
    changes, within = list[Change](), list[float]()
    for group, members in groupby(sorted(known, key=lambda each: each[0].group), key=lambda each: each[0].group):
        mine = list(members)
        before, now = [each[1] for each in mine], [each[2] for each in mine]
        changes.append(Change(group, mine[0][0].sample.prompt, *pair_order(before, now)))
        if (correlation := rank_correlation(before, now)) is not None:
            within.append(correlation)
    pairs, flipped = sum(one.ordered for one in changes), sum(one.flipped for one in changes)
    before, now = [each[1] for each in known], [each[2] for each in known]
    figures = {
        "samples": float(len(rescored)),
        "without_reward": float(len(rescored) - len(known)),
        "mean_before": _mean(before),
        "mean_now": _mean(now),
        "rank_correlation": rank_correlation(before, now) if known else None,
        "rank_correlation_within": _mean(within),
        "pairs": float(pairs),
        "flipped": flipped / pairs if pairs else None,
    }
    if not known:
        raise ScoringError(
            f"nothing to compare: of {len(rescored)} samples none has both rewards ({_reasons(rescored)}): mend the other "
            "reward, or name samples that had a reward"
        )
    most = sorted((one for one in changes if one.flipped), key=lambda one: (-one.flipped, one.group))
    return RescoreReport({name: value for name, value in figures.items() if value is not None}, most, rescored)


def rescore_with_model(config: ServeConfig, samples: Sequence[Rescored]) -> RescoreReport:
    """The same with a reward model on Ray."""
    with Cluster.for_job(config, together=True) as cluster:
        return rescore(samples, _scored_by(model_source(load_scorer(cluster, config)), 0.0))


def rescore_with(reward: RewardConfig, samples: Sequence[Rescored]) -> RescoreReport:
    """The same with a service or a function."""
    with ExitStack() as opened:
        if reward.url is not None:
            token = next(iter(read_tokens(reward.token_file)), None)
            client = RewardClient(reward.url, token=token, timeout_s=reward.timeout_s, hold_s=0.0)
            opened.callback(client.close)
            client.info()  # a service that is not there is told before anything is asked of it
            source: RewardSource = model_source(RemoteScorer(client))
        else:
            source = make_function_source(str(reward.function), reward, opened)
        return rescore(samples, _scored_by(source, reward.hold_s))


def model_source(scorer: Scorer) -> ModelSource:
    """A reward model that reads texts: of samples that were kept there are no ids."""
    return ModelSource(scorer, policy=None)


def _scored_by(source: RewardSource, hold_s: float) -> Callable[[Sequence[TextSample]], list[ScoreResult]]:
    def score(samples: Sequence[TextSample]) -> list[ScoreResult]:
        results = score_or_hold(source, samples, hold_s=hold_s)
        failed = next((result.error for result in results if result.fault == "source"), None)
        if failed is not None:
            raise ScoringError(f"the other reward failed: {failed}")
        return results

    return score


def print_report(report: RescoreReport) -> None:
    """Show the figures, and the prompts whose answers change places."""
    say(
        table("another reward", ("figure", "value"), [(name, f"{value:.4g}") for name, value in report.figures.items()])
    )
    if report.figures["without_reward"]:
        say(f"without a reward: {_reasons(report.rescored)}")
    if report.changed:
        rows = [
            (one.group, f"{one.flipped} of {one.ordered}", on_one_line(one.prompt)[-SHOWN:])
            for one in report.changed[:MOST_CHANGED]
        ]
        say(table("prompts whose answers change places", ("prompt", "pairs flipped", "its end"), rows))


def _reasons(rescored: Sequence[Rescored]) -> str:
    """Why samples have no reward, the most frequent reasons first."""
    why = Counter(
        "it had none before" if one.before is None else on_one_line(one.error or "no reason was given")
        for one in rescored
        if one.before is None or one.now is None
    )
    said = [f"{number} because {reason}" for reason, number in why.most_common(MOST_REASONS)]
    rest = why.total() - sum(number for _, number in why.most_common(MOST_REASONS))
    return "; ".join([*said, *([f"{rest} for other reasons"] if rest else [])])


def write_rescored(report: RescoreReport, output: OutputFile) -> None:
    """Write every sample with both rewards."""
    lines = [
        {
            "group": one.group,
            "prompt": one.sample.prompt,
            "response": one.sample.response,
            "before": one.before,
            "now": one.now,
            **({} if one.error is None else {"error": one.error}),
        }
        for one in report.rescored
    ]
    output.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _of_answers(prompt: AnsweredPrompt) -> list[Rescored]:
    fields = {
        "prompt": prompt.prompt if isinstance(prompt.prompt, str) else str(prompt.prompt[-1]["content"]),
        "messages": None if isinstance(prompt.prompt, str) else prompt.prompt,
        "tools": prompt.tools,
        "chat_template_kwargs": prompt.template_variables,
        "label": prompt.label,
        "source": prompt.source,
    }
    return [
        Rescored(
            f"row {prompt.prompt_id}",
            _sample({**fields, "response": one.response, "finished": one.finished}, prompt.prompt_id, number),
            one.reward,
        )
        for number, one in enumerate(prompt.answers)
    ]


def _of_row(step: int, number: int, row: Mapping[str, Any]) -> Rescored:
    prompt = row.get("prompt_id", row["prompt"])
    name = f"step {step}, row {prompt}" if "prompt_id" in row else f"step {step}, {on_one_line(str(prompt))[-SHOWN:]}"
    return Rescored(name, _sample(row, row.get("prompt_id", -1), number), float(row["score"]))


def _sample(row: Mapping[str, Any], prompt_id: int, number: int) -> TextSample:
    messages, tools = row.get("messages"), row.get("tools")
    answer = {"role": "assistant", "content": row["response"]}
    return TextSample(
        prompt_id=prompt_id,
        sample_index=number,
        prompt=row["prompt"],
        response=row["response"],
        label=row.get("label"),
        finished=row.get("finished", True),
        token_ids=(),
        source=row.get("source") or "",
        messages=None if messages is None else (*messages, answer),
        tools=None if tools is None else tuple(tools),
        template_variables=row.get("chat_template_kwargs"),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
