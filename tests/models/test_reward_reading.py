"""A model that remembers nothing is read where transformers reads it, or where it is said; an export is read alike by both."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker
from rlhf_ray.cli.main import main
from rlhf_ray.config.files.reward_record import KEY
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import Form, ScoringRole
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.from_config import load_regression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression
from rlhf_ray.models.reward_reading import assumed_reading, load_reward_reading, make_reward_record
from rlhf_ray.models.save import save_pretrained
from rlhf_ray.rewards.request import ScoreRequest

END = 2
ITEMS = ([5, 9, 7, END], [5, 9, 7, END, END], [END, 5, 9], [END, END], [END], [5, 9, END, 7, END], [8])
"""Answers that end once, twice, not at all, and that hold the end token elsewhere."""


@pytest.fixture
def elsewhere(
    tmp_path: Path, causal: Callable[..., PreTrainedModel], make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> Path:
    """A reward model as TRL leaves one whose base has no pad token: it pads with the token that ends an answer."""
    causal().save_pretrained(tmp_path / "base")
    model = get_llm_for_sequence_regression(str(tmp_path / "base"), "reward", param_dtype="fp32", init_value_head=True)
    tokenizer = make_tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = END
    save_pretrained(model, tokenizer, tmp_path / "elsewhere")
    assert AutoTokenizer.from_pretrained(tmp_path / "elsewhere").pad_token_id == END
    return tmp_path / "elsewhere"


def scores(path: Path, items: Sequence[Sequence[int]], **said: Any) -> list[float]:
    """What a group gives to ids."""
    group = RewardGroup(InProcessRanks("reward", RewardWorker()))
    role = ScoringRole(model=ModelConfig(path=str(path), dtype="fp32"), **said)
    group.setup(RewardSetup(role, seed=0), timeout_s=60.0).result()
    results = group.score([ScoreRequest(token_ids=tuple(ids)) for ids in items]).result()
    return [float(result.raw) for result in results if result.raw is not None]


def plain_scores(path: Path, items: Sequence[Sequence[int]]) -> list[float]:
    """What transformers gives to the same, item by item."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([list(ids)])).logits) for ids in items]


def test_a_model_that_pads_with_the_end_is_scored_where_transformers_scores_it(elsewhere: Path) -> None:
    assert scores(elsewhere, ITEMS) == pytest.approx(plain_scores(elsewhere, ITEMS), abs=1e-5)
    at_the_end, before = scores(elsewhere, ITEMS[:1], scored_token="end"), scores(elsewhere, ITEMS[:1])
    assert abs(at_the_end[0] - before[0]) > 1e-3, "two tokens, two scores"
    assert before == pytest.approx(scores(elsewhere, [ITEMS[0][:-1]], scored_token="end"), abs=1e-6)


