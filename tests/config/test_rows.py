"""``check`` refuses what ``train`` refuses, and nothing else: both are asked about the same files, with real parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.loading import parse_config
from rlhf_ray.data.load import load_pairs
from rlhf_ray.data.tokenizers import make_tokenizer
from rlhf_ray.errors import ConfigError, DataError, RequestError
from rlhf_ray.trainers.supervised.preference_loss import make_loss
from tests.config.conftest import TEXTS

TEXT = {"prompt": "what?", "chosen": " this", "rejected": " that"}
TALK = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "this"}],
    "rejected": [{"role": "assistant", "content": "that"}],
}
TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}{% if add_generation_prompt %}<{% endif %}"


def checked(path: Path, *overrides: str) -> str:
    """What ``check`` finds wrong; empty where nothing is."""
    keys = ["data.world=null", f"data.path={path}", "data.evaluation_fraction=0", "data.cache=null", *overrides]
    try:
        parse_config(TEXTS["rm"], keys, files=True)
    except ConfigError as error:
        return "\n".join(error.problems)
    return ""


def trained(path: Path, *overrides: str, template: str | None = None) -> str:
    """What training finds wrong before its first update; empty where nothing is."""
    keys = ["data.world=null", f"data.path={path}", "data.evaluation_fraction=0", "data.cache=null", *overrides]
    config: Any = parse_config(TEXTS["rm"], keys)
    tokenizer = make_tokenizer(path, 300)
    tokenizer.chat_template = template
    try:
        examples = load_pairs(config.data, tokenizer, 0, graded=config.loss.name == "ordinal")
        make_loss(config.loss, examples.train)
    except DataError as error:
        return str(error)
    return ""


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "overrides", "problem"),
    [
        ([TEXT, TEXT], [], ""),
        ([TEXT | {"source": ["a", "b"]}], [], ""),
        ([TEXT | {"source": [7]}], [], "'source' must hold a text"),
        ([TEXT | {"labels": 1}], [], "data.ignore_columns=[labels]"),
        ([TEXT | {"labels": 1}], ["data.ignore_columns=[labels]"], ""),
        ([{"prompt": "p", "completion": "c", "label": True}], [], "these are single answers"),
        ([TEXT | {"rejected": ""}], [], "'rejected' must hold a text"),
        ([TEXT | {"rejected": ""}], ["data.bad_rows=drop"], "'rejected' must hold a text"),
        ([TEXT, TEXT | {"rejected": ""}], ["data.bad_rows=drop"], ""),
        ([TEXT] * 2 + [TEXT | {"rejected": ""}], ["data.max_rows=2"], ""),
        ([TEXT | {"rejected": ""}, TEXT], ["data.max_rows=1", "data.bad_rows=drop"], "'rejected' must hold a text"),
        ([TEXT], ["loss.name=scaled"], "reads the margin of each pair"),
        ([TEXT | {"score_chosen": 2, "score_rejected": 1}], ["loss.name=scaled", "data.ratings=margins"], ""),
        ([TEXT | {"margin": -1}], ["loss.name=scaled"], "some are negative"),
        ([TEXT], ["loss.name=ordinal"], "reads the grade of each pair"),
        ([TEXT | {"grade": 0.5}], ["loss.name=ordinal"], "the grade 0.5 of a pair is not one of 0, 1, 2"),
        ([TEXT | {"grade": 3}, TEXT], ["loss.name=ordinal"], "nothing under 'grade'"),
        ([TEXT | {"grade": 3}], ["loss.name=ordinal", "loss.thresholds=[1.0]"], "the highest grade of the pairs is 3"),
        ([TALK], [], "the tokenizer has no chat template"),
        ([TEXT], ["data.apply_chat_template=true"], "the tokenizer has no chat template"),
    ],
)
def test_check_and_train_agree_about_a_file(tmp_path, rows, overrides, problem):
    path = write(tmp_path / "rows.jsonl", *rows)
    for found in (checked(path, *overrides), trained(path, *overrides)):
        assert problem in found and bool(found) == bool(problem)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "nothing"])
def test_a_chat_template_is_found_where_tokenizers_keep_it(tmp_path, place):
    path, model = write(tmp_path / "rows.jsonl", TALK), tmp_path / "model"
    tokenizer = make_tokenizer(path, 300)
    tokenizer.save_pretrained(model)
    if place == "chat_template.jinja":
        (model / place).write_text(TEMPLATE)
    if place == "tokenizer_config.json":
        settings = json.loads((model / place).read_text()) | {"chat_template": TEMPLATE}
        (model / place).write_text(json.dumps(settings))
    reads = f"reward.model={{path: {model}, dtype: fp32}}"
    found = checked(path, reads)
    assert ("the tokenizer has no chat template" in found) == (place == "nothing")
    assert trained(path, template=TEMPLATE) == ""
    for name, problem in (
        ("enable_thinking", "reads no variable 'enable_thinking'"),
        ("messages", "not the template's own"),
    ):
        variables = f"data.template_variables={{{name}: false}}"
        assert (problem in checked(path, reads, variables)) == (place != "nothing" or name == "messages")
    with pytest.raises(RequestError, match=r"data\.template_variables: .* reads no variable 'enable_thinking'"):
        trained(path, "data.template_variables={enable_thinking: false}", template=TEMPLATE)
    assert trained(path, "data.template_variables={style: short}", template="{{ style }}" + TEMPLATE) == ""
    texts = checked(write(path, TEXT), reads, "data.template_variables={enable_thinking: false}")
    assert "enable_thinking" not in texts, "no template writes them"
