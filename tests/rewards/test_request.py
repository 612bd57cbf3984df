"""A request holds exactly one representation, whose messages have a role and a text or calls of tools; a result holds finite
numbers or an error, never both and never neither.
"""

from __future__ import annotations

import inspect
import itertools
import math
import pickle
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.rewards import ScoreRequest, ScoreResult

REPRESENTATIONS: dict[str, dict[str, object]] = {
    "token_ids": {"token_ids": (1, 2)},
    "text": {"text": "a"},
    "messages": {"messages": ({"role": "user", "content": "a"},)},
    "prompt": {"prompt": "a", "response": "b"},
}


@pytest.mark.parametrize("count", range(5))
def test_a_request_holds_exactly_one_representation(count: int) -> None:
    for names in itertools.combinations(REPRESENTATIONS, count):
        values = {key: value for name in names for key, value in REPRESENTATIONS[name].items()}
        if count == 1:
            assert vars(ScoreRequest(**values)).items() >= values.items()
        else:
            with pytest.raises(RequestError, match=f"found {', '.join(names) or 'nothing'}"):
                ScoreRequest(**values)


@pytest.mark.parametrize("half", [{"prompt": "a"}, {"response": "b"}, {"text": "a", "response": "b"}])
def test_a_prompt_and_its_response_go_together(half: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="go together"):
        ScoreRequest(**half)


def test_empty_is_a_representation_of_its_own() -> None:
    assert ScoreRequest(token_ids=()).token_ids == ()
    assert ScoreRequest(text="").text == ""
    assert ScoreRequest(prompt="", response="").response == ""


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("text", {"text": "ab\ud800"}),
        ("prompt", {"prompt": "ab\ud800", "response": ""}),
        ("response", {"prompt": "", "response": "ab\udfff"}),
        ("messages", {"messages": ({"role": "user", "content": "ab\ud800"},)}),
        ("messages", {"messages": ({"role": "us\ud800", "content": ""},)}),
        ("messages", {"messages": ({"role": "user", "content": "", "name": {"a": ["ab\ud800"]}},)}),
        ("messages", {"messages": ({"role": "user", "content": "", "ab\ud800": 1},)}),
        ("tools", {"messages": (), "tools": ({"name": "ab\ud800"},)}),
        ("chat_template_kwargs", {"messages": (), "chat_template_kwargs": {"ab\ud800": 1}}),
    ],
)
def test_half_a_surrogate_pair_is_no_text(where: str, values: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=f"{where} holds half of a surrogate pair at character 2"):
        ScoreRequest(**values)


CALLS = [{"type": "function", "function": {"name": "clock", "arguments": {}}}]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("hello", "message 2 must be a mapping with 'role' and 'content', this is of type str"),
        ({"content": "a"}, "message 2 must have a text under 'role', this is nothing"),
        ({"role": 1, "content": "a"}, "message 2 must have a text under 'role', this is of type int"),
        ({"role": "assistant"}, "message 2 must have a text under 'content', or 'tool_calls', this is nothing"),
        ({"role": "assistant", "content": None}, "message 2 must have a text under 'content'"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "message 2 must have a text under 'content'"),
        ({"role": "assistant", "content": [{"type": "image"}]}, "this is a list with parts of the kind 'image'"),
        ({"role": "assistant", "content": [{"type": "a secret"}]}, "this is a list with parts that are no texts"),
        ({"role": "assistant", "content": ["a"], "tool_calls": CALLS}, "this is a list with parts that are no texts"),
        ({"role": "assistant", "content": []}, "this is a list with parts that are no texts"),
    ],
)
def test_a_message_has_a_role_and_a_text_or_calls_of_tools(message: object, problem: str) -> None:
    with pytest.raises(RequestError, match=re.escape(problem)):
        ScoreRequest(messages=({"role": "user", "content": ""}, message))


def test_a_call_of_tools_needs_no_text_and_its_texts_count() -> None:
    request = ScoreRequest(
        messages=(
            {"role": "assistant", "content": None, "tool_calls": CALLS},
            {"role": "assistant", "tool_calls": CALLS},
        ),
        tools=({"name": "clock"},),
        chat_template_kwargs={"enable_thinking": False},
    )
    assert [text for name, text in request.texts() if name == "messages"].count("clock") == 2
    assert [text for name, text in request.texts() if name == "tools"] == ["clock"]
    assert [text for name, text in request.texts(keys=True) if name == "tools"] == ["name", "clock"]


@pytest.mark.parametrize("values", [{"token_ids": (1,)}, {"text": "a"}, {"prompt": "a", "response": "b"}])
def test_tools_and_variables_are_for_what_a_template_writes(values: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="tools are for messages"):
        ScoreRequest(**values, tools=({"name": "clock"},))
    if "prompt" in values:
        assert ScoreRequest(**values, chat_template_kwargs={"enable_thinking": False})
    else:
        with pytest.raises(RequestError, match="chat_template_kwargs are for messages"):
            ScoreRequest(**values, chat_template_kwargs={"enable_thinking": False})


def test_a_variable_never_takes_the_place_of_an_argument_of_apply_chat_template() -> None:
    from transformers import PreTrainedTokenizerBase

    for name in [*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"]:
        if name not in ("self", "kwargs"):
            with pytest.raises(RequestError, match=f"not the template's own: {name}"):
                ScoreRequest(messages=(), chat_template_kwargs={name: "x"})
    with pytest.raises(RequestError, match="chat_template_kwargs must be a mapping, this is of type list"):
        ScoreRequest(messages=(), chat_template_kwargs=[1])


@given(
    raw=st.none() | st.floats(),
    reward=st.none() | st.floats(),
    error=st.none() | st.text(),
    fault=st.sampled_from([None, "item", "model", "source"]),
)
@example(raw=math.nan, reward=1.0, error=None, fault=None)
@example(raw=1.0, reward=-math.inf, error=None, fault=None)
@example(raw=1.0, reward=None, error=None, fault=None)
@example(raw=None, reward=None, error=None, fault=None)
@example(raw=1.0, reward=1.0, error="both", fault="item")
@example(raw=None, reward=None, error="whose", fault=None)
def test_a_result_holds_finite_numbers_or_an_error(
    raw: float | None, reward: float | None, error: str | None, fault: object
) -> None:
    scored = None not in (raw, reward) and math.isfinite(raw) and math.isfinite(reward)
    right = (scored and error is None and fault is None) or (
        raw is None and reward is None and error is not None and fault is not None
    )
    if right:
        result = ScoreResult(raw=raw, reward=reward, error=error, fault=fault)
        assert pickle.loads(pickle.dumps(result)) == result
    else:
        with pytest.raises(ScoringError):
            ScoreResult(raw=raw, reward=reward, error=error, fault=fault)


@given(st.floats())
def test_what_a_model_returns_becomes_a_number_or_an_error(raw: float) -> None:
    result = ScoreResult.of(raw, 7, truncated=True)
    assert result.tokens == 7
    if math.isfinite(raw):
        assert (result.raw, result.reward, result.truncated, result.error) == (raw, raw, True, None)
    else:
        assert result.fault == "model" and str(raw) in str(result.error)


def test_normalising_keeps_what_the_model_said_and_all_else() -> None:
    result = ScoreResult.of(3.0, 7, truncated=True).normalised(1.0, 4.0)
    assert (result.raw, result.reward, result.tokens, result.truncated) == (3.0, 0.5, 7, True)
    failed = ScoreResult.failed("too long", 9)
    assert failed.normalised(1.0, 4.0) == failed
    assert ScoreResult.of(1e300).normalised(0.0, 1e-300).fault == "model"
