"""Heads that other projects write compute here what they compute there; a head of another kind is refused by that kind.

The expected scores are computed from transformers' own backbone, unpadded, and plain torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaModel, PreTrainedModel

from rlhf_ray.cli.main import main
from rlhf_ray.config.loading import load_config
from rlhf_ray.errors import ConfigError, ModelLoadError
from rlhf_ray.models import get_llm_for_sequence_regression, save_adapter, save_pretrained
from rlhf_ray.models.regression import PackedRegression, SequenceRegression
from rlhf_ray.models.weights.lora import add_lora
from rlhf_ray.trajectories.packing import Packed

from .conftest import SIZES, save_random, shake_adapters, word_tokenizer

Head = Callable[[Tensor], Tensor]
Tensors = dict[str, Tensor]


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


WEIGHT, BIAS = rows(1, 32), torch.tensor([0.7])
FIRST, SHIFT, LAST = rows(48, 32), rows(48), rows(1, 48)


def linear(hidden: Tensor) -> Tensor:
    return hidden @ WEIGHT[0]


def shifted(hidden: Tensor) -> Tensor:
    return hidden @ WEIGHT[0] + 0.7


def mlp(hidden: Tensor) -> Tensor:
    return (FIRST @ hidden + SHIFT).clamp(min=0) @ LAST[0] + 0.7


def mlp_named(name: str) -> Tensors:
    return {f"{name}.0.weight": FIRST, f"{name}.0.bias": SHIFT, f"{name}.2.weight": LAST, f"{name}.2.bias": BIAS}


def directory_of(path: Path, tensors: Tensors, *, file: str = "", output_layer: bool = True, **config: object) -> Path:
    """A small Llama with the tensors of a head, in a file of their own if ``file`` names one."""
    save_random("llama", path)
    own = load_file(path / "model.safetensors")
    if not output_layer:
        del own["lm_head.weight"]
    if file:
        save_file(tensors, path / file, {"format": "pt"})
    save_file(own | ({} if file else tensors), path / "model.safetensors", {"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | config))
    return path


def load(path: Path, **options: object) -> SequenceRegression:
    return get_llm_for_sequence_regression(str(path), "reward", **{"param_dtype": "fp32", **options}).eval()


def scores_of(model: SequenceRegression, packed: Packed) -> Tensor:
    with torch.no_grad():
        return PackedRegression(model)(packed, "scores")


@torch.no_grad()
def by_hand(path: Path, head: Head, sequences: list[Tensor]) -> Tensor:
    backbone = LlamaModel(LlamaConfig(**SIZES))
    tensors = load_file(path / "model.safetensors")
    backbone.load_state_dict({name: tensors[f"model.{name}"] for name in backbone.state_dict()})
    backbone.eval()
    return torch.stack([head(backbone(input_ids=ids[None]).last_hidden_state[0, -1]) for ids in sequences])


READ: dict[str, tuple[Tensors, dict[str, object], Head]] = {
    "transformers": ({"score.weight": WEIGHT}, {}, linear),
    "token classification": (
        {"score.weight": WEIGHT, "score.bias": BIAS}, {"architectures": ["LlamaForTokenClassification"]}, shifted,
    ),
    "InternLM2-reward": ({"v_head.weight": WEIGHT}, {}, linear),
    "UltraRM, Eurus-RM": ({"regression_head.weight": WEIGHT}, {"architectures": ["LlamaRewardModel"]}, linear),
    "safe-rlhf": ({"score_head.weight": WEIGHT, "score_head.bias": BIAS}, {"score_bias": True}, shifted),
    "safe-rlhf without bias": ({"score_head.weight": WEIGHT}, {"score_bias": False}, linear),
    "OpenAssistant": ({"out_proj.weight": WEIGHT, "out_proj.bias": BIAS}, {}, shifted),
    "Qwen2.5-Math-RM": (mlp_named("score"), {"architectures": ["Qwen2ForRewardModel"]}, mlp),
    "GRM": (mlp_named("v_head.summary"), {}, mlp),
    "trlx": (mlp_named("v_head"), {}, mlp),
    "LLaMA-Factory": (
        {"v_head.summary.weight": WEIGHT, "v_head.summary.bias": BIAS}, {"file": "value_head.safetensors"}, shifted,
    ),
}  # fmt: skip
KEYS: dict[str, tuple[Tensors, str, Head]] = {
    "a name that nobody uses": ({"worth.weight": WEIGHT, "worth.bias": BIAS}, "worth", shifted),
    "a path": ({"heads.worth.weight": WEIGHT}, "heads.worth", linear),
    "the last layer of an MLP": (mlp_named("score"), "score.2", mlp),
    "an MLP of a name that nobody uses": (mlp_named("worth"), "worth", mlp),
    "the second of two heads": ({"score.weight": -WEIGHT, "regression_head.weight": WEIGHT}, "regression_head", linear),
}


@pytest.mark.parametrize("layout", READ)
def test_the_heads_of_others_are_read(tmp_path: Path, layout: str, sequences: list[Tensor], packed: Packed) -> None:
    tensors, config, head = READ[layout]
    path = directory_of(tmp_path, tensors, **config)
    expected = by_hand(path, head, sequences)
    assert float(expected.std()) > 0.05, "scores that hardly differ compare nothing"
    torch.testing.assert_close(scores_of(load(path), packed), expected, atol=1e-5, rtol=1e-5)
    word_tokenizer().save_pretrained(path)
    load_config("serve", [f"reward.model.path={path}"], kind="serve", files=True)


@pytest.mark.parametrize("layout", KEYS)
def test_a_key_names_any_other_head(tmp_path: Path, layout: str, sequences: list[Tensor], packed: Packed) -> None:
    tensors, prefix, head = KEYS[layout]
    path = directory_of(tmp_path, tensors)
    model = load(path, value_head_prefix=prefix)
    word_tokenizer().save_pretrained(path)
    load_config(
        "serve", [f"reward.model.path={path}", f"reward.model.value_head_prefix={prefix}"], kind="serve", files=True
    )
    torch.testing.assert_close(scores_of(model, packed), by_hand(path, head, sequences), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_the_logit_of_the_first_token_is_a_score_where_the_key_says_so(
    tmp_path: Path, tied: bool, sequences: list[Tensor], packed: Packed
) -> None:
    """As in Llama-3.1-Nemotron-70B-Reward-HF. What is written is a plain head, not the output layer."""
    path = directory_of(tmp_path / "model", {}, output_layer=not tied, tie_word_embeddings=tied)
    with pytest.raises(ModelLoadError, match=r"no score head.*logit of token 0 .* set value_head_prefix to lm_head"):
        load(path)
    model = load(path, value_head_prefix="lm_head")
    row = load_file(path / "model.safetensors")["model.embed_tokens.weight" if tied else "lm_head.weight"][0]
    expected = by_hand(path, lambda hidden: hidden @ row, sequences)
    torch.testing.assert_close(scores_of(model, packed), expected, atol=1e-5, rtol=1e-5)
    save_pretrained(model, None, tmp_path / "out")
    assert torch.equal(scores_of(load(tmp_path / "out"), packed), scores_of(model, packed))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    alone = torch.cat([theirs(input_ids=ids[None]).logits[:, 0] for ids in sequences])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)


REFUSED: dict[str, tuple[Tensors, dict[str, object], str]] = {
    "ArmoRM": (
        {"regression_layer.weight": rows(19, 32), "gating.layers.0.weight": rows(32, 32)}, {},
        r"multi-objective head: gating.layers.0.weight \(32, 32\), regression_layer.weight \(19, 32\)",
    ),
    "ArmoRM with a plain head left in it": (
        {"score.weight": WEIGHT, "regression_layer.weight": rows(19, 32)}, {}, r"multi-objective head",
    ),
    "Qwen2.5-Math-PRM": (
        {**mlp_named("score"), "score.2.weight": rows(2, 48), "score.2.bias": rows(2)},
        {"architectures": ["Qwen2ForProcessRewardModel"]},
        r"a process reward model \(Qwen2ForProcessRewardModel\)",
    ),
    "TRL's process reward models": (
        {"score.weight": rows(2, 32), "score.bias": rows(2)}, {"architectures": ["LlamaForTokenClassification"]},
        r"a process reward model \(LlamaForTokenClassification, score.weight \(2, 32\)\)",
    ),
    "URM": ({"score.weight": rows(10, 32)}, {}, r"score.weight of .* has 10 outputs \(num_labels\), shape \(10, 32\)"),
    "a vector": ({"score.weight": rows(32)}, {}, r"score.weight of .* has shape \(32,\), but that of a linear layer"),
    "an MLP with two outputs": (
        {**mlp_named("score"), "score.2.weight": rows(2, 48)}, {}, r"score.2.weight of .* has 2 outputs"
    ),
    "an MLP with a dropout in it": (
        {"score.0.weight": FIRST, "score.3.weight": LAST}, {},
        r"head score of .*score.0.weight \(48, 32\), score.3.weight \(1, 48\).* not made of linear layers with one",
    ),
    "an MLP of another model": (
        {"score.0.weight": rows(48, 16), "score.2.weight": LAST}, {}, r"score.0.weight of .* reads 16 features"
    ),
    "a layer before the one of a known name": (
        {"score.dense.weight": FIRST, "score.weight": LAST}, {},
        r"head score of .* has parts besides score: score.dense.weight \(48, 32\)",
    ),
    "a norm within a value head": (
        {"v_head.summary.weight": WEIGHT, "v_head.norm.weight": rows(32)}, {},
        r"head v_head of .* has parts besides v_head.summary: v_head.norm.weight \(32,\)",
    ),
    "another name": (
        {"worth.weight": WEIGHT, "worth.bias": BIAS}, {},
        r"no head called score, but tensors outside of its backbone: worth.bias \(1,\), worth.weight \(1, 32\)"
        r".* value_head_prefix \(worth\)",
    ),
    "another name of an MLP": (
        {"worth.0.weight": FIRST, "worth.2.weight": LAST}, {}, r"outside of its backbone: .* value_head_prefix \(worth\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", REFUSED)
def test_a_head_of_another_kind_is_refused_by_its_kind_and_never_advised_away(tmp_path: Path, layout: str) -> None:
    tensors, config, sentence = REFUSED[layout]
    path = directory_of(tmp_path, tensors, **config)
    with pytest.raises(ModelLoadError, match=sentence) as refused:
        load(path)
    assert "fresh" not in str(refused.value)
    word_tokenizer().save_pretrained(path)
    with pytest.raises(ConfigError) as checked:
        load_config("serve", [f"reward.model.path={path}"], kind="serve", files=True)
    same = str(refused.value) if "another name" not in layout else "reward.model.value_head_prefix"
    assert "reward.model.path: " in str(checked.value) and same in str(checked.value)


def test_the_last_part_of_a_head_is_not_read_for_the_whole(tmp_path: Path) -> None:
    """A key that names it would leave the parts before it out in silence."""
    path = directory_of(tmp_path, {"worth.dense.weight": rows(32, 32), "worth.out_proj.weight": WEIGHT})
    with pytest.raises(ModelLoadError, match=r"head worth of .* has parts besides worth.out_proj: worth.dense.weight"):
        load(path, value_head_prefix="worth.out_proj")


def test_the_head_as_it_was_before_the_training_is_not_advised(tmp_path: Path) -> None:
    """What PEFT's wrapper of a module to save holds, written without PEFT."""
    wrapped = {"worth.original_module.weight": rows(1, 32), "worth.modules_to_save.default.weight": WEIGHT}
    with pytest.raises(ModelLoadError, match=r"value_head_prefix \(worth.modules_to_save.default\)"):
        load(directory_of(tmp_path, wrapped))


