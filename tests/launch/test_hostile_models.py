"""Whatever stands in the files of a model, ``export`` and ``check`` take it or say in a sentence what is wrong: no
stack trace, and nothing of a refused export is left.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_ray.cli.main import main
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.launch.export import _told
from rlhf_ray.models import get_llm_for_sequence_regression, make_model, save_adapter, save_pretrained
from tests.models.conftest import word_tokenizer

Change = Callable[[Path], object]
VALUES: tuple[Any, ...] = (
    None,
    0,
    -5,
    1.5,
    True,
    "text",
    "../x",
    "",
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
    10**30,
    float("nan"),
)
SEED, CASES = 7, 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model and an adapter."""
    root = tmp_path_factory.mktemp("models")
    make_model("llama-tiny", 48, seed=3, pad_token_id=0, eos_token_id=2).save_pretrained(root / "base")
    word_tokenizer().save_pretrained(root / "base")
    options: dict[str, Any] = {"param_dtype": "fp32", "init_value_head": True, "head_init": "hf"}
    model = get_llm_for_sequence_regression(str(root / "base"), "reward", **options)
    save_pretrained(model, word_tokenizer(), root / "reward", metadata={"mean": 0.5, "std": 2.0})
    save_adapter(
        get_llm_for_sequence_regression(str(root / "base"), "reward", lora_rank=2, **options), None, root / "adapter"
    )
    return root


def in_json(file: str, **values: Any) -> Change:
    def change(path: Path) -> None:
        (path / file).write_text(json.dumps({**json.loads((path / file).read_text()), **values}))

    return change


def config(**values: Any) -> Change:
    return in_json("config.json", **values)


def adapter(**values: Any) -> Change:
    return in_json("adapter_config.json", **values)


def tensor(name: str, value: torch.Tensor) -> Change:
    def change(path: Path) -> None:
        save_file({**load_file(path / "model.safetensors"), name: value}, path / "model.safetensors")

    return change


def index(weight_map: Any) -> Change:
    def change(path: Path) -> None:
        (path / "model.safetensors").rename(path / "a.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def content(file: str, raw: bytes) -> Change:
    return lambda path: (path / file).write_bytes(raw)


def each_other(path: Path) -> None:
    shutil.copytree(path, path.parent / "other")
    adapter(base_model_name_or_path=str(path))(path.parent / "other")
    adapter(base_model_name_or_path=str(path.parent / "other"))(path)


HOSTILE: dict[str, Change] = {
    "an adapter that names itself": lambda path: adapter(base_model_name_or_path=str(path))(path),
    "adapters that name each other": each_other,
    "an adapter of a number": adapter(base_model_name_or_path=5),
    "an adapter of an object": adapter(base_model_name_or_path={"a": 1}),
    "rank -1": adapter(r=-1),
    "rank of a text": adapter(r="x"),
    "alpha of a list": adapter(lora_alpha=[1]),
    "target modules 5": adapter(target_modules=5),
    "modules to save 1.5": adapter(modules_to_save=1.5),
    "a pattern of ranks that is a list": adapter(rank_pattern=[1]),
    "no such task": adapter(task_type="x"),
    "weights by a list": index([]),
    "weights by numbers": index({"a": 1}),
    "weights in a pickle": index({"a": "model.bin"}),
    "weights elsewhere": index({"a": "../a.safetensors"}),
    "weights without names": index({}),
    "a head above": config(value_head_prefix="../x"),
    "a head of a number": config(value_head_prefix=5),
    "a head called as the model": config(value_head_prefix="model"),
    "a language model without a config": config(text_config={}),
    "a quantisation in a word": config(quantization_config="text"),
    "heads 0": config(num_attention_heads=0),
    "positions -5": config(max_position_embeddings=-5),
    "a mean that is a text": config(mean="a"),
    "attention that is a text": config(attention_dropout="../x"),
    "labels that are true": config(id2label=True),
    "a head without dimensions": tensor("score.weight", torch.tensor(1.0)),
    "a bias of three": tensor("score.bias", torch.zeros(3)),
    "a head of no outputs": tensor("score.weight", torch.zeros(0, 64)),
    "weights cut short": lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 100),
    "a config deep without end": content("config.json", b"[" * 100_000),
    "a number without end": content("config.json", b'{"a": ' + b"9" * 5000 + b"}"),
    "a generation config that is none": content("generation_config.json", b"{"),
    "a tokenizer that is a list": content("tokenizer.json", b"[]"),
    "a template that is no text": content("chat_template.jinja", b"\xff\xfe"),
}  # fmt: skip
SAYS = {
    "an adapter that names itself": "an adapter itself: merge that first",
    "adapters that name each other": "an adapter itself: merge that first",
    "an adapter of a number": "set base_model_name_or_path to its name",
    "rank -1": "has r -1 in its adapter_config.json, which must be a whole number above 0",
    "target modules 5": "must be a text or a list of texts",
    "attention that is a text": "has no tokenizer that can be read beside its config.json",
    "a head called as the model": "which is the name of the model itself",
    "weights without names": "names no tensors",
    "a bias of three": "score.bias holds 3 numbers, but score.weight has 1 rows",
}
MAY_BE_READ = ("a template that is no text", "labels that are true")


