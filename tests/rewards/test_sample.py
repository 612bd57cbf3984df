"""Every field that a reward function may look at says what it is, and by which list the function is given it."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from itertools import pairwise

from rlhf_ray.rewards import sample
from rlhf_ray.rewards.functions import COLUMNS
from rlhf_ray.rewards.sample import TextSample


def field_docstrings() -> dict[str, str]:
    """The text under each field of the class."""
    tree = ast.parse(inspect.getsource(sample))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef)).body
    return {
        field.target.id: text.value.value
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }  # fmt: skip


def test_every_field_is_explained() -> None:
    assert set(field_docstrings()) == {field.name for field in fields(TextSample)}


def test_every_list_of_a_reward_function_is_named_at_its_field() -> None:
    named = [name for text in field_docstrings().values() for name in re.findall(r"List ``(\w+)``", text)]
    assert sorted(named) == sorted(COLUMNS)
