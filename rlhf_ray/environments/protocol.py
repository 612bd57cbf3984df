"""What an environment is given and returns, and what it means that an episode has no reward.

Invariants: an environment sees texts and never token ids; each of its turns has a finite reward, or the episode has failed with
a reason; a failure is never a reward of 0.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

Observation = str | Sequence[Mapping[str, Any]]
"""What the policy reads before its next answer: a text, or messages of a conversation."""


@dataclass(frozen=True)
class Task:
    """The prompt that an episode begins with, as its row in the data has it."""

    prompt: str
    """The prompt as the policy reads it; of a conversation the text that the chat template gives."""
    label: Any = None
    """What the row holds for judging answers (``data.label_key``)."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """The conversation, where the prompt is one."""
    source: str = ""
    """The name of the data source that the prompt comes from."""
    seed: int = 0
    """For whatever the environment draws. The same for all samples of a prompt in a step; another in the next step."""


@dataclass(frozen=True)
class Answer:
    """What the policy answered in one turn."""

    text: str
    """Without special tokens and without the token that ended it."""
    finished: bool
    """Whether the policy ended it itself; False where it was cut at ``rollout.max_new_tokens``."""


@dataclass(frozen=True)
class Turn:
    """What an environment makes of an answer."""

    reward: float
    """Of this turn; the score of an episode is the sum over its turns."""
    done: bool = True
    """Whether the episode ends here."""
    observation: Observation = ""
    """What the policy reads next; needed unless ``done``."""


class Environment(Protocol):
    """One episode. Its class is what ``rollout.environment.name`` names; one instance is made for each episode.

    It must repeat: the same task and the same answers give the same turns, since an episode is played again in a new process
    where another one took its process down.
    """

    def reset(self, task: Task) -> None:
        """Begin with ``task``."""

    def step(self, answer: Answer) -> Turn:
        """Take an answer."""


class ProcessLost(BaseException):
    """Raised by an environment that can play no more episodes in its process, such as one whose server has died.

    It ends the process, so that the episode has failed and the others are played again in a new one. It is no ``Exception``,
    since every such is a failure of one episode.
    """


class EpisodeFailure(IntEnum):
    """Why an episode has no reward; the numbers of the column ``episode_failure``."""

    NONE = 0
    RAISED = 1
    LATE = 2
    ENDED = 3
    NO_REWARD = 4
    UNREADABLE = 5


FAILURES = {
    EpisodeFailure.RAISED: "raised an error",
    EpisodeFailure.LATE: "did not answer in time (rollout.environment.timeout_s)",
    EpisodeFailure.ENDED: "ended its process",
    EpisodeFailure.NO_REWARD: "returned no turn with a finite reward",
    EpisodeFailure.UNREADABLE: "returned an observation that no prompt can be made of",
}
"""Each failure in words, as it stands where the reward would."""


@dataclass(frozen=True)
class Failed:
    """An episode that has no reward."""

    kind: EpisodeFailure
    reason: str
    """In full, for the log."""


def checked(returned: Any) -> Turn | Failed:
    """What a step returned, if it is a turn with a finite reward and, where it goes on, something to read."""
    if not isinstance(returned, Turn):
        return Failed(EpisodeFailure.NO_REWARD, f"returned {type(returned).__name__}, not a Turn")
    reward = returned.reward
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        return Failed(EpisodeFailure.NO_REWARD, f"returned the reward {reward!r}, which is not a finite number")
    done, observation = bool(returned.done), returned.observation
    if not done and not _is_observation(observation):
        found = f"{type(observation).__name__}, neither a text nor a list of messages"
        return Failed(EpisodeFailure.UNREADABLE, f"returned an observation of type {found}")
    if not done and not observation:
        return Failed(EpisodeFailure.NO_REWARD, "returned a turn that goes on without an observation")
    return Turn(float(reward), done, observation)


def _is_observation(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and all(isinstance(message, Mapping) for message in value)
    )
