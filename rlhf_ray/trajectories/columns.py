"""The columns that a trajectory batch may hold: the shape, dtype, meaning, unit and writer of each.

Invariants:

- A column is listed here once, with everything a reader must know about it; the tables in ``docs/algorithms.md`` are these.
- A batch may also hold columns that are not listed. They hold one number per sequence, of one of :data:`FREE_DTYPES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Literal

import torch


class FinishReason(IntEnum):
    """Why sampling of an answer ended."""

    STOP = 0
    LENGTH = 1
    ABORT = 2


@dataclass(frozen=True)
class FinishReasonFacts:
    """The documentation of one finish reason."""

    meaning: str
    writer: str
    """Who sets it; modules of the package stand in backquotes."""


_ENGINES = "`rollout/vllm_engine.py`, `rollout/transformers_engine.py`"

FINISH_REASONS: Mapping[FinishReason, FinishReasonFacts] = MappingProxyType(
    {
        FinishReason.STOP: FinishReasonFacts(
            "The policy ended the answer itself: it sampled the end of sequence or one of `rollout.stop_tokens`, which is "
            "the last action of the answer. The only reason that counts as finished.",
            _ENGINES,
        ),
        FinishReason.LENGTH: FinishReasonFacts(
            "The answer reached `rollout.max_new_tokens` and was cut off; its last action is an ordinary token.",
            _ENGINES,
        ),
        FinishReason.ABORT: FinishReasonFacts(
            "Something outside the policy ended the answer early. It is treated as cut off.",
            "`environments/episodes.py` at `rollout.environment.max_turns`, or a collector of your own; the engines sample an "
            "interrupted answer again instead",
        ),
    }
)


@dataclass(frozen=True)
class Column:
    """The documentation of one column, and the shape and dtype that are checked."""

    over: Literal["tokens", "sequences", "kept", "routers"]
    """One number for each token, standing at the token it describes; one for each sequence; as many for each token as the
    column ``kept_sizes`` says; or ``top_k`` for each token and router."""
    dtype: torch.dtype | None
    """None where any of :data:`FREE_DTYPES` will do."""
    unit: str
    meaning: str
    writer: str
    """Who makes the column; modules of the package stand in backquotes."""


_GATHER = "`rollout/requests.py`, from what the engines sampled"
_PREPARATION = "`algorithms/preparation.py`"
_PAIRS = "`data/batches.py`, from the rows of the data"

COLUMNS: Mapping[str, Column] = MappingProxyType(
    {
        "token_ids": Column(
            "tokens",
            torch.int64,
            "index in the policy's vocabulary",
            "The prompt and the answer, as the model reads them.",
            f"{_GATHER}; `data/batches.py` for supervised jobs",
        ),
        "action_mask": Column(
            "tokens",
            torch.bool,
            "true or false",
            "True where the policy sampled the token, or in supervised fine-tuning should have. The sampled end of "
            "sequence is an action; the first token of a sequence never is.",
            f"{_GATHER}; `data/batches.py` for demonstrations",
        ),
        "weight_version": Column(
            "tokens",
            torch.int32,
            "number of the publication",
            "The version of the weights that sampled the token; -1 at tokens that were not sampled.",
            _GATHER,
        ),
        "rollout_log_probs": Column(
            "tokens",
            torch.float32,
            "nats",
            "The rollout engine's log-probability of the token given those before it, at the sampling temperature and over the "
            "set that it was sampled from; 0 at tokens that were not sampled.",
            _GATHER,
        ),
        "kept_sizes": Column(
            "tokens",
            torch.int32,
            "words of `kept_words`",
            "How the set is written among which the token was sampled, where top-k, top-p or min-p cut the vocabulary: n > 0 "
            "for n ids, n < 0 for a bitmap of -n words, 0 for the whole vocabulary and at tokens that were not sampled.",
            f"{_GATHER}, where `rollout.top_k`, `top_p` or `min_p` cut",
        ),
        "kept_words": Column(
            "kept",
            torch.int32,
            "ids, or 32 bits of a bitmap",
            "The sets of all tokens one after another, each as long as `kept_sizes` says (`trajectories/kept_sets.py`).",
            f"{_GATHER}, where `rollout.top_k`, `top_p` or `min_p` cut",
        ),
        "routed_experts": Column(
            "routers",
            None,
            "numbers of experts",
            "The experts that the engine sent the token to, router by router from the first layer on; `uint8` holds up to 255 "
            "experts. 255 (in `int16` -1) at tokens that no engine has read, as the last of an answer "
            "(`trajectories/routed_experts.py`).",
            f"{_GATHER}, where `rollout.routing_replay` is true",
        ),
        "log_probs": Column(
            "tokens",
            torch.float32,
            "nats",
            "The trainer's log-probability of the token at the sampling temperature and over the set that it was sampled from, "
            "under the policy's weights before the first update of the step; 0 at tokens that were not sampled. With "
            "`algorithm.old_log_probs: rollout` it is `rollout_log_probs`.",
            "the policy group (`trainers/ppo/roles.py`)",
        ),
        "reference_log_probs": Column(
            "tokens",
            torch.float32,
            "nats",
            "The same under the reference model, which KL is measured against.",
            "the reference group (`trainers/ppo/roles.py`), where `algorithm.kl.measure` is true",
        ),
        "values": Column(
            "tokens",
            torch.float32,
            "discounted token reward",
            "The critic's estimate, before the first update of the step, of the return from the state in which the token "
            "was chosen.",
            "the critic group (`trainers/ppo/roles.py`), where there is a critic",
        ),
        "token_rewards": Column(
            "tokens",
            torch.float32,
            "shaped score",
            "The reward of the action: its part of the shaped score, less the KL penalty where KL is in the reward; 0 at "
            "other tokens.",
            _PREPARATION,
        ),
        "advantages": Column(
            "tokens",
            torch.float32,
            "shaped score, or its standard deviations after whitening",
            "How much better the action was than expected; 0 at other tokens.",
            _PREPARATION,
        ),
        "returns": Column(
            "tokens",
            torch.float32,
            "discounted token reward",
            "What the critic learns to predict at the action; 0 at other tokens.",
            f"{_PREPARATION}, where there is a critic",
        ),
        "importance_weights": Column(
            "tokens",
            torch.float32,
            "ratio of probabilities",
            "The weight of the action in the policy loss, which corrects for the difference between the rollout engine and "
            "the trainer; 0 at other tokens.",
            _PREPARATION,
        ),
        "prompt_id": Column(
            "sequences",
            torch.int64,
            "row of the prompt in the data",
            "Which prompt the sequence answers. Answers with the same number form a group.",
            _GATHER,
        ),
        "sample_index": Column(
            "sequences",
            torch.int32,
            "count from 0",
            "Which of the answers to its prompt the sequence is.",
            _GATHER,
        ),
        "finish_reason": Column(
            "sequences",
            torch.int8,
            "number of a `FinishReason`",
            "Why sampling of the answer ended.",
            _GATHER,
        ),
        "score": Column(
            "sequences",
            torch.float32,
            "the reward source's own",
            "The reward of the answer as its source gave it, after `reward.normalize` and before `algorithm.shaping`.",
            "`trainers/ppo/experience.py`",
        ),
        "bootstrap_value": Column(
            "sequences",
            torch.float32,
            "discounted token reward",
            "The value of the state after the last action, for an answer whose episode goes on. Without this column the "
            "value is 0.",
            "a collector of your own",
        ),
        "turn_rewards": Column(
            "tokens",
            torch.float32,
            "score",
            "What the environment gave for a turn, at the last action of the turn, and 0 elsewhere; NaN where it failed. Or "
            "what a step of the answer got, at the last token of the step. The score is their sum.",
            "`environments/episodes.py` with an environment, `trainers/ppo/experience.py` with `reward.steps: sum`",
        ),
        "turns": Column(
            "sequences",
            torch.int32,
            "count",
            "How many answers the policy gave in the episode.",
            "`environments/episodes.py`, where there is an environment",
        ),
        "episode_failure": Column(
            "sequences",
            torch.int8,
            "number of an `EpisodeFailure` (`environments/protocol.py`)",
            "Why the environment gave no reward; 0 where it did.",
            "`environments/episodes.py`, where there is an environment",
        ),
        "margin": Column(
            "sequences",
            None,
            "score",
            "By how much the chosen side of the pair should win; for the loss `scaled`, how much the pair counts. The same for "
            "both sides.",
            _PAIRS,
        ),
        "reference_log_prob": Column(
            "sequences",
            torch.float32,
            "nats",
            "The log-probability of the whole answer under the policy before its first update, in training on preferences.",
            "`data/batches.py`, from what the policy said before its first update",
        ),
        "desirable": Column(
            "sequences",
            torch.bool,
            "true or false",
            "Whether the label of the answer says that it is desirable, for `loss.name: kto`.",
            _PAIRS,
        ),
        "grade": Column(
            "sequences",
            None,
            "grade of `loss.name: ordinal`",
            "By how many grades the chosen side of the pair is better; 0 is a tie. The same for both sides.",
            _PAIRS,
        ),
    }
)
"""Every column that the project reads. A mixture of rewards adds ``term_NAME``, the score of each term."""


def _dtypes(over: str) -> Mapping[str, torch.dtype]:
    return MappingProxyType(
        {name: column.dtype for name, column in COLUMNS.items() if column.over == over and column.dtype is not None}
    )


PER_TOKEN = _dtypes("tokens")
"""The dtypes of the columns with one number per token."""

KEPT = _dtypes("kept")
"""The dtypes of the columns with as many numbers per token as ``kept_sizes`` says."""

ROUTED = "routed_experts"
"""The column with a matrix for each token."""

ROUTED_DTYPES = (torch.uint8, torch.int16)
"""Its dtypes."""

PER_SEQUENCE = _dtypes("sequences")
"""The dtypes of the columns with one number per sequence that are listed with a dtype."""

FREE_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
)
"""What a column without a listed dtype may be: everything that travels as a plain array."""
