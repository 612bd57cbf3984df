"""A source answers every request with a value or an error, in order; nothing turns an error into a number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from rlhf_ray.console import get_logger
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.errors import GroupError, ScoringError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import ModelSource, score_or_hold
from tests.data.chat_templates import EOS, SHAPES, make_tokenizer
from tests.rewards.answers import answer

get_logger()  # set up before pytest looks where to listen


POLICY = ChatFormat(make_tokenizer(SHAPES["an end of the turn and then an end of the conversation"]))
SAMPLES = [
    answer("a", "x", "1", token_ids=(1, 2)),
    answer("b", "yy", None, finished=False),
    answer("c", "zzz", "3", messages=({"role": "user", "content": "c"}, {"role": "assistant", "content": "zzz"})),
]


def raws(results: Sequence[ScoreResult]) -> list[float | None]:
    return [result.raw for result in results]


class Scorer:
    """A model that answers these scores and remembers what it was asked."""

    def __init__(self, results: list[ScoreResult]) -> None:
        self.results = results
        self.received: list[ScoreRequest] = []

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        self.received = list(requests)
        return Pending.done(self.results)


def test_a_models_scores_are_normalised_where_its_statistics_are_known() -> None:
    results = [ScoreResult.of(3.0, 5), ScoreResult.failed("too long", 9), ScoreResult.of(-1.0, 2)]
    plain = ModelSource(Scorer(results), policy=None).score(SAMPLES).result()
    assert plain == results
    normalised = ModelSource(Scorer(results), policy=POLICY, mean=1.0, std=2.0).score(SAMPLES).result()
    assert [result.reward for result in normalised] == [1.0, None, -1.0]
    assert raws(normalised) == [3.0, None, -1.0]
    assert normalised[1] == results[1]


def test_ids_pass_where_the_tokenizer_is_the_policys_and_text_is_rendered_again_elsewhere() -> None:
    scorer = Scorer([ScoreResult.of(0.0)] * 3)
    ModelSource(scorer, policy=POLICY).score(SAMPLES).result()
    assert [
        request.token_ids[: len(sample.token_ids)] for request, sample in zip(scorer.received, SAMPLES, strict=True)
    ] == [sample.token_ids for sample in SAMPLES]
    ModelSource(scorer, policy=None).score(SAMPLES).result()
    assert scorer.received == [
        ScoreRequest(prompt="a", response="x"),
        ScoreRequest(prompt="b", response="yy", finished=False),
        ScoreRequest(messages=SAMPLES[2].messages),
    ]


def test_a_finished_answer_ends_in_the_token_that_training_ends_it_with_and_a_cut_one_in_its_last() -> None:
    """Two other tokens stop answers as well; a text ends in the tokenizer's own end, a conversation in the template's."""
    text_end, turn_end, other = POLICY.tokenizer.convert_tokens_to_ids([EOS, "<|end|>", "x"])
    source = ModelSource(Scorer([]), policy=POLICY, stop_tokens=(text_end, turn_end, other))

    def ended(ids: tuple[int, ...], **fields: Any) -> tuple[int, ...] | None:
        return source.request(answer("a", "b", None, token_ids=ids, **fields)).token_ids

    talk: Any = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    for stop in (text_end, turn_end, other):
        assert ended((5, 6, stop)) == (5, 6, text_end)
        assert ended((5, 6, stop), messages=talk) == (5, 6, turn_end)
        assert ended((5, 6, stop), messages=talk, finished=False) == (5, 6, stop)
    assert ended((5, 6), messages=talk) == (5, 6, turn_end), "a collector of the user's own may leave the end out"


def test_what_a_template_reads_besides_the_messages_is_handed_on() -> None:
    tools, variables = ({"type": "function", "function": {"name": "find"}},), {"enable_thinking": False}
    call: Any = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "find"}}]},
    )
    sample = replace(answer("a", "", None, messages=call), tools=tools, template_variables=variables)
    request = ModelSource(Scorer([]), policy=None).request(sample)
    assert request == ScoreRequest(messages=call, tools=tools, chat_template_kwargs=variables)


class Clock:
    """Time that passes only by sleeping, and by what a call takes."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


class Scripted:
    """A source that answers one list of results after the other, each a second late; raises what is an error."""

    reads = "nothing"

    def __init__(self, clock: Clock, answers: Iterator[list[ScoreResult] | Exception]) -> None:
        self.clock, self.answers = clock, answers
        self.received: list[list[str]] = []

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        self.received.append([sample.prompt for sample in samples])
        self.clock.now += 1.0
        answer = next(self.answers)

        def wait() -> list[ScoreResult]:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return Pending(wait)


def hold(answers: Iterator[Any], hold_s: float) -> tuple[list[ScoreResult], Scripted, Clock]:
    clock = Clock()
    source = Scripted(clock, answers)
    return score_or_hold(source, SAMPLES, hold_s=hold_s, clock=clock, sleep=clock.sleep), source, clock


OK, LATE = ScoreResult.of, ScoreResult.failed("not now", fault="source")


def test_only_what_failed_is_asked_again_and_lands_in_its_place() -> None:
    answers = iter([[LATE, OK(2.0), LATE], [LATE, OK(3.0)], [OK(1.0)]])
    results, source, clock = hold(answers, 100.0)
    assert raws(results) == [1.0, 2.0, 3.0]
    assert source.received == [["a", "b", "c"], ["a", "c"], ["a"]]
    assert clock.slept == [1.0, 1.0]


def test_a_source_that_failed_as_a_whole_is_asked_again_for_everything() -> None:
    results, source, _ = hold(iter([ScoringError("down"), [OK(1.0), LATE, OK(3.0)], [OK(2.0)]]), 100.0)
    assert raws(results) == [1.0, 2.0, 3.0]
    assert source.received == [["a", "b", "c"], ["a", "b", "c"], ["b"]]


def always(answer: Callable[[], Any]) -> Iterator[Any]:
    while True:
        yield answer()


def test_what_still_fails_in_the_end_keeps_its_error(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        results, source, clock = hold(always(lambda: ScoringError("down")), 4.5)
    assert [(result.raw, result.error, result.fault) for result in results] == [(None, "down", "source")] * 3
    assert clock.slept == [1.0, 1.0, 0.5], "a try takes 1 s: the last one begins when the time is over"
    assert len(source.received) == 4
    assert caplog.messages == [
        "3 of 3 samples have no reward, such as sample 0 of prompt 7 (down): trying again for 4.5 s"
    ]


def test_without_time_to_hold_nothing_is_asked_twice() -> None:
    results, source, clock = hold(iter([[OK(1.0), LATE, OK(3.0)]]), 0.0)
    assert raws(results) == [1.0, None, 3.0]
    assert (len(source.received), clock.slept) == (1, [])


@pytest.mark.parametrize("fault", ["item", "model"])
def test_what_no_other_try_would_change_is_not_tried(fault: Any) -> None:
    failed = ScoreResult.failed("never", fault=fault)
    results, source, clock = hold(iter([[OK(1.0), failed, OK(3.0)]]), 100.0)
    assert results[1] == failed
    assert (len(source.received), clock.slept) == (1, [])


def test_a_group_that_died_is_not_held() -> None:
    with pytest.raises(GroupError):
        hold(iter([GroupError("reward", 0, "score", "its process died")]), 100.0)
