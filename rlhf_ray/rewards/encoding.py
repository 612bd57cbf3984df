"""Turns a score request into the token ids that the reward model reads.

Invariants:

- Token ids pass as they are. A text gets special tokens only where it asks for them, and none that it has already.
- Nothing is stripped, but of a text for a model that remembers its chat template what that writes after the end of an answer.
- A conversation is written by the chat template of the reward model's tokenizer as in training (:mod:`rlhf_ray.data.chat`), up
  to the token that ends the answer. A prompt with its response is joined as in training, with one start and one end token,
  where the model reads texts; else they are turns of a conversation.
- An answer that was cut by a limit gets no end token: its score is read at its last token.
- Nothing follows the token at which the model's score is read (:class:`~rlhf_ray.models.reward_reading.RewardReading`).
- An encoder reads a prompt and its response, or a conversation, as a pair of texts (:mod:`rlhf_ray.data.text_pairs`), and a
  text with the special tokens of its tokenizer, since it is read at the first of them.
- An item over the limit is refused unless it asks to be cut, and then it loses its beginning, never the scored end. A
  service refuses one that is many times over it before a tokenizer reads it.
- No error holds a text of the item: of what a template says only what stands in the template itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_ray.data.answer_ids import encode_answers
from rlhf_ray.data.chat import ChatFormat, Conversation
from rlhf_ray.data.chat_template import RefusedConversation
from rlhf_ray.data.text_pairs import conversation_ids, cut_to, pair_ids
from rlhf_ray.errors import DataError, ScoringError
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.rows.conversations import dialogue_messages
from rlhf_ray.rows.preferences import ANSWER_BEGINS

if TYPE_CHECKING:
    from rlhf_ray.models.reward_reading import RewardReading


BYTES_PER_TOKEN, SHORTEST_REFUSED = 64, 65_536
"""A service refuses unread an item with more bytes than this for each token of its limit, and than this in all. No text of a
language has so many; a tokenizer would take seconds for it, in which nobody else is scored."""


@dataclass(frozen=True)
class EncodedItem:
    """The ids of one item, and whether they are only the end of it."""

    token_ids: tuple[int, ...]
    truncated: bool


def encode_request(
    chat: ChatFormat, request: ScoreRequest, *, reading: RewardReading, max_tokens: int, vocabulary: int
) -> EncodedItem:
    """Token ids of ``request``; raises :class:`ScoringError` for an item that cannot be scored as it is.

    ``reading`` is how the reward model reads, ``max_tokens`` the longest item, ``vocabulary`` the number of token ids that
    the model knows.
    """
    try:
        token_ids = reading.scored_ids(_token_ids(chat, request, reading))
    except DataError as error:
        raise ScoringError(_without_texts(error, chat.tokenizer)) from error
    check_item(token_ids, request, max_tokens=max_tokens, vocabulary=vocabulary)
    return EncodedItem(tuple(token_ids[-max_tokens:]), truncated=len(token_ids) > max_tokens)


def longest_read(max_tokens: int) -> int:
    """How many bytes of text an item may have where the limit is ``max_tokens``, for a tokenizer to read it at all."""
    return max(BYTES_PER_TOKEN * max_tokens, SHORTEST_REFUSED)


def refuse_unread(request: ScoreRequest, *, max_bytes: int) -> None:
    """Refuse an item with so many bytes of text that reading it would hold up the others; also one that asks to be cut."""
    size = request.written_bytes()
    if size > max_bytes:
        raise ScoringError(
            f"the item has {size} bytes of text, and this service reads {max_bytes} at most: shorten it, or score a file with "
            "the command score"
        )


def _without_texts(error: DataError, tokenizer: Any) -> str:
    """The message of an error; where a template refuses a conversation, only if the template's own text holds the reason."""
    reason = str(error.__cause__)
    if not isinstance(error, RefusedConversation) or reason in str(tokenizer.chat_template):
        return str(error)
    return (
        f"the tokenizer's chat template refuses the conversation with {type(error.__cause__).__name__}, whose message may hold "
        "texts of the item and is not shown: render it with the tokenizer to see it"
    )


def check_item(token_ids: Sequence[int], request: ScoreRequest, *, max_tokens: int, vocabulary: int) -> None:
    """Refuse an item without a token, with one that the model does not know, or with too many unless it asks to be cut."""
    if not token_ids:
        raise ScoringError("the item is empty: there is no token to score")
    outside = next((token for token in token_ids if not 0 <= token < vocabulary), None)
    if outside is not None:
        raise ScoringError(f"token id {outside} is outside the reward model's vocabulary of {vocabulary}")
    if len(token_ids) > max_tokens and not request.truncate:
        raise ScoringError(
            f"the item has {len(token_ids)} tokens, the limit is {max_tokens}: shorten it, or ask for truncate"
        )


