"""Make the source of a judge from its section.

Invariants: the key comes from the file or the environment variable that the section names, when the run starts, and stands
nowhere else. What a judge has spent is kept in a file of the run, by the key of its section.
"""

from __future__ import annotations

import os
from pathlib import Path

from rlhf_ray.config.files.places import key_problems
from rlhf_ray.config.files.tokens import read_tokens
from rlhf_ray.config.sections.rewards import JudgeConfig, RewardSourceConfig
from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.judge.budget import Budget, Limits, Prices
from rlhf_ray.rewards.judge.comparing import ComparingSource
from rlhf_ray.rewards.judge.endpoint import Endpoint, EndpointSettings
from rlhf_ray.rewards.judge.questions import Questions
from rlhf_ray.rewards.judge.source import JudgeSource
from rlhf_ray.rewards.judge.verdicts import Scale
from rlhf_ray.rewards.mixture import Part


def make_judge(key: str, settings: RewardSourceConfig, directory: Path | None) -> JudgeSource | ComparingSource:
    """The judge of the reward source at ``key``; ``directory`` keeps what it has spent, None keeps nothing."""
    judge = settings.judge
    assert judge is not None, "the source has a judge"
    name = f"{key}.judge"
    scale = Scale(*judge.scale)
    questions = Questions(
        rubric=judge.rubric,
        parts={part: section.asks for part, section in judge.parts.items()},
        reference=judge.reference,
        scale=scale,
    )
    limits = Limits(judge.max_requests, judge.max_tokens, judge.max_cost)
    budget = Budget(limits, None if directory is None else directory / f"{key}.json")
    endpoint = Endpoint(_endpoint(name, judge, settings), budget, name=name)
    if judge.compare is not None:
        return ComparingSource(endpoint, questions, judge.compare, judge.ranking, both_orders=judge.both_orders)
    parts = {part: Part(section.weight, section.gate) for part, section in judge.parts.items()}
    return JudgeSource(endpoint, questions, scale, parts, judge.floor)


def _endpoint(name: str, judge: JudgeConfig, settings: RewardSourceConfig) -> EndpointSettings:
    return EndpointSettings(
        url=judge.url,
        model=judge.model,
        key=_key(name, judge, settings.token_file),
        longest_reply=judge.max_answer_tokens,
        limit_field=judge.limit_field,
        temperature=judge.temperature,
        parameters=judge.parameters,
        concurrency=judge.concurrency,
        tries=judge.tries,
        timeout_s=settings.timeout_s,
        prices=Prices(judge.prompt_price, judge.reply_price),
    )


def _key(name: str, judge: JudgeConfig, token_file: str | None) -> str | None:
    if token_file is not None:
        return next(iter(read_tokens(token_file)))
    for at, problem in key_problems(name, judge, token_file):
        raise RequestError(f"{at}: {problem}")
    return None if judge.key_variable is None else os.environ[judge.key_variable].strip()
