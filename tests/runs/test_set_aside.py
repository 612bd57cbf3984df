"""A prompt that was set aside is on disk with its text, and a run that goes on does not try it again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray.errors import IntegrityError
from rlhf_ray.rollout.fleet import Engines, Fleet, SetAside
from rlhf_ray.runs.set_aside import SetAsidePrompts
from rlhf_ray.trainers.ppo.build import keep_set_aside


def test_a_prompt_is_kept_with_its_text_and_left_out_when_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "set_aside.jsonl"
    tokenizer = SimpleNamespace(decode=lambda ids: f"text of {list(ids)}")
    run = SimpleNamespace(set_aside=SetAsidePrompts(path))
    fleet = Fleet(Engines([]))
    keep_set_aside(fleet, run, tokenizer)  # type: ignore[arg-type]  # nothing else is asked of a run
    assert fleet.set_aside == set()
    fleet.on_set_aside(SetAside(17, (3, 4), ("a", "b", "c")))
    line = {"prompt_id": 17, "text": "text of [3, 4]", "causes": ["a", "b", "c"]}
    assert [json.loads(text) for text in path.read_text().splitlines()] == [line]
    resumed = Fleet(Engines([]))
    keep_set_aside(resumed, run, tokenizer)  # type: ignore[arg-type]
    assert resumed.set_aside == {17}


def test_a_line_that_names_no_prompt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set_aside.jsonl"
    path.write_text('{"prompt_id": true}\n')
    with pytest.raises(IntegrityError, match="prompt_id is True, not a whole number"):
        SetAsidePrompts(path).ids()
