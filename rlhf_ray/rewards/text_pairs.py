"""Turns a score request into the token ids that an encoder reads.

Invariants: token ids pass as they are; a text gets the special tokens of the tokenizer, since an encoder is read at the first
of them; a prompt and its response, and a conversation, are a pair of texts (:mod:`rlhf_ray.data.text_pairs`). An item over
the limit is refused unless it asks to be cut.
"""

from __future__ import annotations

from typing import Any

from rlhf_ray.data.text_pairs import conversation_ids, cut_to, pair_ids
from rlhf_ray.errors import ScoringError
from rlhf_ray.rewards.encoding import EncodedItem, check_item
from rlhf_ray.rewards.request import ScoreRequest


def encode_text_pair(tokenizer: Any, request: ScoreRequest, *, max_tokens: int, vocabulary: int) -> EncodedItem:
    """Token ids of ``request``; raises :class:`ScoringError` for an item that cannot be scored as it is."""
    token_ids = _token_ids(tokenizer, request)
    check_item(token_ids, request, max_tokens=max_tokens, vocabulary=vocabulary)
    return EncodedItem(tuple(cut_to(token_ids, max_tokens)), truncated=len(token_ids) > max_tokens)


def _token_ids(tokenizer: Any, request: ScoreRequest) -> list[int]:
    if request.token_ids is not None:
        return list(request.token_ids)
    if request.text is not None:
        return _text_ids(tokenizer, request.text)
    messages = request.messages
    if messages is None:
        assert request.prompt is not None and request.response is not None, "a request holds one representation"
        if tokenizer.chat_template is None:
            return pair_ids(tokenizer, request.prompt, request.response)
        turns = (("user", request.prompt), ("assistant", request.response))
        messages = tuple({"role": role, "content": text} for role, text in turns)
    if not messages or messages[-1]["role"] != "assistant":
        raise ScoringError(
            "a conversation is scored at its last answer, so it must end with a message of the assistant"
        )
    tools = [dict(tool) for tool in request.tools] if request.tools else None
    try:
        return conversation_ids(tokenizer, messages, tools=tools, **(request.chat_template_kwargs or {}))
    except Exception as error:  # a template is a program of its own, and may refuse a conversation with any error
        raise ScoringError(f"the reward model's chat template refuses the conversation: {error}") from error


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text with its special tokens, which are not added again where the text begins with the first of them."""
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text)["input_ids"])
    return plain if plain[:1] == whole[:1] else whole if plain else []
