"""A run goes on only if what must be equal over time is; what may differ is said; the file holds the last attempt's records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import IntegrityError, RequestError
from rlhf_ray.rollout.execution import Execution
from rlhf_ray.runs.execution import keep_execution, read_execution

POLICY = Execution(
    dtype="bf16", head="fp32", log_probs="processed_logprobs", temperature=1.0, attention="sdpa", vocabulary=100,
    tokenizer="1f", torch="2.13", tokenizers="0.22", deepspeed="0.19",
)  # fmt: skip
RECORDS = {"policy": POLICY, "rollout": replace(POLICY, head="bf16", top_k=50, vllm="0.32", deepspeed=None)}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "execution.json"
    keep_execution(path, RECORDS, goes_on=True)  # a run of before there were records
    assert read_execution(path) == RECORDS
    return path


def changed(role: str, **values: Any) -> dict[str, Execution]:
    return {**RECORDS, role: replace(RECORDS[role], **values)}


@pytest.mark.parametrize("role", list(RECORDS))
def test_a_field_that_must_be_equal_ends_the_resume_and_leaves_the_record(kept: Path, role: str) -> None:
    with pytest.raises(
        RequestError, match=rf"tokenizer is 2e in {role} now and 1f in this run before: put the tokenizer back"
    ):
        keep_execution(kept, changed(role, tokenizer="2e"), goes_on=True)
    assert read_execution(kept) == RECORDS


def test_what_may_differ_is_said_once_and_kept(kept: Path, project_log: Any) -> None:
    newer = changed("rollout", vllm="0.33", temperature=0.7)
    for _ in range(2):
        keep_execution(kept, newer, goes_on=True)
    assert (
        project_log.getvalue().count(
            "vllm is 0.33 in rollout now and 0.32 in this run before: install the same version"
        )
        == 1
    )
    assert "temperature" not in project_log.getvalue(), "its key has a rule of its own"
    assert read_execution(kept) == newer


def test_a_run_that_begins_again_is_not_held_against_what_it_lost(kept: Path) -> None:
    other = changed("policy", vocabulary=128)
    keep_execution(kept, other, goes_on=False)
    assert read_execution(kept) == other


@pytest.mark.parametrize("text", ["", "[]", '{"records": {"policy": {"dtype": "bf16"}}}'])
def test_a_damaged_record_says_what_to_do(kept: Path, text: str) -> None:
    kept.write_text(text)
    with pytest.raises(IntegrityError, match="remove it to go on without knowing"):
        keep_execution(kept, RECORDS, goes_on=True)
