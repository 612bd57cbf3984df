"""Plays a user's environments in a process of their own, which can be ended when one hangs and may die without harm.

    python -m rlhf_ray.environments.process NAME PARAMETERS FD PARENT

Invariants: every question is answered by a turn or a failure; each turn, played again or new, has the time limit for itself; an
episode that hangs or takes its process with it costs only itself: the others are played again up to where they were, in a new
process. One that then goes otherwise has failed, since its environment does not repeat.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from rlhf_ray.environments.protocol import Answer, EpisodeFailure, Failed, ProcessLost, Task, Turn, checked
from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.function_process import FunctionProcess, begin
from rlhf_ray.rewards.functions import Failure
from rlhf_ray.user_code import ENVIRONMENTS, accepts, attribute_of, check_parameters, construct, load_object

KEY = "rollout.environment.name"


@dataclass(frozen=True)
class Question:
    """An episode so far: its last answer is the one that the environment is asked about."""

    episode: tuple[int, int]
    """Prompt id and sample index."""
    task: Task
    answers: tuple[Answer, ...]
    turns: tuple[Turn, ...]
    """What came of the answers before the last."""


class EnvironmentProcess(FunctionProcess):
    """Environments of one class, in a process that is started at once and again whenever it was ended."""

    module = __name__
    key = KEY

    def __init__(self, name: str, parameters: Mapping[str, Any], timeout_s: float) -> None:
        self.parameters = dict(parameters)
        super().__init__(name, timeout_s)

    @property
    def arguments(self) -> list[str]:
        """The class and what it is made with."""
        return [self.name, json.dumps(self.parameters)]

    def ask(self, questions: Sequence[Question]) -> list[Turn | Failed]:
        """What each environment makes of its last answer, in order."""
        outcomes = self.run([{"question": [question]} for question in questions])
        return [_outcome(one) for one in outcomes]

    def too_late(self, samples: int) -> Failure:
        """How a question ends that was not answered in time."""
        return Failure(f"did not answer within {self.timeout_s:g} s (rollout.environment.timeout_s)", may_pass=True)


def _outcome(outcome: Any) -> Turn | Failed:
    if isinstance(outcome, Failure):
        kind = EpisodeFailure.LATE if outcome.reason.startswith("did not answer") else EpisodeFailure.ENDED
        return Failed(kind, outcome.reason)
    assert isinstance(outcome, Turn | Failed), "the process sends nothing else"
    return outcome


class Episodes:
    """The environments of the episodes that are under way, in the process that plays them."""

    def __init__(self, name: str, factory: Any, parameters: Mapping[str, Any]) -> None:
        self.name, self.factory, self.parameters = name, factory, parameters
        self._under_way: dict[tuple[int, int], tuple[Any, int]] = {}

    def answer(self, question: Question, played_again: Callable[[], None]) -> Turn | Failed:
        """The turn that follows the last answer; earlier ones are played first where they were not played here.

        ``played_again`` is called after each of these.
        """
        environment, played = self._under_way.pop(question.episode, (None, 0))
        try:
            if environment is None or played != len(question.turns):
                environment = construct(KEY, self.name, self.factory, self.parameters)
                environment.reset(question.task)
                for answer, turn in zip(question.answers, question.turns, strict=False):
                    if checked(environment.step(answer)) != turn:
                        return Failed(EpisodeFailure.RAISED, "went otherwise when it was played again: it must repeat")
                    played_again()
            outcome = checked(environment.step(question.answers[-1]))
        except (Exception, SystemExit) as error:  # the environment is the user's program, and fails in its own ways
            return Failed(EpisodeFailure.RAISED, f"raised {error!r}")
        if isinstance(outcome, Turn) and not outcome.done:
            self._under_way[question.episode] = environment, len(question.answers)
        return outcome

    def keep(self, episodes: set[tuple[int, int]]) -> None:
        """Forget all others, which have ended elsewhere."""
        self._under_way = {key: value for key, value in self._under_way.items() if key in episodes}


def load_environment(name: str, parameters: Mapping[str, Any]) -> Any:
    """The class that ``name`` names; :class:`RequestError` where it is no environment or does not take ``parameters``."""
    factory = load_object(KEY, name, group=ENVIRONMENTS, kind="class")
    check_parameters(KEY, name, factory, parameters)
    reset, step = (attribute_of(factory, word) for word in ("reset", "step"))
    if not isinstance(factory, type) or not accepts(reset, "self", "task") or not accepts(step, "self", "answer"):
        raise RequestError(
            f"{KEY} {name!r}: it is no environment: give the class methods reset(self, task) and step(self, answer)"
        )
    return factory


def run_child(name: str, parameters: Mapping[str, Any], connection: Connection) -> None:
    """Load the class, make one environment of it, and answer questions until the parent process is gone."""
    try:
        factory = load_environment(name, parameters)
        construct(KEY, name, factory, parameters)  # what it cannot be made with is named before a model is loaded
        episodes = Episodes(name, factory, parameters)
        connection.send((("question",), False))
    except RequestError as error:
        connection.send(str(error))
        return
    while True:
        try:
            calls, _ = connection.recv()
        except EOFError:
            return
        questions = [call["question"][0] for call in calls]
        episodes.keep({question.episode for question in questions})
        for number, question in enumerate(questions):
            try:
                outcome = episodes.answer(question, partial(connection.send, (number, None)))
            except ProcessLost as error:
                raise SystemExit(f"{KEY} {name!r}: {error}") from None
            connection.send((number, outcome))


if __name__ == "__main__":
    run_child(sys.argv[1], json.loads(sys.argv[2]), begin(f"{KEY} {sys.argv[1]}", *sys.argv[3:]))