def run(*words: str) -> int:
    try:
        return main(words)
    except BaseException as error:
        pytest.fail(f"{' '.join(words[:1])} ended with {type(error).__name__}: {str(error)[:200]}")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_model_is_refused_in_a_sentence(
    models: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change = HOSTILE[name]
    of_adapter = "adapter" in name or any(word in name for word in ("rank", "alpha", "modules", "task"))
    path = shutil.copytree(models / ("adapter" if of_adapter else "reward"), tmp_path / "model")
    change(path)
    capsys.readouterr()
    code = run("export", str(path), str(tmp_path / "out"))
    told = capsys.readouterr().err
    assert code == 2 or (code == 0 and name in MAY_BE_READ), told
    assert (tmp_path / "out").exists() == (code == 0) and not list(tmp_path.glob(".pending*"))
    if code == 2:
        (sentence,) = [line for line in told.splitlines() if line.startswith("rlhf-ray: ")]
        assert str(tmp_path) in sentence or "value_head_prefix" in sentence
        assert SAYS.get(name, "") in sentence
    assert run("check", "serve", f"reward.model.path={path}") in (0, 2)


def test_what_no_rule_knows_is_told_with_its_place_and_a_refusal_as_it_is() -> None:
    for error, told in (
        (IndexError("7"), "m cannot be exported, .* IndexError: 7 "),
        (RecursionError("deep"), "RecursionError"),
    ):
        try:
            with _told("m"):
                raise error
        except Exception as raised:
            assert isinstance(raised, ModelLoadError) and re.search(told, str(raised))
    with pytest.raises(ModelLoadError, match=r"^ours$"), _told("m"):
        raise ModelLoadError("ours")


def test_any_value_under_any_key_of_a_config_is_read_or_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A seeded sample of all pairs."""
    path = shutil.copytree(models / "reward", tmp_path / "model")
    good = json.loads((path / "config.json").read_text())
    keys = [
        *good,
        "quantization_config",
        "value_head_prefix",
        "text_config",
        "auto_map",
        "rope_scaling",
        "layer_types",
        "head_dim",
    ]
    pairs = [(key, value) for key in sorted(set(keys)) for value in VALUES]
    for key, value in random.Random(SEED).sample(pairs, CASES):
        (path / "config.json").write_text(json.dumps({**good, key: value}))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code = run("export", str(path), str(tmp_path / "out"))
        told = capsys.readouterr().err
        assert code in (0, 2), f"{key}={value!r}: {told}"
        assert (tmp_path / "out").exists() == (code == 0), f"{key}={value!r}"
        assert run("check", "serve", f"reward.model.path={path}") in (0, 2)