def test_a_head_beside_a_bare_backbone_is_found(tmp_path: Path, causal: Callable[..., PreTrainedModel]) -> None:
    causal().base_model.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"has no score head .* Ask for a fresh head"):
        load(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"worth.weight": WEIGHT}, file, {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"outside of its backbone: worth.weight \(1, 32\)"):
        load(tmp_path)


def test_a_pickled_head_is_named(tmp_path: Path) -> None:
    path = directory_of(tmp_path, {})
    (path / "value_head.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"head as pickle .* save it as value_head.safetensors"):
        load(path)


def test_a_fresh_head_in_place_of_a_trained_one_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, tensors in (("known", {"v_head.weight": WEIGHT}), ("unknown", {"worth.weight": WEIGHT}), ("none", {})):
        path = directory_of(tmp_path / name, tensors)
        caplog.clear()
        assert float((load(path, init_value_head=True).head.weight - WEIGHT).detach().abs().max()) > 0.1
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [message for message in warnings if "a fresh one replaces" in message] == (
            [f"{path} holds a trained head ({next(iter(tensors)).removesuffix('.weight' * (name == 'known'))}), which a fresh "
             "one replaces, because replace_head or init_value_head asks for it, or it has no known name: leave them out, or "
             "name it in value_head_prefix, to go on with the trained one"]
            if tensors else []
        )  # fmt: skip


def test_a_token_that_ends_every_item_elsewhere_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(directory_of(tmp_path, {"v_head.weight": WEIGHT}, reward_token_id=7))
    assert "names reward_token_id 7: its authors end every item with that token" in caplog.text


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from rlhf_ray.console import get_logger

    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level("INFO", logger=get_logger().name)


# --------------------------------------------------------------------------------------------------- what is written of them


def test_an_mlp_is_trained_and_written_as_it_came(
    tmp_path: Path, packed: Packed, sequences: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    path = directory_of(tmp_path / "model", mlp_named("score"), architectures=["Qwen2ForRewardModel"])
    model = load(path)
    PackedRegression(model)(packed, "scores").sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.1)
    save_pretrained(model, None, tmp_path / "out")
    assert "score.0.weight, score.2.weight" in caplog.text and "only this project reads it" in caplog.text
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in written if name.startswith("score.")} == mlp_named("score").keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Qwen2ForRewardModel"]
    assert torch.equal(scores_of(load(tmp_path / "out"), packed), scores_of(model, packed))

    def grown(hidden: Tensor) -> Tensor:
        return ((FIRST + 0.1) @ hidden + SHIFT + 0.1).clamp(min=0) @ (LAST[0] + 0.1) + 0.8

    torch.testing.assert_close(scores_of(model, packed), by_hand(path, grown, sequences), atol=1e-5, rtol=1e-5)


