"""Play episodes of several turns: in each round all that are under way are answered in one call, and their environments asked.

Invariants:

- Ids in, ids out: the prompt of a turn is all ids before it, byte for byte, and then what stands between the turns.
- An answer belongs to its episode by prompt and sample, wherever it stands. Where there is none, since the prompt was set
  aside, the episode is left out.
- Only what was sampled is an action, with the log-prob and the weight version that it was sampled with.
- The reward of a turn stands at its last action. An episode whose environment failed has no reward (NaN), and never 0.
- An episode that its environment ended is finished if its last answer was; one that ran out of turns was aborted, and one that
  ran out of tokens has the finish reason ``LENGTH``.
- With seeds, a turn is sampled with a seed of its own, which follows from that of the first turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from rlhf_ray.console import get_logger
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.environments.bridge import Bridge
from rlhf_ray.environments.process import Question
from rlhf_ray.environments.protocol import Answer, EpisodeFailure, Failed, Task, Turn
from rlhf_ray.rollout.requests import GenerationRequest, Key, request_seed
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.columns import KEPT, PER_TOKEN, ROUTED, FinishReason

Generate = Callable[[Sequence[GenerationRequest]], TrajectoryBatch]
"""Samples an answer to each request, in order."""


class Asked(Protocol):
    """The environments of a run."""

    def ask(self, questions: Sequence[Question]) -> list[Turn | Failed]:
        """What each environment makes of its last answer, in order."""


@dataclass(frozen=True)
class Limits:
    """What ends an episode that its environment does not."""

    turns: int
    tokens: int
    """Of prompt, answers and observations together."""


@dataclass
class Episode:
    """One episode under way."""

    request: GenerationRequest
    """Of its next answer."""
    prompt: TokenizedPrompt
    task: Task
    known: int = 0
    """How many ids stand in ``parts`` already."""
    parts: list[tuple[TrajectoryBatch, slice]] = field(default_factory=list)
    """For each turn the rows of a batch's columns over tokens that are new in it."""
    row: int = 0
    """Its row in the batch of its last turn."""
    answers: list[Answer] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Where each turn's last action stands in the episode."""
    failure: EpisodeFailure = EpisodeFailure.NONE
    reason: str = ""
    """Of the failure, in full."""
    finish: FinishReason = FinishReason.STOP

    @property
    def question(self) -> Question:
        """What its environment is asked."""
        return Question(self.request.key, self.task, tuple(self.answers), tuple(self.turns))


class EpisodePlayer:
    """Plays episodes with the environments of a run; ``stop_tokens`` are the ids that end an answer."""

    def __init__(
        self, environments: Asked, bridge: Bridge, limits: Limits, stop_tokens: Sequence[int], name: str
    ) -> None:
        self.environments, self.bridge, self.limits = environments, bridge, limits
        self.stop_tokens, self.name = frozenset(stop_tokens), name
        self.tokenizer: Any = bridge.chat.tokenizer

    def play(
        self,
        requests: Sequence[GenerationRequest],
        prompts: Mapping[int, TokenizedPrompt],
        generate: Generate,
        *,
        run_seed: int,
        step: int,
    ) -> TrajectoryBatch:
        """The episodes of all ``requests``, which ask for their first answers, as one batch in this order.

        An episode whose prompt ``generate`` leaves out is left out. Beside the columns of ``generate`` the batch has
        ``turn_rewards``, ``turns`` and ``episode_failure``.
        """
        episodes = [
            Episode(request, prompt, _task(prompt, request_seed(run_seed, step, prompt.prompt_id, -1)))
            for request in requests
            for prompt in [prompts[request.prompt_id]]
        ]
        under_way = list(episodes)
        for turn in range(self.limits.turns):
            batch = generate([episode.request for episode in under_way])
            rows = {key: row for row, key in enumerate(_keys(batch))}
            lost = {episode.request.key for episode in under_way} - rows.keys()
            episodes = [episode for episode in episodes if episode.request.key not in lost]
            under_way = [episode for episode in under_way if episode.request.key not in lost]
            for episode in under_way:
                self._take(episode, batch, rows[episode.request.key])
            if not under_way:
                break
            outcomes = self.environments.ask([episode.question for episode in under_way])
            for episode, outcome in zip(under_way, outcomes, strict=True):
                self._judge(episode, outcome)
            going_on = [episode for episode in under_way if not episode.failure and not episode.turns[-1].done]
            going_on = [episode for episode in going_on if self._go_on(episode, turn + 1)]
            self._warn(under_way)
            under_way = going_on
            if not under_way:
                break
        return join(episodes) if episodes else join_none(batch)

    def _take(self, episode: Episode, batch: TrajectoryBatch, row: int) -> None:
        start, stop = batch.offsets[row : row + 2].tolist()
        new = batch["token_ids"][start + len(episode.request.token_ids) : stop].tolist()
        episode.parts.append((batch, slice(start + episode.known, stop)))
        episode.known, episode.row = stop - start, row
        episode.ends.append(stop - start - 1)
        episode.finish = FinishReason(int(batch["finish_reason"][row]))
        finished = episode.finish == FinishReason.STOP
        text = new[:-1] if finished and new[-1] in self.stop_tokens else new
        episode.answers.append(Answer(self.tokenizer.decode(text, skip_special_tokens=True), finished))
        episode.request = replace(episode.request, token_ids=(*episode.request.token_ids, *new))

    def _judge(self, episode: Episode, outcome: Turn | Failed) -> None:
        """Take what the environment made of an answer."""
        if isinstance(outcome, Turn):
            episode.turns.append(outcome)
        else:
            episode.failure, episode.reason = outcome.kind, outcome.reason

    def _go_on(self, episode: Episode, turn: int) -> bool:
        """Whether an episode has another turn; its request is then that of the next answer."""
        if turn == self.limits.turns:
            episode.finish = FinishReason.ABORT
            return False
        request, finished = episode.request, episode.answers[-1].finished
        try:
            between = self.bridge.between(episode.prompt, episode.turns[-1].observation, finished=finished)
        except Exception as error:  # a chat template is a program, and refuses what it is given in its own ways
            reason = f"returned an observation that no prompt can be made of: {error}"
            episode.failure, episode.reason = EpisodeFailure.UNREADABLE, reason
            return False
        ids = (*request.token_ids, *between)
        room = self.limits.tokens - len(ids)
        if room < 1:
            episode.finish = FinishReason.LENGTH
            return False
        seed = None if request.seed is None else request_seed(request.seed, turn, *request.key)
        limit = min(request.max_new_tokens, room)
        episode.request = replace(request, token_ids=ids, seed=seed, max_new_tokens=limit)
        return True

    def _warn(self, episodes: Sequence[Episode]) -> None:
        failed = [episode for episode in episodes if episode.failure]
        if failed:
            prompt, sample = failed[0].request.key
            get_logger("environments").warning(
                "rollout.environment %s: %d of %d episodes failed in a turn, such as sample %d of prompt %d: it %s",
                self.name, len(failed), len(episodes), sample, prompt, failed[0].reason,
            )  # fmt: skip


