"""Bad model directories: each a clear error that names the value and the way out, and no pickle is ever opened."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.actor import Actor
from rlhf_ray.models.weights.checkpoint import Checkpoint
from rlhf_ray.models.weights.load import load_weights

from .conftest import SIZES

Make = Callable[..., PreTrainedModel]


@pytest.fixture
def directory(tmp_path: Path, causal: Make) -> Path:
    causal().save_pretrained(tmp_path)
    return tmp_path


def refused(name: str | Path, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        Actor(str(name), param_dtype="fp32")


def test_paths_that_are_no_model(tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("/nowhere/at/all", "'/nowhere/at/all' does not exist")
    refused("./org/name", "does not exist")
    refused(directory / "config.json", "is a file: give the directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")


def test_hub_ids_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("no-such-org/no-such-model", "'no-such-org/no-such-model' is not a local directory.*HF_HUB_OFFLINE")


def test_weights_that_are_missing_pickled_or_broken(directory: Path) -> None:
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    refused(directory, "has no weights: expected model.safetensors")

    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return pytest.fail, ("a pickle was opened",)

    torch.save({"lm_head.weight": Bomb()}, directory / "pytorch_model.bin")
    refused(directory, r"pickle \(pytorch_model.bin\).*convert it to safetensors")
    (directory / "pytorch_model.bin").unlink()
    weights.write_bytes(content[: len(content) // 2])
    refused(directory, "model.safetensors cannot be read")


def test_an_index_names_only_safetensors_of_its_own_directory(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Transformers opens whatever the index names: a pickle of some tensors, or a file elsewhere."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "part.safetensors"
    save_file(tensors, elsewhere, {"format": "pt"})
    torch.save({"lm_head.weight": tensors["lm_head.weight"]}, directory / "part.bin")
    (directory / "part.pkl").symlink_to("part.safetensors")
    (directory / "sub").mkdir()
    index = directory / "model.safetensors.index.json"

    def write(**changed: object) -> None:
        files = dict.fromkeys(tensors, "part.safetensors") | changed
        index.write_text(json.dumps({"metadata": {}, "weight_map": files}))

    write()
    assert Checkpoint.open(str(directory)).names == tensors.keys()
    for file in ("part.bin", "part.pkl", "part", ""):
        write(**{"lm_head.weight": file})
        refused(directory, rf"index.json says that lm_head.weight is in '{file}', which is not safetensors")
    for file in (str(elsewhere), f"../{elsewhere.parent.name}/part.safetensors", "sub/../part.safetensors"):
        write(**{"lm_head.weight": file})
        refused(directory, f"says that lm_head.weight is in '{file}', which is not in its directory")
    for content in ([], {"lm_head.weight": 5}, None):
        index.write_text(json.dumps({"weight_map": content}))
        refused(directory, r"index.json does not map names of tensors to files \(weight_map\)")


def test_tensors_that_are_missing_or_misshapen(directory: Path) -> None:
    """transformers would draw them anew and only warn."""
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, weights, {"format": "pt"})
    refused(directory, r"does not hold the weights of a LlamaForCausalLM \(missing: lm_head.weight\)")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, weights, {"format": "pt"})
    refused(directory, "model.norm.weight")


def test_configs_that_cannot_be_read(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({"model_type": "llamma"}))
    refused(directory, "config.json cannot be read: .*llamma")
    path.write_text("{")
    refused(directory, "config.json cannot be read")


def test_code_that_a_model_brings_is_not_run(directory: Path) -> None:
    marker = directory / "ran"
    (directory / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    own = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    (directory / "config.json").write_text(json.dumps({"model_type": "own-kind", "auto_map": own}))
    refused(directory, r"brings Python code of its own.*trust_remote_code")
    assert not marker.exists()
    with pytest.raises(Exception, match=r"Config"):  # asked for, it is run, and here defines nothing
        Actor(str(directory), trust_remote_code=True)
    assert marker.exists()


def test_shards_that_are_missing(directory: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, "lacks model-00002-of-00002.safetensors")


def test_tensors_are_listed_without_being_read(directory: Path) -> None:
    checkpoint = Checkpoint.open(str(directory))
    tensors = load_file(directory / "model.safetensors")
    assert checkpoint.names == tensors.keys()
    assert torch.equal(checkpoint.read("lm_head.weight"), tensors["lm_head.weight"])


def test_unknown_dtypes(directory: Path) -> None:
    with pytest.raises(ModelLoadError, match="unknown dtype 'int3'"):
        Actor(str(directory), param_dtype="int3")


@pytest.mark.parametrize(
    ("option", "value", "name"), [("num_hidden_layers", 1, "layers.1."), ("attention_bias", False, ".bias")]
)
def test_trained_tensors_that_a_config_has_no_place_for_are_a_warning(
    tmp_path: Path, project_log: io.StringIO, option: str, value: object, name: str
) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, attention_bias=True)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for changed, warned in (({}, False), ({option: value}, True)):
        (tmp_path / "config.json").write_text(json.dumps(written | changed))
        load_weights(AutoModelForCausalLM, Checkpoint.open(str(tmp_path)), torch.float32)
        said = project_log.getvalue()
        assert ("correct config.json" in said) == (name in said) == warned
