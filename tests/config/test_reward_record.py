"""A record of training is read back as it was written, or refused with the file, what is wrong and the way out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_ray.config.files.reward_record import KEY, RewardRecord, read_reward_record
from rlhf_ray.errors import ModelLoadError

RECORD = RewardRecord(("conversation",), "</s>", "a1", "b2", {"enable_thinking": False, "names": ["x"]})
TEXTS = RewardRecord(("conversation", "text"), "</s>", "a1")


@pytest.mark.parametrize("record", [RECORD, TEXTS])
def test_a_record_comes_back_as_it_was_written(record: RewardRecord) -> None:
    written = json.loads(json.dumps({"model_type": "llama", KEY: record.as_json()}))
    assert read_reward_record(written, "config.json") == record
    assert read_reward_record({"model_type": "llama"}, "config.json") is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"forms": []}, "has forms [], not a list of conversation and text"),
        ({"forms": ["talk"]}, "has forms ['talk']"),
        ({"forms": "text"}, "has forms 'text'"),
        ({"scored_token": "last"}, "has scored_token 'last', which is not one of end, before_end, rendering"),
        ({"tokenizer": 3}, "has no text under tokenizer"),
        ({"template": ""}, "has no text under template"),
        ({"end_token": None}, "has no text under end_token"),
        ({"template_variables": []}, "has template_variables [], not an object"),
        ({"later": 1}, "holds later, which this version does not know"),
    ],
)
def test_a_record_of_another_shape_is_refused_with_the_way_out(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelLoadError) as error:
        read_reward_record({KEY: RECORD.as_json() | changes}, "rm/config.json")
    assert f"rm/config.json: {KEY}" in str(error.value) and problem in str(error.value)
    assert f"remove {KEY} and say reward.form and reward.scored_token" in str(error.value)


def test_a_record_that_is_no_object_or_lacks_an_entry_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="is a str, not an object"):
        read_reward_record({KEY: "text"}, "config.json")
    lacking = RECORD.as_json()
    del lacking["end_token"], lacking["forms"]
    with pytest.raises(ModelLoadError, match="lacks end_token, forms"):
        read_reward_record({KEY: lacking}, "config.json")
