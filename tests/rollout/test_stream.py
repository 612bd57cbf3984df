"""What is where while a fleet samples without a pause, over every order of assignments, answers, publications and deaths."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.errors import RequestError
from rlhf_ray.rollout.fleet import Answered, Stream
from rlhf_ray.rollout.requests import Generation, GenerationRequest
from rlhf_ray.trajectories.columns import FinishReason

ENGINES, SAMPLES, AT_ONCE = 3, 2, 5


def requests_of(number: int, samples: int = SAMPLES) -> list[GenerationRequest]:
    return [GenerationRequest(100 + number, sample, (1, number), None, 4) for sample in range(samples)]


def generation(request: GenerationRequest, *versions: int) -> Generation:
    tokens = tuple(range(5, 5 + len(versions)))
    return Generation(*request.key, tokens, (-0.5,) * len(versions), versions, FinishReason.LENGTH)


class Fleet:
    """Engines that sample one token at a time, whose answers are complete after four; every claim is asserted as it goes."""

    def __init__(self, at_once: int | None) -> None:
        self.stream = Stream(at_once)
        self.at_once = at_once
        self.incarnations = [0] * ENGINES
        self.version = 1
        self.work: list[dict[tuple[int, int], tuple[GenerationRequest, list[int]]]] = [{} for _ in range(ENGINES)]
        self.given: list[int] = []
        self.ended: dict[int, Answered] = {}
        self.deaths: Counter[int] = Counter()

    def process(self, engine: int) -> tuple[int, int]:
        return engine, self.incarnations[engine]

    def give(self) -> None:
        self.stream.give(len(self.given), requests_of(len(self.given)))
        self.given.append(len(self.given))

    def sample(self, engine: int, tokens: int) -> None:
        """Take on what is new, sample some tokens for each answer, and report those that are complete."""
        process = self.process(engine)
        for request in self.stream.send(process):
            assert request.key not in self.work[engine], "it has this already"
            self.work[engine][request.key] = (request, [])
        self._check_places()
        done = []
        for request, versions in list(self.work[engine].values()):
            versions += [self.version] * min(tokens + request.sample_index, 4 - len(versions))
            if len(versions) == 4:
                del self.work[engine][request.key]
                done.append(generation(request, *versions))
        self._note(self.stream.take(process, done, self.version))

    def assign(self, *engines: int) -> None:
        before = {engine: self.stream.held(self.process(engine)) for engine in range(ENGINES)}
        self.stream.assign([self.process(engine) for engine in engines], self.version)
        for engine in range(ENGINES):
            gained = self.stream.held(self.process(engine)) - before[engine]
            assert gained == 0 or engine in engines, "only those that may get prompts get any"
            if self.at_once is not None:
                assert gained == 0 or before[engine] + gained < self.at_once + SAMPLES

    def publish(self) -> None:
        self.version += 1

    def kill(self, engine: int, sampling: bool) -> None:
        process, lost = self.process(engine), {number for number in self.given if self._has(engine, number)}
        self.incarnations[engine] += 1
        self.work[engine] = {}
        self.deaths.update(lost if sampling else ())
        aside = self.stream.lose(process, "it was killed", sampling=sampling)
        assert {one.number for one in aside} == {number for number in lost if sampling and self.deaths[number] == 3}
        if aside:
            assert len(lost) == 1, "it was tried alone"
        self._note(aside)

    def _has(self, engine: int, number: int) -> bool:
        one = self.stream._prompts.get(number)
        return one is not None and one.process == self.process(engine)

    def _check_places(self) -> None:
        everywhere = [key for work in self.work for key in work]
        assert len(everywhere) == len(set(everywhere)), "no sample is on two engines"

    def _note(self, ended: list[Answered]) -> None:
        for one in ended:
            assert one.number not in self.ended, "no prompt ends twice"
            assert list(one.requests) == requests_of(one.number)
            assert [each.key for each in one.generations] == ([] if one.causes else [each.key for each in one.requests])
            assert bool(one.causes) == (self.deaths[one.number] == 3)
            self.ended[one.number] = one


engine = st.integers(0, ENGINES - 1)
events = st.one_of(
    st.tuples(st.just("give")),
    st.tuples(st.just("give")),
    st.tuples(st.just("assign"), engine, engine),
    st.tuples(st.just("sample"), engine, st.integers(1, 4)),
    st.tuples(st.just("publish")),
    st.tuples(st.just("kill"), engine, st.booleans()),
)


@given(st.sampled_from([None, AT_ONCE]), st.lists(events, max_size=60))
def test_every_prompt_ends_once_with_all_its_samples_or_is_set_aside(at_once: int | None, order: list[tuple]) -> None:
    fleet = Fleet(at_once)
    for name, *arguments in order:
        getattr(fleet, name)(*arguments)
    for _ in range(3 * len(fleet.given) + 8):  # and from wherever it is, it comes to an end
        fleet.assign(*range(ENGINES))
        for number in range(ENGINES):
            fleet.sample(number, 4)
    assert sorted(fleet.ended) == fleet.given
    assert not fleet.stream.processes and fleet.stream.waiting == 0


A, B = (0, 0), (1, 0)


def started(*numbers: int, samples: int = 1) -> Stream:
    stream = Stream()
    for number in numbers:
        stream.give(number, requests_of(number, samples))
    stream.assign([A], 3)
    stream.send(A)
    return stream


def test_what_was_finished_is_kept_when_its_engine_dies_and_the_rest_begins_anew() -> None:
    stream = started(0, samples=3)
    first, second, third = requests_of(0, 3)
    assert stream.take(A, [generation(second, 3, 4)], 4) == []
    assert stream.lose(A, "it was killed", sampling=True) == []
    stream.assign([B], 4)
    assert stream.send(B) == [first, third]
    (ended,) = stream.take(B, [generation(third, 4), generation(first, 4)], 4)
    assert ended.generations == (generation(first, 4), generation(second, 3, 4), generation(third, 4))


@pytest.mark.parametrize(
    ("versions", "message"),
    [((2, 3), "weight versions"), ((4, 3), "weight versions"), ((3, 5), "weight versions"), ((3, 4, 4), None)],
    ids=["older than its begin", "back in time", "not published yet", "right"],
)
def test_only_weights_that_were_published_meanwhile_may_have_sampled(versions: tuple, message: str | None) -> None:
    stream = started(0)
    (request,) = requests_of(0, 1)
    if message is None:
        assert len(stream.take(A, [generation(request, *versions)], 4)) == 1
        return
    with pytest.raises(ValueError, match=message):
        stream.take(A, [generation(request, *versions)], 4)
    assert stream.held(A) == 1, "nothing of it was noted"


def test_answers_that_nobody_asked_this_process_for_are_refused() -> None:
    stream = started(0)
    stream.give(1, requests_of(1, 1))
    stream.assign([B], 3)  # and not yet sent
    for process, number, times in ((A, 1, 1), (B, 0, 1), (B, 1, 1), (A, 0, 2), ((0, 1), 0, 1)):
        with pytest.raises(ValueError, match="other samples than were requested"):
            stream.take(process, [generation(requests_of(number, 1)[0], 3)] * times, 3)
    with pytest.raises(RequestError, match="prompt 7 or one of its samples is in work already"):
        stream.give(7, requests_of(0, 1))


def test_prompts_go_to_the_engine_with_the_fewest_samples_the_earliest_first() -> None:
    stream = Stream(at_once=3)
    for number in (4, 2, 0, 3, 1):
        stream.give(number, requests_of(number))
    stream.assign([A, B], 1)
    assert [request.prompt_id - 100 for request in stream.send(A)] == [0, 0, 2, 2]
    assert [request.prompt_id - 100 for request in stream.send(B)] == [1, 1, 3, 3]
    assert stream.waiting == 1, "neither has room for another"


def test_a_death_while_nothing_was_sampled_is_no_prompts_work() -> None:
    stream = started(0)
    for incarnation in range(5):
        assert stream.lose((0, incarnation), "it was killed by an update", sampling=False) == []
        stream.assign([(0, incarnation + 1)], 3)
    assert stream.held((0, 5)) == 1


def test_the_prompt_with_which_three_engines_die_is_set_aside_and_its_neighbours_are_answered() -> None:
    """All three prompts lose two engines together; the third death is the killer's alone."""
    stream, aside = started(0, 1, 2), []
    process = A
    for _ in range(2):
        aside += stream.lose(process, "out of memory", sampling=True)
        process = (process[0], process[1] + 1)
        stream.assign([process], 3)
        stream.send(process)
    while stream.processes:
        (alone,) = [number for number, one in stream._prompts.items() if one.process == process]
        if alone == 1:
            aside += stream.lose(process, "out of memory", sampling=True)
            process = (process[0], process[1] + 1)
        else:
            stream.take(process, [generation(requests_of(alone, 1)[0], 3)], 3)
        stream.assign([process], 3)
        stream.send(process)
    assert [(one.number, one.generations, one.causes) for one in aside] == [(1, (), ("out of memory",) * 3)]
