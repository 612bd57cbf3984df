"""The average of reward models: against a slow average, the scores of equal models, and models that cannot be averaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.rewards import RewardConfig
from rlhf_ray.errors import IntegrityError, ModelLoadError
from rlhf_ray.rewards.ensembles import weights
from rlhf_ray.rewards.ensembles.weights import average_models, with_averages
from tests.serving.reward_models import save_reward_model

WEIGHTS = "model.safetensors"


def ensemble(*paths: Path) -> RewardConfig:
    return RewardConfig.model_validate({"ensemble": [str(path) for path in paths], "reduction": "weights"})


def averaged(root: Path, *paths: Path) -> Path:
    model = with_averages(ensemble(*paths), root / "averages").model
    assert model is not None and model.path == str(root / "averages" / "reward")
    return Path(model.path)


def change(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", [weights.SHARD_BYTES, 40_000])
def test_each_number_is_the_mean_of_that_number_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shard: int
) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", shard)
    paths = [save_reward_model(tmp_path / f"model{seed}", seed=seed) for seed in range(3)]
    for path in paths:
        stored = {name: tensor.to(dtype) for name, tensor in load_file(path / WEIGHTS).items()}
        save_file(stored, path / WEIGHTS, metadata={"format": "pt"})
    files = sorted(averaged(tmp_path, *paths).glob("*.safetensors"))
    assert len(files) == 1 if shard == 2**32 else len(files) > 2
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    members = [load_file(path / WEIGHTS) for path in paths]
    assert found.keys() == members[0].keys()
    for name, tensor in found.items():
        flat = [member[name].flatten().tolist() for member in members]
        slow = [sum(numbers) / 3 for numbers in zip(*flat, strict=True)]
        assert tensor.dtype == torch.float32 and tensor.shape == members[0][name].shape
        assert tensor.flatten().tolist() == pytest.approx(slow, rel=1e-7, abs=1e-12), name


def test_the_average_of_equal_models_is_that_model_and_scores_as_it(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    paths = [save_reward_model(tmp_path / f"model{number}", seed=5) for number in range(3)]
    average = averaged(tmp_path, *paths)
    one, found = load_file(paths[0] / WEIGHTS), load_file(average / WEIGHTS)
    assert all(torch.equal(found[name], one[name]) for name in one)
    ids = torch.tensor([[1, 20, 30, 40, 2]])
    scores = [
        AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)(ids).logits
        for path in (paths[0], average)
    ]
    assert torch.equal(*scores) and bool(scores[0].abs().max() > 0)


def test_the_statistics_of_a_model_are_not_those_of_an_average(tmp_path: Path) -> None:
    average = averaged(tmp_path, *(save_reward_model(tmp_path / f"model{seed}", seed=seed) for seed in range(2)))
    config = json.loads((average / "config.json").read_text())
    assert {"mean", "std"}.isdisjoint(config) and config["dtype"] == "float32" and config["architectures"]


def test_an_average_is_made_once_and_again_where_a_model_is_another(tmp_path: Path) -> None:
    paths = [save_reward_model(tmp_path / f"model{seed}", seed=seed) for seed in range(2)]
    average = averaged(tmp_path, *paths)
    made, first = (average / WEIGHTS).stat().st_ino, load_file(average / WEIGHTS)
    averaged(tmp_path, *paths)
    assert (average / WEIGHTS).stat().st_ino == made
    save_reward_model(paths[1], seed=9)
    averaged(tmp_path, *paths)
    assert not torch.equal(load_file(average / WEIGHTS)["score.weight"], first["score.weight"])
    members = json.loads((average / weights.MEMBERS).read_text())["models"]
    assert [one["path"] for one in members] == [str(path) for path in paths] and len(members[0]["sha256"]) == 64
    (average / weights.MEMBERS).write_text("{}")
    with pytest.raises(IntegrityError, match=r"averaged_from.json does not say of which models"):
        averaged(tmp_path, *paths)


def test_what_cannot_be_averaged_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    one, other = (save_reward_model(tmp_path / f"model{seed}", seed=seed) for seed in range(2))

    def refusal() -> str:
        with pytest.raises(ModelLoadError) as refused:
            averaged(tmp_path, one, other)
        assert not any((tmp_path / "averages").iterdir())
        return str(refused.value)

    change(other, hidden_act="gelu")
    assert "hidden_act in config.json is 'silu' and 'gelu'; average models of one architecture" in refusal()
    change(other, hidden_act="silu")
    whole = load_file(other / WEIGHTS)
    save_file({**whole, "score.weight": torch.zeros(2, whole["score.weight"].shape[1])}, other / WEIGHTS)
    assert "the tensor score.weight is [1," in refusal() and "[2," in refusal()
    save_file(whole, other / WEIGHTS)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    swapped = tokenizer["model"]["vocab"]
    swapped["a"], swapped["b"] = swapped["b"], swapped["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "their vocabularies differ" in refusal()


def test_a_member_that_is_an_adapter_is_refused(tmp_path: Path) -> None:
    one = save_reward_model(tmp_path / "one")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(one), "peft_type": "LORA"}))
    models = [ModelConfig(path=str(path)) for path in (one, adapter)]
    with pytest.raises(ModelLoadError, match=r"is a LoRA adapter, and .* merge it, with rlhf-ray export"):
        average_models(models, tmp_path)