def join(episodes: Sequence[Episode]) -> TrajectoryBatch:
    """All episodes as one batch, in order."""
    lengths = torch.tensor([episode.known for episode in episodes])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    first = episodes[0].parts[0][0]
    tensors: dict[str, torch.Tensor] = {}
    for name in first.columns:
        if name in PER_TOKEN:
            tensors[name] = torch.cat([batch[name][rows] for episode in episodes for batch, rows in episode.parts])
        elif name == ROUTED:
            tensors[name] = torch.cat([batch[name][rows] for episode in episodes for batch, rows in _read(episode)])
        elif name in KEPT:
            words = [batch[name][_words(batch, rows)] for episode in episodes for batch, rows in episode.parts]
            tensors[name] = torch.cat(words)
        else:
            tensors[name] = torch.stack([episode.parts[-1][0][name][episode.row] for episode in episodes])
    rewards = torch.zeros(int(offsets[-1]))
    for start, episode in zip(offsets.tolist(), episodes, strict=False):
        for position, turn in zip(episode.ends, episode.turns, strict=False):
            rewards[start + position] = turn.reward
        if episode.failure:
            rewards[start + episode.ends[-1]] = math.nan
    tensors["finish_reason"] = torch.tensor([int(episode.finish) for episode in episodes], dtype=torch.int8)
    tensors["turn_rewards"] = rewards
    tensors["turns"] = torch.tensor([len(episode.answers) for episode in episodes], dtype=torch.int32)
    tensors["episode_failure"] = torch.tensor([int(episode.failure) for episode in episodes], dtype=torch.int8)
    return TrajectoryBatch(offsets, tensors)


def join_none(batch: TrajectoryBatch) -> TrajectoryBatch:
    """No episodes, with the columns that :func:`join` gives them; ``batch`` is what was generated last."""
    turns, failures = (torch.zeros(0, dtype=dtype) for dtype in (torch.int32, torch.int8))
    return batch.select([]).with_columns(turn_rewards=torch.zeros(0), turns=turns, episode_failure=failures)


def _keys(batch: TrajectoryBatch) -> list[Key]:
    return list(zip(batch["prompt_id"].tolist(), batch["sample_index"].tolist(), strict=True))


def _read(episode: Episode) -> list[tuple[TrajectoryBatch, slice]]:
    """For each turn the rows of tokens that an engine read first in it; that of the last token of an answer is the next."""
    last = len(episode.parts) - 1
    return [
        (batch, slice(rows.start - (turn > 0), rows.stop - (turn < last)))
        for turn, (batch, rows) in enumerate(episode.parts)
    ]


def _words(batch: TrajectoryBatch, rows: slice) -> slice:
    """Where the words of the kept sets of these tokens stand."""
    sizes = batch["kept_sizes"].abs()
    return slice(int(sizes[: rows.start].sum()), int(sizes[: rows.stop].sum()))


def _task(prompt: TokenizedPrompt, seed: int) -> Task:
    return Task(prompt.text, prompt.label, prompt.messages, prompt.source, seed)