def test_a_linear_head_of_any_name_becomes_a_plain_one(tmp_path: Path, packed: Packed, sequences: list[Tensor]) -> None:
    """transformers then reads what it could not read before; a head without an output layer is no language model."""
    path = directory_of(tmp_path / "model", {"regression_head.weight": WEIGHT}, output_layer=False)
    word_tokenizer().save_pretrained(path)
    assert main(["export", str(path), str(tmp_path / "out")]) == 0
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    alone = torch.cat([theirs(input_ids=ids[None]).logits[:, 0] for ids in sequences])
    torch.testing.assert_close(alone, scores_of(load(path), packed), atol=1e-5, rtol=1e-5)


def test_what_is_refused_is_refused_by_the_export_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = directory_of(tmp_path / "model", {"regression_layer.weight": rows(19, 32)}, output_layer=False)
    word_tokenizer().save_pretrained(path)
    assert main(["export", str(path), str(tmp_path / "out")]) == 2
    assert "multi-objective head" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_an_adapter_carries_its_head_whatever_it_is_made_of(tmp_path: Path, packed: Packed, kind: str) -> None:
    tensors = {"score.weight": WEIGHT} if kind == "linear" else mlp_named("score")
    model = load(directory_of(tmp_path / "base", tensors))
    add_lora(model.backbone, rank=2, alpha=4)
    model.backbone.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    shake_adapters(model)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.1)
    save_adapter(model, None, tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    torch.testing.assert_close(scores_of(again, packed), scores_of(model, packed), atol=1e-6, rtol=1e-6)


def test_the_head_that_llama_factory_writes_beside_an_adapter_is_read(
    tmp_path: Path, packed: Packed, causal: Callable[..., PreTrainedModel]
) -> None:
    model = load(directory_of(tmp_path / "base", {"score.weight": WEIGHT}))
    add_lora(model.backbone, rank=2, alpha=4)
    model.backbone.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    shake_adapters(model)
    save_adapter(model, None, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "score" not in n}, file, {"format": "pt"})
    head = {"v_head.summary.weight": WEIGHT * 2, "v_head.summary.bias": BIAS}
    save_file(head, tmp_path / "adapter" / "value_head.safetensors", {"format": "pt"})
    expected = 2 * scores_of(model, packed) + 0.7
    torch.testing.assert_close(scores_of(load(tmp_path / "adapter"), packed), expected, atol=1e-5, rtol=1e-5)