def _token_ids(chat: ChatFormat, request: ScoreRequest, reading: RewardReading) -> list[int]:
    tokenizer = chat.tokenizer
    if request.token_ids is not None:
        return list(request.token_ids)
    if request.text is not None:
        plain = list(tokenizer(reading.without_tail(request.text), add_special_tokens=False)["input_ids"])
        return _with_special_tokens(tokenizer, request.text, plain) if request.add_special_tokens else plain
    if request.messages is not None:
        _require_conversations(tokenizer, reading)
        return _conversation(chat, request.messages, request, reading)
    assert request.prompt is not None and request.response is not None, "a request holds one representation"
    if "text" not in reading.forms:
        return _conversation(chat, _turns(request.prompt, request.response), request, reading)
    before, (after,) = encode_answers(tokenizer, request.prompt, [request.response])
    return [*before, *(after if request.finished else after[:-1])]


def _turns(prompt: str, response: str) -> list[Mapping[str, Any]]:
    """A prompt and its response as turns; as in training, a prompt that is a dialogue written as text has several."""
    dialogue = dialogue_messages(prompt) if prompt.rstrip().endswith(ANSWER_BEGINS) else []
    if dialogue and response.strip():
        return dialogue_messages(prompt + response)
    return [*(dialogue or [{"role": "user", "content": prompt}]), {"role": "assistant", "content": response}]


def _with_special_tokens(tokenizer: Any, text: str, plain: list[int]) -> list[int]:
    """The ids with what the tokenizer puts around a text, without a second start or end token where the text has one.

    An empty text stays empty: special tokens alone are no answer to score.
    """
    if not plain:
        return []
    whole = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if plain[:1] == [start] and whole[:2] == [start, start]:
        whole = whole[1:]
    if plain[-1:] == [end] and whole[-2:] == [end, end]:
        whole = whole[:-1]
    return whole


def _require_conversations(tokenizer: Any, reading: RewardReading) -> None:
    if tokenizer.chat_template is not None and "conversation" not in reading.forms:
        raise ScoringError(
            f"the item is a conversation, but the reward model reads plain texts ({reading.reason}): send prompt and response "
            "as texts"
        )


def _conversation(
    chat: ChatFormat, messages: Sequence[Mapping[str, Any]], request: ScoreRequest, reading: RewardReading
) -> list[int]:
    if chat.tokenizer.chat_template is None:
        raise ScoringError(
            "the item is a conversation, but the reward model's tokenizer has no chat template: send text"
        )
    _require_answer(messages)
    if reading.scored_token == "rendering" and request.finished:
        return chat.rendering_ids(messages, request.tools, request.chat_template_kwargs)
    prompt, answer = chat.encode(messages, request.tools, request.chat_template_kwargs, finished=request.finished)
    return [*prompt, *answer]


def _require_answer(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        raise ScoringError(
            "a conversation is scored at its last answer, so it must end with a message of the assistant"
        )


def encode_text_pair(tokenizer: Any, request: ScoreRequest, *, max_tokens: int, vocabulary: int) -> EncodedItem:
    """Token ids of ``request``; raises :class:`ScoringError` for an item that cannot be scored as it is."""
    try:
        token_ids = _pair_ids(tokenizer, request)
    except DataError as error:
        raise ScoringError(_without_texts(error, tokenizer)) from error
    check_item(token_ids, request, max_tokens=max_tokens, vocabulary=vocabulary)
    return EncodedItem(tuple(cut_to(token_ids, max_tokens)), truncated=len(token_ids) > max_tokens)


def _pair_ids(tokenizer: Any, request: ScoreRequest) -> list[int]:
    if request.token_ids is not None:
        return list(request.token_ids)
    if request.text is not None:
        return _first_token_once(tokenizer, request.text)
    messages: Sequence[Mapping[str, Any]] | None = request.messages
    if messages is None:
        assert request.prompt is not None and request.response is not None, "a request holds one representation"
        if tokenizer.chat_template is None:
            return pair_ids(tokenizer, request.prompt, request.response)
        messages = _turns(request.prompt, request.response)
    _require_answer(messages)
    return conversation_ids(tokenizer, Conversation(messages, request.tools, request.chat_template_kwargs))


def _first_token_once(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text with its special tokens, which are not added again where the text begins with the first of them."""
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text)["input_ids"])
    return plain if plain[:1] == whole[:1] else whole if plain else []
