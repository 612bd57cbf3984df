"""Roles take turns, and what is wrong with a message is told by its number and quotes no text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.rows.conversations import ROLES, shape_problem, turn_problem


def make_messages(*roles: str) -> list[dict[str, str]]:
    """Messages of these roles; an assistant's with a star calls a tool."""
    calls = {"tool_calls": [{"function": {"name": "f"}}]}
    return [{"role": role.strip("*"), "content": "secret"} | (calls if role.endswith("*") else {}) for role in roles]


@pytest.mark.parametrize(
    "roles",
    [
        ("user", "assistant"),
        ("system", "user", "assistant"),
        ("developer", "user", "assistant", "user", "assistant"),
        ("user", "assistant*", "tool", "assistant"),
        ("user", "assistant*", "tool", "tool", "assistant*", "tool", "assistant", "user", "assistant"),
        ("user", "assistant*"),
    ],
)
def test_conversations_in_order(roles):
    assert turn_problem([("chosen", make_messages(*roles))]) == ""
    for cut in range(len(roles)):
        assert turn_problem([("prompt", make_messages(*roles[:cut])), ("chosen", make_messages(*roles[cut:]))]) == ""


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"chosen": ["assistant"]}, "message 1 of 'chosen' is of 'assistant', but 'system' or 'developer' or 'user' was "
                                    "expected at the start"),
        ({"chosen": ["user", "user", "assistant"]}, "message 2 of 'chosen' is of 'user', but 'assistant' was expected after "
                                                    "'user'"),
        ({"prompt": ["user"], "chosen": ["user", "assistant"]}, "message 1 of 'chosen' is of 'user', but 'assistant' was"),
        ({"prompt": ["user", "assistant"], "chosen": ["assistant"]}, "message 1 of 'chosen' is of 'assistant', but 'user' was"),
        ({"chosen": ["user", "system", "assistant"]}, "message 2 of 'chosen' is of 'system', but 'assistant' was expected"),
        ({"chosen": ["user", "assistant", "tool"]}, "message 3 of 'chosen' is of 'tool', but 'user' was expected after 'assis"),
        ({"chosen": ["user", "assistant*", "user"]}, "message 3 of 'chosen' is of 'user', but 'tool' was expected after 'ass"),
        ({"chosen": ["user", "assistant", "user"]}, "'chosen' ends with 'user', but 'assistant' was expected to answer"),
        ({"prompt": ["user"], "chosen": []}, "'chosen' ends with 'user', but 'assistant' was expected to answer"),
    ],
)  # fmt: skip
def test_roles_out_of_order_say_which_and_what_was_expected(parts, problem):
    assert turn_problem([(key, make_messages(*roles)) for key, roles in parts.items()]).startswith(problem)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([role for role in ROLES if role != "tool"]), max_size=6))
def test_without_tools_a_conversation_is_an_optional_system_and_whole_exchanges(roles):
    """Against the rule written as a regular expression."""
    import re

    letters = "".join({"system": "s", "developer": "s"}.get(role, role[0]) for role in roles)
    assert (turn_problem([("chosen", make_messages(*roles))]) == "") == bool(re.fullmatch("s?(ua)+", letters))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "holds no message, at least one was expected"),
        (["secret"], "message 1 must be a mapping with 'role' and 'content', this is a str"),
        ([{"from": "human", "value": "secret"}], "message 1 has no 'role'; its keys are 'from', 'value'"),
        ([{"role": "human", "content": "x"}], "message 1 has no role that is known: system, developer, user, assistant or too"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "message 2 must hold a text under 'content', this is empty"),
        ([{"role": "user", "content": ""}], "message 1 must hold a text under 'content', this is empty"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 must hold a text under 'content', this is a list"),
        ([{"role": "user", "content": 7}], "message 1 must hold a text under 'content', this is of type int"),
        ([{"role": "user", "content": "\ud800"}], "message 1 must hold a text under 'content', this has half a surrogate"),
    ],
)  # fmt: skip
def test_messages_of_a_wrong_form(messages, problem):
    assert shape_problem(messages).startswith(problem)


def test_messages_that_may_be_silent():
    assert shape_problem([{"role": "system", "content": ""}, {"role": "tool", "content": ""}]) == ""
    assert shape_problem([{"role": "assistant", "content": "", "tool_calls": [{}]}]) == ""
