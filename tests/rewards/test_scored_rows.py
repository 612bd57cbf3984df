"""A row to score is read as training reads it: the same messages and the same tools, whatever the layout of its conversation;
a row that training would refuse, and any other that cannot be scored, has an error of its own, never a number or a traceback.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encode import Drops, encode_pairs
from rlhf_ray.errors import DataError, RlhfRayError
from rlhf_ray.models.reward_reading import training_reading
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.encoding import encode_request
from rlhf_ray.rewards.offline import COLUMNS, row_item, score_rows
from rlhf_ray.rewards.request import DEEPEST, ScoreRequest, ScoreResult
from rlhf_ray.rows.layouts import Keys
from rlhf_ray.rows.preferences import PreferencePair, PreferenceReader
from rlhf_ray.rows.read import read_file

from ..data.chat_templates import SHAPES, make_tokenizer

ASK = {"role": "user", "content": "Time in Rome?"}
CALLS = [{"type": "function", "function": {"name": "clock", "arguments": {"city": "Rome", "zone": None}}}]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"properties": {"city": None, "zone": {}}}}}]
END = {"role": "assistant", "content": "Nine."}
NULL_CALL = [ASK, {"role": "assistant", "content": None, "tool_calls": CALLS}, {"role": "tool", "content": "nine"}, END]
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [ASK, END]},
    "several turns": {"messages": [ASK, END, ASK, END]},
    "system column": {"messages": [ASK, END], "system": "Be brief."},
    "system turn": {"messages": [{"role": "system", "content": "Be brief."}, ASK, END]},
    "null beside a call": {"messages": NULL_CALL, "tools": TOOLS},
    "an empty text beside a call": {"messages": [ASK, {**NULL_CALL[1], "content": ""}, *NULL_CALL[2:]], "tools": TOOLS},
    "no text beside a call": {"messages": [ASK, {"role": "assistant", "tool_calls": CALLS}, *NULL_CALL[2:]]},
    "a call as the answer": {"messages": NULL_CALL[:2], "tools": TOOLS},
    "tools as JSON": {"messages": NULL_CALL, "tools": json.dumps(TOOLS)},
    "parts of text": {"messages": [{"role": "user", "content": PARTS}, END]},
    "reasoning": {"messages": [ASK, {**END, "reasoning_content": "Look at the clock.", "name": None}]},
    "from and value": {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "messages as JSON": {"messages": json.dumps([ASK, END])},
}  # fmt: skip
PROMPTS: dict[str, dict[str, Any]] = {
    "messages and a text": {"prompt": [ASK], "response": "Nine."},
    "messages and messages": {"prompt": [ASK], "response": [END]},
    "messages and one message": {"prompt": [ASK], "response": END},
    "a text with tools": {"prompt": "Time in Rome?", "response": "Nine.", "tools": TOOLS},
    "a text with a system column": {"prompt": "Time in Rome?", "response": "Nine.", "system": "Be brief."},
    "calls before": {"prompt": NULL_CALL[:3], "response": "Nine.", "tools": TOOLS},
}


def trained_pair(row: dict[str, Any], write: Any) -> PreferencePair:
    """A pair whose chosen side is this row, as the reader of training gives it."""
    columns = {name: value for name, value in row.items() if name not in ("messages", "response")}
    answer, other = row.get("messages", row.get("response")), "Another answer."
    last = {"role": "assistant", "content": other}
    if isinstance(answer, list):
        sides = [answer, [*answer[:-1], last]]
    elif isinstance(answer, dict):
        sides = [answer, last]
    else:  # a text, which may hold messages as JSON
        sides = [answer, json.dumps([*json.loads(answer)[:-1], last]) if answer[0] == "[" else other]
    rows = write([{**columns, "chosen": sides[0], "rejected": sides[1]}])
    (pair,) = read_file(rows, PreferenceReader(Keys(), turns=True))
    return pair


@pytest.mark.parametrize("row", [*CONVERSATIONS.values(), *PROMPTS.values()], ids=[*CONVERSATIONS, *PROMPTS])
def test_a_conversation_is_read_as_training_reads_it(row: dict[str, Any], write: Any) -> None:
    item = row_item(row)
    assert isinstance(item, ScoreRequest), item
    pair = trained_pair(row, write)
    assert list(item.messages or ()) == [*pair.prompt, *pair.chosen] and (item.tools or ()) == tuple(pair.tools or ())


def test_nothing_of_a_row_is_lost_or_made_up() -> None:
    one, other = (row_item(CONVERSATIONS[name]) for name in ("null beside a call", "plain"))
    assert isinstance(one, ScoreRequest) and isinstance(other, ScoreRequest)
    assert not any(text == "None" for _, text in one.texts()) and one.messages[1]["content"] == ""  # type: ignore[index]
    assert one != other and one.tools is not None
    with_variables = row_item(
        {"messages": [ASK, END], "chat_template_kwargs": {"enable_thinking": False, "date": None}}
    )
    assert isinstance(with_variables, ScoreRequest)
    assert with_variables.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [ASK]}, "'messages' ends with 'user', but 'assistant' was expected"),
        ({"messages": [END]}, "message 1 of 'messages' is of 'assistant'"),
        ({"messages": [ASK, ASK, END]}, "message 2 of 'messages' is of 'user'"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, "message 2 must hold a text"),
        ({"messages": [ASK, {"role": "narrator", "content": "a"}]}, "has no role that is known"),
        ({"messages": [ASK, {"role": "assistant"}]}, "message 2 must hold a text under 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, END]}, "of the kind 'image_url'"),
        ({"messages": "hello"}, "'messages' must hold a list of messages, this is a text"),
        ({"messages": ["hello"]}, "message 1 must be a mapping"),
        ({"messages": 5}, "'messages' must hold a text or a list of messages, this is of type int"),
        ({"messages": "[{'role': 'user', 'content': 'a'}]"}, "as Python writes them"),
        ({"messages": [{"role": "system", "content": "a"}, ASK, END], "system": "b"}, "keep one"),
        ({"messages": [ASK, END], "tools": "no JSON"}, "'tools' must hold a list of functions"),
        ({"messages": [ASK, END], "chat_template_kwargs": {"tools": []}}, "not the template's own: tools"),
        ({"messages": [ASK, END], "chat_template_kwargs": [1]}, "'chat_template_kwargs' must hold a mapping"),
        ({"prompt": [ASK, END], "response": "b"}, "message 1 of 'response' is of 'assistant'"),
        ({"prompt": [ASK], "response": 5}, "'response' must hold a text or a list of messages, this is of type int"),
        ({"prompt": 5, "response": "b"}, "'prompt' must hold a text or a list of messages"),
        ({"prompt": "a"}, "prompt and response go together"),
        ({"prompt": "a", "response": "b", "text": "c"}, "found text, prompt"),
        ({"text": 5}, "'text' must hold a text, this is of type int"),
        ({"text": "a", "tools": TOOLS}, "there is something under 'tools', for which a text has no place"),
        ({"token_ids": [1, 2.5]}, "'token_ids' must hold a list of whole numbers"),
        ({"token_ids": [True]}, "'token_ids' must hold a list of whole numbers"),
        ({"token_ids": 5}, "'token_ids' must hold a list of whole numbers"),
        ({"other": 1}, "found nothing"),
        ({"text": "a\ud800"}, "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_scored_says_why(row: dict[str, Any], problem: str) -> None:
    item = row_item(row)
    assert isinstance(item, ScoreResult) and problem in str(item.error), item
    assert item.fault == "item" and item.raw is None


def test_an_empty_text_can_be_scored_and_an_empty_cell_is_nothing() -> None:
    assert row_item({"prompt": "a", "response": ""}) == ScoreRequest(prompt="a", response="")
    assert row_item({"prompt": "", "response": "b", "text": ""}) == ScoreRequest(prompt="", response="b")
    assert row_item({"text": ""}) == ScoreRequest(text="")
    assert row_item({"text": "a", "prompt": "", "response": "", "messages": ""}) == ScoreRequest(text="a")
    empty = row_item({"prompt": [ASK], "response": ""})
    assert isinstance(empty, ScoreRequest) and empty.messages == (ASK, {"role": "assistant", "content": ""})


def test_a_table_of_numpy_is_read_as_lists() -> None:
    class Sizes:
        def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
            return Pending.done(
                [ScoreResult.of(float(len(request.token_ids or request.messages))) for request in requests]
            )  # type: ignore[arg-type]

    rows = [{"token_ids": np.array([4, 5, 6])}, {"messages": np.array([ASK, END], dtype=object)}]
    assert [result.raw for result in score_rows(rows, Sizes(), truncate=False).result()] == [3.0, 2.0]


def test_what_is_nested_too_deeply_is_an_error_of_its_row() -> None:
    deep: Any = "x"
    for _ in range(DEEPEST + 5):
        deep = [deep]
    assert "nested deeper" in str(getattr(row_item({"messages": [{**ASK, "name": deep}, END]}), "error", ""))
    with pytest.raises(Exception, match="nested deeper"):
        ScoreRequest(messages=({**ASK, "name": deep}, END))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls", "text", "x"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "human", "x"]) | values},
        optional={"content": values, "tool_calls": values},
    ),
    max_size=4,
)


@given(
    st.dictionaries(st.sampled_from([*COLUMNS, "tools", "system", "chat_template_kwargs"]), values | turns, max_size=5)
)
def test_no_row_raises_and_what_is_asked_for_is_whole(row: dict[str, Any]) -> None:
    item = row_item(row)
    if isinstance(item, ScoreRequest):
        assert all(isinstance(turn["role"], str) and isinstance(turn["content"], str) for turn in item.messages or ())
    else:
        assert item.error


def test_training_refuses_what_score_refuses(write: Any) -> None:
    for messages in ([ASK], [END], [ASK, ASK, END]):
        with pytest.raises(DataError):
            trained_pair({"messages": messages}, write)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_read_has_the_ids_of_training_under_every_shape_of_template(name: str, write: Any) -> None:
    chat = ChatFormat(make_tokenizer(SHAPES[name]))
    limits = {"reading": training_reading(chat.tokenizer), "max_tokens": 10_000, "vocabulary": 10_000}
    compared = 0
    for row in (*CONVERSATIONS.values(), *PROMPTS.values()):
        pair = trained_pair(row, write)
        outcome = encoded(lambda pair=pair: encode_pairs(chat, [pair], 10_000, Drops()))  # type: ignore[misc]
        item = row_item(row)
        assert isinstance(item, ScoreRequest)
        scored = encoded(lambda item=item: encode_request(chat, item, **limits))  # type: ignore[misc]
        if isinstance(outcome, str) or isinstance(scored, str):
            assert isinstance(outcome, str) and isinstance(scored, str), (outcome, scored)
            continue
        compared += 1
        assert list(scored.token_ids) == list(outcome[0].chosen)
    assert compared >= 10, "most rows can be written by every template"


def encoded(encode: Any) -> Any:
    """What was encoded, or why it was refused."""
    try:
        return encode()
    except RlhfRayError as error:
        return str(error)
