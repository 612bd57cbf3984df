"""What sequences share is computed once, with the scores, values, log-probs and gradients of the pack that repeats it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.forward import attention_backends as backends
from rlhf_ray.models.forward.segments import Segments
from rlhf_ray.models.regression import PackedRegression
from rlhf_ray.models.regression_loading import make_head, wrap_backbone
from rlhf_ray.models.weights.load import check_packing
from rlhf_ray.trajectories import packing
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed, pack
from tests.models.conftest import FAMILIES, VOCABULARY

Make = Callable[..., PreTrainedModel]

families_of_sequences = st.lists(
    st.tuples(st.integers(0, 14), st.lists(st.integers(1, 12), min_size=1, max_size=4)), min_size=1, max_size=3
)
"""Length of a prefix, and those of what follows it in each sequence."""


def batch_of(shape: list[tuple[int, list[int]]], seed: int = 0) -> TrajectoryBatch:
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (length,), generator=generator)

    return TrajectoryBatch.from_sequences(
        [
            torch.cat([prefix, draw(length)])
            for before, lengths in shape
            for prefix in (draw(before),)
            for length in lengths
        ]
    )


def both(batch: TrajectoryBatch, shortest: int = 2) -> tuple[Packed, Packed]:
    """The pack that shares, and the one that repeats."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SHORTEST_SHARED", shortest)
        return pack(batch), pack(batch, share_prefixes=False)


def outputs_and_gradients(
    module: nn.Module, run: Callable[[], tuple[Tensor, ...]]
) -> tuple[list[Tensor], list[Tensor]]:
    module.zero_grad()
    outputs = run()
    generator = torch.Generator().manual_seed(3)
    sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs).backward()
    return list(outputs), [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def assert_same(module: nn.Module, run: Callable[[Packed], tuple[Tensor, ...]], packs: tuple[Packed, Packed]) -> None:
    (actual, mine), (expected, theirs) = (outputs_and_gradients(module, lambda p=p: run(p)) for p in packs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max().clamp(min=1e-3)), rtol=1e-5)


@pytest.fixture(scope="module")
def modules() -> dict[str, tuple[PackedPolicy, PackedRegression]]:
    """A policy and a regression model of every family."""
    from transformers import AutoModelForCausalLM

    models = {}
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        policy, other = (AutoModelForCausalLM.from_config(config(), dtype=torch.float32) for _ in range(2))
        backbone = other.base_model
        model = wrap_backbone(
            backbone,
            make_head(backbone, "inv_sqrt", 0),
            "critic",
            attention="sdpa",
            strict_attention=True,
            head_origin="",
        )
        models[name] = PackedPolicy(Actor(policy, param_dtype="fp32")), PackedRegression(model)
    return models


@settings(deadline=None, max_examples=6, derandomize=True)
@given(shape=families_of_sequences, data=st.data())
def test_equal_to_the_pack_that_repeats(
    modules: dict[str, tuple[PackedPolicy, PackedRegression]], shape: list[tuple[int, list[int]]], data: st.DataObject
) -> None:
    batch = batch_of(shape)
    packs = both(batch)
    wanted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch.num_tokens, max_size=batch.num_tokens)))
    for policy, regression in modules.values():
        for chosen in (None, wanted):
            assert_same(policy, partial(log_probs_and_entropy, policy, chosen), packs)
        assert_same(regression, partial(scores_and_values, regression), packs)


def log_probs_and_entropy(policy: PackedPolicy, wanted: Tensor | None, packed: Packed) -> tuple[Tensor, Tensor]:
    outputs = policy(packed, 0.7, with_entropy=True, wanted=wanted)
    return outputs.log_probs, outputs.entropy


def scores_and_values(regression: PackedRegression, packed: Packed) -> tuple[Tensor, Tensor]:
    return regression(packed, "scores"), regression(packed, "values")


