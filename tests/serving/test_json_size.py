"""The parts of a JSON document are counted right, whatever its texts hold and wherever it is cut."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.serving.transport.json_size import JsonSize

LETTERS = st.text(st.sampled_from('ab"\\[]{},:\nü')) | st.text()
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | LETTERS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(LETTERS, inner, max_size=5),
    max_leaves=30,
)


def parts(value: Any) -> tuple[int, int, int]:
    """Lists and objects, texts, and elements but the first of each, by walking over what was built."""
    if isinstance(value, str):
        return 0, 1, 0
    if not isinstance(value, list | dict):
        return 0, 0, 0
    inner = list(value.values()) if isinstance(value, dict) else value
    sums = [sum(of) for of in zip(*map(parts, inner), strict=True)] if inner else [0, 0, 0]
    keys = len(value) if isinstance(value, dict) else 0
    return sums[0] + 1, sums[1] + keys, sums[2] + max(len(value) - 1, 0)


@given(DOCUMENTS, st.booleans(), st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_the_counts_are_those_of_the_document_however_it_is_cut(value: Any, ascii_only: bool, cuts: list[int]) -> None:
    content = json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    size, start, step = JsonSize(), 0, 0
    while start < len(content):
        end = start + cuts[step % len(cuts)]
        size.feed(content[start:end])
        start, step = end, step + 1
    assert (size.containers, size.texts, size.values) == parts(value)
    assert size.bytes == len(content) <= size.memory


def test_a_run_of_backslashes_before_a_quote_ends_a_text_or_not() -> None:
    for backslashes in range(6):
        for cut in range(1, 12):
            content = b'["' + b"\\" * backslashes + b'",[],[]]'
            size = JsonSize()
            size.feed(content[:cut])
            size.feed(content[cut:])
            assert size.containers == (3 if backslashes % 2 == 0 else 1), (backslashes, cut)