def test_the_token_that_is_read_is_said_with_its_reason_and_the_other_one(elsewhere: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(elsewhere)
    config = ModelConfig(path=str(elsewhere))
    sentence = load_reward_reading(config, tokenizer).sentence()
    for part in ("plain texts", "at the last token before '</s>'", "pads with the token that ends", "scored_token=end"):
        assert part in sentence
    assert "at '</s>', the end" in load_reward_reading(config, tokenizer, scored_token="end").sentence()
    padded = assumed_reading("model", tokenizer, 0)
    assert (padded.scored_token, padded.unread) == ("end", frozenset())
    assert assumed_reading("model", tokenizer, 0, scored_token="before_end").scored_ids([5, END, END]) == [5]
    tokenizer.chat_template = "{{ messages }}"
    assert load_reward_reading(config, tokenizer).forms == ("conversation",)
    assert load_reward_reading(config, tokenizer, form="text").forms == ("text",)


def test_a_pad_token_that_ends_texts_alone_leaves_the_end_of_a_turn_to_be_read(elsewhere: Path) -> None:
    """As of Llama 3 models that pad with their end of text: transformers skips that one, and reads the end of the turn."""
    tokenizer = AutoTokenizer.from_pretrained(elsewhere)
    tokenizer.add_special_tokens({"additional_special_tokens": ["w9"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} w9{% endfor %}"
    tokenizer.save_pretrained(elsewhere)
    turn = tokenizer.convert_tokens_to_ids("w9")
    reading = load_reward_reading(ModelConfig(path=str(elsewhere)), tokenizer)
    assert (reading.scored_token, reading.end_token) == ("end", "w9")
    items = ([5, 7, turn], [5, 7, turn, END], [5, END])
    assert scores(elsewhere, items) == pytest.approx(plain_scores(elsewhere, items), abs=1e-5)
    assert load_reward_reading(ModelConfig(path=str(elsewhere)), tokenizer, scored_token="before_end").unread == {
        END,
        turn,
    }


@pytest.mark.parametrize("scored_token", [None, "end", "before_end"])
def test_transformers_reads_an_export_where_this_project_reads_it(
    elsewhere: Path, tmp_path: Path, scored_token: str | None
) -> None:
    option = [] if scored_token is None else ["--scored-token", scored_token]
    assert main(["export", str(elsewhere), str(tmp_path / "out"), *option]) == 0
    said = {} if scored_token is None else {"scored_token": scored_token}
    wanted = scores(elsewhere, ITEMS, **said)
    assert plain_scores(tmp_path / "out", ITEMS) == pytest.approx(wanted, abs=1e-5)
    assert scores(tmp_path / "out", ITEMS) == pytest.approx(wanted, abs=1e-5)


def test_an_export_of_a_padded_model_can_be_read_before_the_end(elsewhere: Path, tmp_path: Path) -> None:
    assert main(["export", str(elsewhere), str(tmp_path / "end"), "--scored-token", "end"]) == 0
    assert main(["export", str(tmp_path / "end"), str(tmp_path / "before"), "--scored-token", "before_end"]) == 0
    assert plain_scores(tmp_path / "before", ITEMS) == pytest.approx(plain_scores(elsewhere, ITEMS), abs=1e-5)


def test_what_a_model_remembers_is_followed_and_cannot_be_overruled(elsewhere: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(elsewhere)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(elsewhere)
    record = make_reward_record(tokenizer, {"text"})
    path = elsewhere / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {KEY: record.as_json()}))
    assert main(["export", str(elsewhere), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())[KEY] == record.as_json()
    config = ModelConfig(path=str(tmp_path / "out"), dtype="fp32")
    save_pretrained(load_regression(config, "critic"), None, tmp_path / "critic")
    assert KEY not in json.loads((tmp_path / "critic" / "config.json").read_text()), "a critic scores nothing"
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    reading = load_reward_reading(config, written)
    assert (reading.forms, reading.scored_token, reading.recorded, reading.warnings) == (("text",), "end", True, ())
    assert "as it was trained" in reading.sentence()
    assert plain_scores(tmp_path / "out", ITEMS) == pytest.approx(scores(tmp_path / "out", ITEMS), abs=1e-5)
    for said, message in (
        ({"form": "conversation"}, "was trained on plain texts, .* but form is conversation: remove form"),
        ({"scored_token": "before_end"}, "was trained to be read at end, .* but scored_token is before_end: remove"),
    ):
        with pytest.raises(ModelLoadError, match=message):
            load_reward_reading(config, written, **said)


def test_a_tokenizer_or_template_that_has_changed_since_the_training_is_said(elsewhere: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(elsewhere)
    tokenizer.chat_template = "{{ messages }}"
    record = make_reward_record(tokenizer, {"conversation"})
    path, config = elsewhere / "config.json", ModelConfig(path=str(elsewhere))
    path.write_text(json.dumps(json.loads(path.read_text()) | {KEY: record.as_json()}))
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert load_reward_reading(config, tokenizer).warnings == ()
    tokenizer.chat_template = "{{ messages }} "
    (warning,) = load_reward_reading(config, tokenizer).warnings
    assert "the chat template of" in warning and "put back its chat_template.jinja" in warning
    tokenizer.add_tokens("another")
    assert len(load_reward_reading(config, tokenizer).warnings) == 2


@pytest.mark.parametrize("form", ["text", "conversation"])
def test_an_end_or_start_of_another_name_since_the_training_is_said(elsewhere: Path, form: Form) -> None:
    """The vocabulary and the template are as they were: only what the tokenizer calls its end, or its start, is another."""
    tokenizer = AutoTokenizer.from_pretrained(elsewhere)
    tokenizer.bos_token = "w3"
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    record = make_reward_record(tokenizer, {form})
    path, config = elsewhere / "config.json", ModelConfig(path=str(elsewhere))
    path.write_text(json.dumps(json.loads(path.read_text()) | {KEY: record.as_json()}))
    assert load_reward_reading(config, tokenizer).warnings == ()
    for name in ("bos_token", "eos_token"):
        changed = deepcopy(tokenizer)
        setattr(changed, name, "w4")
        warnings = load_reward_reading(config, changed).warnings
        expected = name == "eos_token" or form == "conversation"
        assert len(warnings) == expected and all(
            "put back" in text and "tokenizer_config.json" in text for text in warnings
        )
    if form == "text":
        assert "answers end in 'w4'" in warnings[0] and "ended in '</s>' when it was trained" in warnings[0]


def test_a_trained_head_is_replaced_only_where_that_is_asked_for(elsewhere: Path, project_log: io.StringIO) -> None:
    trained = load_regression(ModelConfig(path=str(elsewhere), dtype="fp32"), "reward")
    kept = load_regression(ModelConfig(path=str(elsewhere), dtype="fp32", head_init="zero"), "reward")
    assert torch.equal(kept.head.weight, trained.head.weight)
    assert "head_init is for a model without a head" in project_log.getvalue()
    assert "a fresh one replaces" not in project_log.getvalue()
    config = ModelConfig(path=str(elsewhere), dtype="fp32", head_init="zero", replace_head=True)
    assert not load_regression(config, "reward").head.weight.any()
    assert "holds a trained head (score), which a fresh one replaces" in project_log.getvalue()
