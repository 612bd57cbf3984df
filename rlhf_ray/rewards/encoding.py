"""From a score request to the token ids that the reward model reads.

Always true: nothing is added to token ids or text, nothing is stripped, a template or end-of-sequence token is applied
once and only to messages and to a prompt with its response; an item over the limit is refused unless it asks to be cut,
and then it loses its beginning, never the scored end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_ray.errors import ScoringError
from rlhf_ray.rewards.request import ScoreRequest


@dataclass(frozen=True)
class EncodedItem:
    token_ids: tuple[int, ...]
    truncated: bool


def encode_request(tokenizer: Any, request: ScoreRequest, *, max_tokens: int, vocabulary: int) -> EncodedItem:
    """Token ids of ``request``; raises :class:`ScoringError` for an item that cannot be scored as asked."""
    token_ids = _token_ids(tokenizer, request)
    if not token_ids:
        raise ScoringError("the item is empty: there is no token to score")
    outside = [token for token in token_ids if not 0 <= token < vocabulary]
    if outside:
        raise ScoringError(f"token id {outside[0]} is outside the reward model's vocabulary of {vocabulary}")
    if len(token_ids) <= max_tokens:
        return EncodedItem(tuple(token_ids), truncated=False)
    if not request.truncate:
        raise ScoringError(
            f"the item has {len(token_ids)} tokens, the limit is {max_tokens}: shorten it, or ask for truncate"
        )
    return EncodedItem(tuple(token_ids[-max_tokens:]), truncated=True)


def _token_ids(tokenizer: Any, request: ScoreRequest) -> list[int]:
    if request.token_ids is not None:
        return list(request.token_ids)
    if request.text is not None:
        return list(tokenizer(request.text, add_special_tokens=False)["input_ids"])
    if request.messages is not None:
        return _templated(tokenizer, [dict(message) for message in request.messages])
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": request.prompt}, {"role": "assistant", "content": request.response}]
        return _templated(tokenizer, turns)
    ids = list(tokenizer(f"{request.prompt}{request.response}", add_special_tokens=True)["input_ids"])
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _templated(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    if tokenizer.chat_template is None:
        raise ScoringError(
            "the item is a conversation, but the reward model's tokenizer has no chat template: send text"
        )
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