def test_a_shared_prefix_is_run_once(causal: Make) -> None:
    """The saving is real: the linear layers see each shared token once."""
    seen: list[int] = []
    policy = PackedPolicy(Actor(causal(), param_dtype="fp32"))
    policy.actor.backbone.layers[0].mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    shared, whole = both(batch_of([(10, [3, 4, 5])]))
    policy(shared)
    policy(whole)
    assert seen == [10 + 3 + 4 + 5, 3 * 10 + 3 + 4 + 5]


def test_a_tree_of_any_depth(causal: Make) -> None:
    """Beyond what ``pack`` makes: a prefix of a prefix."""
    tokens = batch_of([(0, [14])])["token_ids"]
    parent, lengths = [-1, 0, 1, 1, 0], [4, 3, 2, 1, 4]
    positions = torch.cat([torch.arange(a, a + b) for a, b in zip((0, 4, 7, 7, 4), lengths, strict=True)])
    tree = Packed(tokens, torch.tensor([0, *lengths]).cumsum(0), positions, torch.tensor(parent))
    rows = [[*range(4), *range(4, 7), 7, 8], [*range(4), *range(4, 7), 9], [*range(4), *range(10, 14)]]
    whole = pack(TrajectoryBatch.from_sequences([tokens[row] for row in rows]), share_prefixes=False)
    policy = PackedPolicy(Actor(causal("gemma2"), param_dtype="fp32"))
    assert_same(policy, partial(log_probs_and_entropy, policy, None), (tree, whole))


@pytest.mark.parametrize("window", [None, 4])
def test_a_kernel_that_knows_no_prefixes_gets_whole_sequences(window: int | None) -> None:
    """What the kernels of a GPU get: nothing but causal attention within segments."""
    offsets, parent = torch.tensor([0, 6, 9, 14, 16, 17, 21]), torch.tensor([-1, 0, 0, 1, -1, 4])
    inputs = [torch.randn(21, 2, 8, requires_grad=True) for _ in range(3)]

    def only_whole(q: Tensor, k: Tensor, v: Tensor, segments: Segments, **options: object) -> Tensor:
        assert segments.parent is None
        return backends.KERNELS["sdpa"](q, k, v, segments, **options)

    weights = torch.randn(21, 2, 8)
    results = []
    for kernel in (backends._with_whole_sequences(only_whole), backends.KERNELS["sdpa"]):
        out = kernel(*inputs, Segments.of(offsets, parent), scaling=0.4, window=window, softcap=None)
        results.append((out, *torch.autograd.grad((out * weights).sum(), inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_bf16_agrees_within_its_rounding(causal: Make) -> None:
    batch = batch_of([(14, [3, 12]), (9, [5, 5, 7]), (0, [20])])
    exact, half = causal(), causal().bfloat16()
    exact.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    expected = PackedPolicy(Actor(exact, param_dtype="fp32"))(both(batch)[1]).log_probs.detach()
    actual = PackedPolicy(Actor(half))(both(batch)[0]).log_probs.detach()
    assert float((actual - expected).norm() / expected.norm()) < 1e-2


def test_gradient_checkpointing_shares_as_well(causal: Make) -> None:
    shared, _ = both(batch_of([(9, [3, 4]), (5, [2, 6])]))
    gradients = []
    for enabled in (False, True):
        actor = Actor(causal("gemma3"), param_dtype="fp32").train()
        if enabled:
            actor.gradient_checkpointing_enable()
        PackedPolicy(actor)(shared).log_probs.sum().backward()
        gradients.append([parameter.grad for parameter in actor.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_loading_proves_it(causal: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that forgets what a segment continues is caught before anything is trained."""
    from rlhf_ray.errors import ModelLoadError
    from rlhf_ray.models.forward import packed

    model = Actor(causal(), param_dtype="fp32").model
    monkeypatch.setattr(packed.Segments, "of_pack", classmethod(lambda cls, packed: cls.of(packed.offsets)))
    with pytest.raises(ModelLoadError, match="other outputs packed than alone"):
        check_packing(model, model.base_model)
