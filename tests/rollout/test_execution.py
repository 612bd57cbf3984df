"""Every difference is judged by the rule of its field, and named with both values; nothing else is a difference."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.errors import RequestError
from rlhf_ray.rollout import execution
from rlhf_ray.rollout.execution import RULES, Execution, Relation, differences, digest, require_agreement, versions

RECORD = Execution(
    dtype="bf16", head="bf16", log_probs="processed_logprobs", temperature=0.7, attention="CPU_ATTN", vocabulary=100,
    tokenizer="1f", top_p=0.9, top_k=50, min_p=0.1, lora="merged", quantization="nf4", context=512, transport="nccl",
    torch="2.13", transformers="5.19", tokenizers="0.22", vllm="0.32", deepspeed="0.19",
)  # fmt: skip
NAMES = [field.name for field in fields(Execution)]
RELATIONS = get_args(Relation)
DOCS = Path(__file__).parents[2] / "docs" / "rollout.md"


@given(st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES)), st.sampled_from(RELATIONS))
def test_whatever_differs_is_named_by_its_rule_and_what_one_side_lacks_is_not_compared(
    changed: set[str], lacking: set[str], relation: Relation
) -> None:
    other: Any = dict.fromkeys(changed, "other")
    theirs = replace(RECORD, **(other | dict.fromkeys(lacking)))
    broken, noted = differences(RECORD, theirs, relation, here="one", there="two")
    seen = changed - lacking
    unsure = "tokenizer" if "tokenizers" in changed | lacking else None

    def expected(verdict: str) -> list[str]:
        names = [name for name, rule in RULES.items() if name in seen]
        judged = {name: "warn" if name == unsure else RULES[name].verdict(relation) for name in names}
        return [
            f"{name} is {getattr(RECORD, name)} in one and other in two: {RULES[name].way_out}"
            for name in names
            if judged[name] == verdict
        ]

    assert (broken, noted) == (expected("equal"), expected("warn"))


def test_every_field_has_a_rule_and_peers_differ_in_attention_at_most() -> None:
    assert set(RULES) == set(NAMES)
    assert {name for name, rule in RULES.items() if rule.alike != "equal"} == {"attention"}


@pytest.mark.parametrize("name", NAMES)
def test_a_digest_is_of_what_policy_and_engines_must_have_in_common(name: str) -> None:
    other: Any = replace(RECORD, **dict.fromkeys([name], "other"))
    lacking: Any = replace(RECORD, **dict.fromkeys([name]))
    for policy, engine in ((other, other), (other, lacking), (lacking, other)):
        assert (digest(policy, engine) != digest(RECORD, RECORD)) == (RULES[name].across == "equal")


def test_a_disagreement_names_every_field_that_must_be_equal_and_returns_what_may_differ() -> None:
    theirs = replace(RECORD, vocabulary=128, torch="2.12", dtype="fp32")
    with pytest.raises(
        RequestError, match=r"^log-probs are not computed alike: vocabulary is 100 in a and 128 in b.*torch is"
    ) as e:
        require_agreement(RECORD, theirs, "across", here="a", there="b")
    assert "dtype" not in str(e.value)
    (noted,) = require_agreement(RECORD, replace(RECORD, dtype="fp32"), "across", here="a", there="b")
    assert noted == "dtype is bf16 in a and fp32 in b: set policy.model.dtype and rollout.dtype to one of them"


def test_a_record_of_another_version_of_the_project_is_read() -> None:
    content = {**RECORD.to_json(), "a field of tomorrow": 1}
    assert Execution.from_json(content) == RECORD


def test_versions_are_what_the_process_began_with_whatever_is_installed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    began = versions("torch", "no-such-package")
    assert began["torch"] is not None and began["no-such-package"] is None
    monkeypatch.setattr(execution, "version", lambda _: "installed later")
    assert versions("torch", "no-such-package") == began


def test_the_documented_table_is_the_contract() -> None:
    """Each field is in one row, with its three verdicts."""
    words = {"equal": "must be equal", "warn": "warning", "record": "recorded"}
    rows = re.findall(
        r"^\| ((?:`\w+`(?:, )?)+) \| ([\w ]+) \| ([\w ]+) \| ([\w ]+) \| [^|]+ \|$", DOCS.read_text("utf-8"), re.M
    )
    table = {name: row[1:] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert table == {name: tuple(words[rule.verdict(one)] for one in RELATIONS) for name, rule in RULES.items()}
    assert all(
        not set(re.findall(r"`(\w+)`", a[0])) & set(re.findall(r"`(\w+)`", b[0])) for a, b in combinations(rows, 2)
    )
