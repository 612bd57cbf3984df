"""Scores are read at the last attended token, in fp32; a head was loaded or was asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rlhf_ray.errors import ModelLoadError, RequestError
from rlhf_ray.models.description import describe
from rlhf_ray.models.heads import fresh_head
from rlhf_ray.models.regression import CriticModel, PackedRegression, SequenceRegression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression
from rlhf_ray.trajectories.packing import Packed

from .conftest import FAMILIES

Make = Callable[..., PreTrainedModel]
Pad = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def classifier(tmp_path: Path, family: str) -> tuple[PreTrainedModel, str]:
    """What plain transformers writes: ``*ForSequenceClassification`` with one label."""
    config = FAMILIES[family]()
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    model.save_pretrained(tmp_path / "classifier")
    return model, str(tmp_path / "classifier")


@pytest.fixture
def policy_directory(tmp_path: Path, causal: Make) -> Path:
    causal().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def load(directory: str | Path, model_type: str = "reward", **arguments: object) -> SequenceRegression:
    return get_llm_for_sequence_regression(str(directory), model_type, **{"param_dtype": "fp32", **arguments})


def scores_alone(model: PreTrainedModel, sequences: list[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=sequence[None]).logits[:, 0] for sequence in sequences])


def values_alone(model: PreTrainedModel, sequence: Tensor) -> Tensor:
    """The head at every token of one sequence, through transformers."""
    return model.score(model.model(input_ids=sequence[None]).last_hidden_state)[0, :, 0]


def test_scores_equal_transformers_padded_packed_and_alone(
    classifier: tuple[PreTrainedModel, str], sequences: list[Tensor], packed: Packed, pad: Pad
) -> None:
    theirs, directory = classifier
    expected = scores_alone(theirs, sequences)
    reward = load(directory).eval()
    torch.testing.assert_close(PackedRegression(reward)(packed, "scores"), expected, atol=1e-5, rtol=1e-5)
    for side in ("left", "right"):
        for reward.packing_samples in (False, True):
            torch.testing.assert_close(reward(*pad(sequences, side)), expected, atol=1e-5, rtol=1e-5)
    weights = torch.arange(1.0, 1 + len(sequences))
    (expected * weights).sum().backward()
    (PackedRegression(reward)(packed, "scores") * weights).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in reward.named_parameters():
        gap = (parameter.grad - gradients[name].grad).norm() / gradients[name].grad.norm().clamp(min=1e-6)
        assert float(gap) < 1e-5, name


def test_values_stand_at_the_token_they_are_about(
    classifier: tuple[PreTrainedModel, str], sequences: list[Tensor], packed: Packed, pad: Pad
) -> None:
    theirs, directory = classifier
    critic = load(directory, "critic")
    values = PackedRegression(critic)(packed, "values")
    expected = [values_alone(theirs, sequence) for sequence in sequences]
    for start, own in zip(packed.offsets.tolist(), expected, strict=False):
        assert values[start] == 0
        torch.testing.assert_close(values[start + 1 : start + len(own)], own[:-1], atol=1e-5, rtol=1e-5)
    for critic.packing_samples in (False, True):
        ids, mask = pad(sequences, "left")
        action_mask = mask[:, -6:].clone()
        action_mask[:, 1] = 0
        padded = critic(ids, action_mask, mask)
        for row, own in enumerate(expected):
            longest = min(6, len(own) - 1)
            kept = action_mask[row, 6 - longest :]
            torch.testing.assert_close(padded[row, 6 - longest :], own[-longest - 1 : -1] * kept, atol=1e-5, rtol=1e-5)


RULE_1 = [
    ([5, 6, 2, 7, 8, 2, 9, 9], [1, 1, 1, 1, 1, 1, 0, 0], 9, 5),
    ([5, 6, 2, 7, 8, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0], 2, 5),
    ([2, 2, 5, 6, 2, 7, 8, 2], [0, 0, 1, 1, 1, 1, 1, 1], 2, 7),
    ([2, 2, 5, 6, 2, 7, 8, 10], [0, 0, 1, 1, 1, 1, 1, 1], 2, 7),
    ([7, 2, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0, 0], 2, 4),
    ([2, 2, 2, 7, 2, 2, 2, 2], [0, 0, 0, 1, 1, 1, 1, 1], 2, 7),
    ([5, 6, 0, 7, 8, 0, 4, 6], [1, 1, 1, 1, 1, 1, 1, 1], 0, 7),
]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("ids", "mask", "pad_id", "last"), RULE_1)
def test_the_last_attended_token_carries_the_reward(
    policy_directory: Path, ids: list[int], mask: list[int], pad_id: int, last: int, packing: bool
) -> None:
    """Where transformers' head looks for the pad id (index 4 of the second row) and TRL for the first (index 1)."""
    reward = load(policy_directory, init_value_head=True, packing_samples=packing).eval()
    reward.config.pad_token_id = pad_id
    tokens, attended = torch.tensor([ids]), torch.tensor([mask])
    _, output = reward(tokens, attended, return_output=True)
    at_each_token = reward.regress(output.last_hidden_state[0]).detach()
    torch.testing.assert_close(reward(tokens, attended)[0].detach(), at_each_token[last], atol=1e-5, rtol=1e-5)
    others = at_each_token[[index for index in range(8) if index != last and mask[index]]]
    assert float((others - at_each_token[last]).abs().min()) > 1e-4


