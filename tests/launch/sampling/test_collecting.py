"""Every prompt is finished once, by one thread at a time; the first error ends it; not more is begun than was asked for."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

import pytest

from rlhf_ray.errors import ScoringError
from rlhf_ray.launch.sampling import collecting
from rlhf_ray.launch.sampling.collecting import answer_all
from rlhf_ray.rollout.fleet import Answered
from rlhf_ray.rollout.requests import Generation, GenerationRequest, make_requests
from rlhf_ray.trajectories.columns import FinishReason


class Sampling:
    """Ends a drawn part of what it was given at each turn; one prompt in seven is set aside."""

    def __init__(self, seed: int) -> None:
        self.draw, self.held, self.most = random.Random(seed), list[tuple[int, Sequence[GenerationRequest]]](), 0

    def give(self, number: int, requests: Sequence[GenerationRequest]) -> None:
        self.held.append((number, requests))
        self.most = max(self.most, len(self.held))

    def turn(self) -> list[Answered]:
        self.draw.shuffle(self.held)
        count = self.draw.randint(0, len(self.held))
        ended, self.held = self.held[:count], self.held[count:]
        return [
            Answered(number, tuple(requests), () if number % 7 == 6 else tuple(map(generation, requests)))
            for number, requests in ended
        ]


def generation(request: GenerationRequest) -> Generation:
    return Generation(*request.key, (1,), (0.0,), (0,), FinishReason.STOP)


def prompts(count: int) -> list[list[GenerationRequest]]:
    return [make_requests([(number, [5])], samples_per_prompt=2, max_new_tokens=1) for number in range(count)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("seconds", [0.0, 0.002])
def test_every_prompt_is_finished_once_by_one_thread_at_a_time(
    seed: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "AT_ONCE", 3)
    sampling, finished, inside = Sampling(seed), list[int](), threading.Lock()

    def finish(batch: Sequence[Answered]) -> None:
        assert inside.acquire(blocking=False), "another thread is finishing"
        time.sleep(seconds)
        assert 1 <= len(batch) <= 3
        finished.extend(one.number for one in batch)
        inside.release()

    yielded = [one.number for one in answer_all(sampling, prompts(40), finish, in_work=9)]
    assert sorted(yielded) == [*range(40)]
    assert sorted(finished) == [number for number in range(40) if number % 7 != 6]
    assert sampling.most <= 9


def test_the_first_error_ends_it_and_nothing_is_finished_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "AT_ONCE", 2)
    calls = list[int]()

    def finish(batch: Sequence[Answered]) -> None:
        calls.append(len(batch))
        if len(calls) == 3:
            raise ScoringError("the reward went away")

    with pytest.raises(ScoringError, match="went away"):
        list(answer_all(Sampling(1), prompts(40), finish, in_work=9))
    assert len(calls) == 3


def test_no_more_is_begun_while_much_waits_to_be_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "AT_ONCE", 1)
    monkeypatch.setattr(collecting, "UNFINISHED", 5)
    sampling, free, done = Sampling(2), threading.Event(), list[int]()
    threading.Timer(0.5, free.set).start()
    given_while_held = list[int]()

    def finish(batch: Sequence[Answered]) -> None:
        if not free.wait(5.0):
            raise AssertionError("never freed")
        done.extend(one.number for one in batch)

    give = sampling.give

    def note(number: int, requests: Sequence[GenerationRequest]) -> None:
        if not free.is_set():
            given_while_held.append(number)
        give(number, requests)

    monkeypatch.setattr(sampling, "give", note)
    list(answer_all(sampling, prompts(60), finish, in_work=4))
    assert len(done) == sum(number % 7 != 6 for number in range(60))
    assert len(given_while_held) <= 5 + 4 + 60 // 7 + 1
