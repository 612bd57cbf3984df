"""The rotation of a token depends on its own sequence and on nothing else: not on longer sequences in the same pack or batch,
nor on what ran before. The reference is transformers, eager, on a model loaded for one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlhf_ray.config.files.positions import FIXED
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.forward.rotation import longest_alike, sequence_lengths
from rlhf_ray.models.regression import PackedRegression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed, pack

from .conftest import SIZES, VOCABULARY

ORIGINAL = 32
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 8.0, 20.0],
}  # fmt: skip
TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": LONG,
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "proportional": {"rope_type": "proportional"},
}  # fmt: skip
"""Parameters of every type of RoPE that transformers knows."""


def config(model_type: str, parameters: Mapping[str, Any], **changes: Any) -> PreTrainedConfig:
    positions = ORIGINAL if parameters.get("rope_type") == "dynamic" else 256
    sizes = SIZES | {"max_position_embeddings": positions, "rope_parameters": {"rope_theta": 10000.0, **parameters}}
    return AutoConfig.for_model(model_type, **(sizes | changes))


def per_layer() -> PreTrainedConfig:
    """Layers of two types, each with a rotation of its own, both of which depend on the length."""
    layers = {"sliding_attention": LONG, "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
    types = ["sliding_attention", "full_attention"]
    return config("gemma3_text", layers, sliding_window=5, layer_types=types, max_position_embeddings=ORIGINAL)


CASES: dict[str, Callable[[], PreTrainedConfig]] = {
    **{name: lambda name=name: config("llama", TYPES[name]) for name in TYPES},
    "phi3 longrope": lambda: config("phi3", LONG, sliding_window=None, original_max_position_embeddings=ORIGINAL),
    "phimoe longrope": lambda: config(
        "phimoe", LONG | {"short_mscale": 1.1, "long_mscale": 1.4}, num_local_experts=4, sliding_window=None
    ),
    "hunyuan dynamic": lambda: config("hunyuan_v1_dense", {"rope_type": "dynamic", "factor": 1.0, "alpha": 50.0}),
    "gemma3 by layer": per_layer,
}
DEPENDS = {"dynamic", "longrope", "phi3 longrope", "phimoe longrope", "hunyuan dynamic", "gemma3 by layer"}


def test_every_type_that_transformers_knows_is_tried() -> None:
    assert set(TYPES) == set(ROPE_INIT_FUNCTIONS) | {"default"}
    assert set(TYPES) - {"dynamic", "longrope"} | {"mrope"} == FIXED


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rotations")
    for name, make in CASES.items():
        with torch.random.fork_rng():
            torch.manual_seed(5)
            AutoModelForCausalLM.from_config(make()).save_pretrained(root / name)
    return {name: root / name for name in CASES}


@pytest.fixture(scope="module")
def items() -> list[Tensor]:
    """Below, at and beyond the length from which rotations differ; two that begin alike on both sides of it; one token."""
    generator = torch.Generator().manual_seed(8)
    prefix, *rest = (
        torch.randint(3, VOCABULARY, (n,), generator=generator) for n in (20, 5, 60, 10, ORIGINAL, ORIGINAL + 1, 90, 1)
    )
    return [torch.cat([prefix, rest[0]]), torch.cat([prefix, rest[1]]), *rest[2:]]


def alone(directory: Path, ids: Tensor) -> Tensor:
    """The last hidden state of each token by a model that has seen nothing else."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("name", CASES)
def test_a_score_alone_is_the_score_in_company(
    name: str, directories: dict[str, Path], items: list[Tensor], pad: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    model = get_llm_for_sequence_regression(
        str(directories[name]), "reward", param_dtype="fp32", init_value_head=True, head_init="hf"
    ).eval()
    assert longest_alike(model.config) == (ORIGINAL if name in DEPENDS else None)
    with torch.no_grad():
        expected = torch.stack([model.head(alone(directories[name], ids)[-1]) for ids in items]).flatten()
        packs = [pack(TrajectoryBatch.from_sequences(items)), pack(TrajectoryBatch.from_sequences(items[::-1]))]
        assert packs[0].parent is not None, "a prefix is shared by a short item and a long one"
        scores = PackedRegression(model)
        torch.testing.assert_close(scores(packs[0], "scores"), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores(packs[1], "scores").flip(0), expected, atol=1e-5, rtol=1e-5)
        one_by_one = [scores(pack(TrajectoryBatch.from_sequences([ids])), "scores") for ids in items]
        torch.testing.assert_close(torch.cat(one_by_one), expected, atol=1e-5, rtol=1e-5)
        for side in ("left", "right"):
            torch.testing.assert_close(model(*pad(items, side)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_the_rotations_that_are_told_apart_differ(name: str, directories: dict[str, Path], items: list[Tensor]) -> None:
    """Otherwise the test above would pass for a forward that takes no notice of lengths."""
    model = AutoModelForCausalLM.from_pretrained(directories[name], dtype=torch.float32).eval()
    ids, longest = items[2], items[-2]
    rows = torch.zeros(2, len(longest), dtype=torch.int64)
    rows[0, : len(ids)], rows[1] = ids, longest
    with torch.no_grad():
        together = model.base_model(input_ids=rows, use_cache=False).last_hidden_state[0, : len(ids)]
    assert float((together - alone(directories[name], ids)).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["dynamic", "phi3 longrope"])
def test_log_probs_and_gradients_are_those_of_each_sequence_alone(
    name: str, directories: dict[str, Path], items: list[Tensor]
) -> None:
    actor = Actor(str(directories[name]), param_dtype="fp32")
    outputs = PackedPolicy(actor)(pack(TrajectoryBatch.from_sequences(items))).log_probs
    rows = []
    theirs: dict[str, Tensor] = {}
    for ids in items:
        model = AutoModelForCausalLM.from_pretrained(
            directories[name], dtype=torch.float32, attn_implementation="eager"
        )
        log_p = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        rows.append(torch.cat([log_p.new_zeros(1), log_p[:-1].gather(1, ids[1:, None])[:, 0]]))
        if len(ids) > 1:
            rows[-1].sum().backward()
            for key, parameter in model.named_parameters():
                theirs[key] = theirs.get(key, 0) + parameter.grad
    torch.testing.assert_close(outputs, torch.cat(rows), atol=1e-5, rtol=1e-5)
    outputs.sum().backward()
    for key, parameter in actor.model.named_parameters():
        assert float((parameter.grad - theirs[key]).abs().max()) <= 1e-4 * float(theirs[key].abs().max()), key


def test_lengths_follow_from_positions_in_packs_and_padded_batches() -> None:
    packed = torch.tensor([[0, 1, 2, 0, 0, 1]])
    assert sequence_lengths(packed).tolist() == [[3, 3, 3, 1, 2, 2]]
    assert sequence_lengths(packed.expand(3, 1, 6)).tolist() == [[3, 3, 3, 1, 2, 2]]
    padded = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 1, 1]])
    lengths = sequence_lengths(padded)
    assert lengths[0, 2:].tolist() == [3] * 3 and lengths[1].tolist() == [5] * 5 and lengths[2, :3].tolist() == [3] * 3


def test_an_unshared_pack_holds_the_same_sequences(items: list[Tensor]) -> None:
    batch = TrajectoryBatch.from_sequences(items)
    shared, whole = pack(batch), pack(batch, share_prefixes=False)
    unshared = shared.unshared()
    assert shared.parent is not None and unshared.parent is None
    for name in ("token_ids", "offsets", "position_ids"):
        assert torch.equal(getattr(unshared, name), getattr(whole, name)), name
    assert isinstance(unshared, Packed)