def test_heads_compute_in_fp32_under_a_bf16_backbone(policy_directory: Path, packed: Packed) -> None:
    reward = load(policy_directory, param_dtype="bf16", init_value_head=True)
    assert reward.backbone.dtype == torch.bfloat16
    for cast in (
        lambda model: model,
        lambda model: model.bfloat16(),
    ):  # as loaded, and as DeepSpeed casts whole modules
        scores = PackedRegression(cast(reward))(packed, "scores")
        assert scores.dtype == torch.float32
        seen: list[Tensor] = []
        hook = reward.head.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        again = PackedRegression(reward)(packed, "scores")
        hook.remove()
        exact = seen[0].double() @ reward.head.weight.double()[0]
        torch.testing.assert_close(again.double(), exact, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(reward.head(seen[0]).double(), exact, atol=1e-5, rtol=1e-5)


def rewrite(directory: Path, rename: Callable[[str], str], extra: dict[str, Tensor], **config: object) -> Path:
    """Rename the tensors of a directory, add some, and change its config."""
    file = directory / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors | extra, file, metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory


HEAD = torch.linspace(-1, 1, 32)[None]


@pytest.mark.parametrize(
    ("tensors", "config", "argument", "bias"),
    [
        ({"score.weight": HEAD}, {}, "score", 0.0),
        ({"score.weight": HEAD}, {"value_head_prefix": "worth"}, "score", 0.0),
        ({"worth.weight": HEAD}, {"value_head_prefix": "worth"}, "score", 0.0),
        ({"worth.weight": HEAD}, {}, "worth", 0.0),
        ({"worth.weight": HEAD, "score.weight": -HEAD}, {"value_head_prefix": "worth"}, "score", 0.0),
        ({"value_head.weight": HEAD}, {}, "score", 0.0),
        ({"v_head.summary.weight": HEAD, "v_head.summary.bias": torch.tensor([0.25])}, {}, "score", 0.25),
        ({"score.weight": HEAD}, {"score_bias": 0.5}, "score", 0.5),
    ],
)
def test_every_layout_loads(
    policy_directory: Path, sequences: list[Tensor], causal: Make, tensors: dict[str, Tensor], config: dict[str, object],
    argument: str, bias: float,
) -> None:  # fmt: skip
    reward = load(rewrite(policy_directory, str, tensors, **config), value_head_prefix=argument).eval()
    backbone = causal().base_model
    expected = torch.cat([backbone(input_ids=s[None]).last_hidden_state[0, -1:] @ HEAD[0] for s in sequences]) + bias
    actual = torch.cat([reward(sequence[None]) for sequence in sequences])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert reward.value_head_prefix == config.get("value_head_prefix", argument)


def test_a_missing_head_is_an_error_unless_asked_for(policy_directory: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no score head \(score.weight\).*init_value_head"):
        load(policy_directory)
    assert "fresh, inv_sqrt, seed 0" in describe(load(policy_directory, init_value_head=True))


def test_fresh_heads_follow_their_recipe_and_seed(policy_directory: Path) -> None:
    wide = 4096
    for init, deviation in (
        ("hf", 0.02),
        ("inv_sqrt", 1 / math.sqrt(wide + 1)),
        ("inv", 1 / (wide + 1)),
        ("zero", 0.0),
    ):
        weight = fresh_head(wide, init, initializer_range=0.02, seed=1).weight.detach()
        assert float(weight.std()) == pytest.approx(deviation, rel=0.05) and abs(float(weight.mean())) <= deviation / 16
    torch.manual_seed(0)
    first = load(policy_directory, init_value_head=True, seed=3).head.weight
    torch.manual_seed(9)
    assert torch.equal(first, load(policy_directory, "critic", init_value_head=True, seed=3).head.weight)
    assert not torch.equal(first, load(policy_directory, init_value_head=True, seed=4).head.weight)
    with pytest.raises(ModelLoadError, match="xavier"):
        load(policy_directory, init_value_head=True, head_init="xavier")


def test_normalisation(policy_directory: Path, sequences: list[Tensor], pad: Pad) -> None:
    """Reward models normalise in eval mode only, critics always; without mean and std it is refused."""
    directory = rewrite(policy_directory, str, {"score.weight": HEAD})
    with pytest.raises(ModelLoadError, match="no mean and std"):
        load(directory, normalize_reward=True)
    rewrite(directory, str, {}, mean=0.5, std=2.0)
    ids, mask = pad(sequences)
    raw = load(directory).eval()(ids, mask)
    reward = load(directory, normalize_reward=True)
    torch.testing.assert_close(reward.eval()(ids, mask), (raw - 0.5) / 2)
    torch.testing.assert_close(reward.train()(ids, mask), raw)
    values = load(directory, "critic")(ids, mask[:, 1:], mask)
    critic = load(directory, "critic", normalize_reward=True)
    for mode in (True, False):
        actual = critic.train(mode)(ids, mask[:, 1:], mask)
        torch.testing.assert_close(actual, (values - 0.5) / 2 * mask[:, 1:])
    rewrite(directory, str, {}, std=0.0)
    with pytest.raises(ModelLoadError, match=r"std.*above 0"):
        load(directory, normalize_reward=True)


def test_a_head_of_the_wrong_shape_is_refused(policy_directory: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"3 outputs \(num_labels\)"):
        load(rewrite(policy_directory, str, {"score.weight": torch.ones(3, 32)}))
    with pytest.raises(ModelLoadError, match="reads 16 features"):
        load(rewrite(policy_directory, str, {"score.weight": torch.ones(1, 16)}))


def test_bad_calls(policy_directory: Path, packed: Packed) -> None:
    with pytest.raises(ModelLoadError, match="unknown model_type 'judge'"):
        load(policy_directory, "judge")
    critic = load(policy_directory, "critic", init_value_head=True)
    assert isinstance(critic, CriticModel)
    with pytest.raises(RequestError, match="action_mask"):
        critic(torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(RequestError, match="ring attention"):
        critic(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 1), values_allgather=True)
    with pytest.raises(RequestError, match="unknown kind 'worth'"):
        PackedRegression(critic)(packed, "worth")


def test_lora_trains_adapters_and_the_head(policy_directory: Path, packed: Packed) -> None:
    reward = load(policy_directory, init_value_head=True, lora_rank=4)
    trained = {name for name, parameter in reward.named_parameters() if parameter.requires_grad}
    assert "score.weight" in trained and all("lora_" in name for name in trained - {"score.weight"})
    assert len(trained) == 1 + 2 * 7 * 2
    PackedRegression(reward)(packed, "scores").sum().backward()
    assert all(parameter.grad is not None for parameter in reward.parameters() if parameter.requires_grad)


def test_dropout_modules_of_a_loaded_model_are_off(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    reward = load(tmp_path, init_value_head=True).train()
    assert {module.p for module in reward.modules() if isinstance(module, nn.Dropout)} == {0.0}
    assert (reward.config.attn_pdrop, reward.config.embd_pdrop, reward.config.resid_pdrop) == (0.0, 0.0, 0.0)
    assert any(name.startswith("transformer.h.0") for name, _ in reward.named_parameters())
