"""The fingerprint of a model covers weights, config and tokenizer, those of an adapter's base too, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlhf_ray.config.sections.models import MakeConfig, ModelConfig
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.fingerprint import fingerprint_model
from rlhf_ray.storage.fingerprint import Fingerprint

MODEL = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja")
NO_PART = ("README.md", "manifest.json", "trainer_state.json", "consolidated.safetensors", "notes.py")


def of(path: Path, **settings: bool) -> Fingerprint:
    return fingerprint_model(ModelConfig(path=str(path), **settings))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for name in (*MODEL, *NO_PART):
        (directory / name).write_text(json.dumps({"file": name}))
    return directory


def change(file: Path) -> None:
    file.write_text(file.read_text().replace("f", "g", 1))


@pytest.mark.parametrize("name", MODEL)
def test_one_byte_of_weights_config_or_tokenizer_is_another_model(model, name):
    before = of(model)
    change(model / name)
    assert before.changed_files(of(model)) == [name]


def test_what_no_loader_reads_and_where_the_directory_lies_does_not_count(model, tmp_path):
    before = of(model)
    for name in NO_PART:
        change(model / name)
    shutil.copytree(model, tmp_path / "elsewhere")
    assert of(model) == of(tmp_path / "elsewhere") == before
    assert of(model, trust_remote_code=True).changed_files(before) == ["notes.py"], "code that is run counts"


def test_an_adapter_is_known_by_its_base_too(model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("weights of few")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    before = of(adapter)
    change(model / "model.safetensors")
    assert before.changed_files(of(adapter)) == ["base/model.safetensors"]
    before = of(adapter)
    change(adapter / "adapter_model.safetensors")
    assert before.changed_files(of(adapter)) == ["adapter_model.safetensors"]


def test_an_adapter_that_is_its_own_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ModelLoadError, match="is an adapter whose base is itself"):
        of(tmp_path)


def test_the_files_that_an_index_names_count_whatever_they_are_called(model):
    (model / "model.safetensors").rename(model / "part.one")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part.one"}}))
    before = of(model)
    change(model / "part.one")
    assert before.changed_files(of(model)) == ["part.one"]


def test_a_made_model_is_known_by_the_file_of_its_tokenizer(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("feature")
    made = ModelConfig(make=MakeConfig(shape="llama-tiny", tokenizer_from=str(rows)))
    before = fingerprint_model(made)
    change(rows)
    assert before != fingerprint_model(made)
    assert fingerprint_model(ModelConfig(make=MakeConfig(shape="llama-tiny", tokenizer_from="world"))).files == ()
