"""Scores from the last tokens alone, in parts, are those of the whole pass, and so are their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.forward import attention_backends as backends
from rlhf_ray.models.forward import last_tokens
from rlhf_ray.models.forward.attention import segment_attention
from rlhf_ray.models.forward.packed import last_token_forward, packed_forward
from rlhf_ray.models.regression import PackedRegression
from rlhf_ray.models.regression_loading import make_head, wrap_backbone
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed, pack
from tests.models.conftest import ALL_FAMILIES, LENGTHS, SIZES, VOCABULARY

Make = Callable[..., PreTrainedModel]


def regression(causal: Make, family: str = "llama") -> PackedRegression:
    backbone = causal(family).base_model
    head = make_head(backbone, "inv_sqrt", 0)
    return PackedRegression(
        wrap_backbone(backbone, head, "reward", attention="sdpa", strict_attention=True, head_origin="")
    )


@pytest.fixture
def packed() -> Packed:
    """Sequences of several lengths; the first two share more than half of their tokens."""
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in (*LENGTHS, 22)]
    sequences[1] = torch.cat([sequences[-1][:18], sequences[1]])
    return pack(TrajectoryBatch.from_sequences([sequences[-1], *sequences[1:-1]]))


def whole_scores(module: PackedRegression, packed: Packed) -> Tensor:
    return module.model.regress(packed_forward(module.model.backbone, packed).index_select(0, packed.last_tokens))


def with_gradients(module: nn.Module, scores: Tensor) -> tuple[Tensor, list[Tensor]]:
    module.zero_grad()
    (scores * torch.linspace(1.0, 2.0, len(scores))).sum().backward()
    return scores.detach(), [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_equal_to_the_whole_pass(
    causal: Make, packed: Packed, family: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packed.parent is not None, "a prefix is shared"
    monkeypatch.setattr(last_tokens, "NUMBERS_AT_ONCE", 0)
    monkeypatch.setattr(last_tokens, "FEWEST_TOKENS_AT_ONCE", 5)
    module = regression(causal, family).train()
    expected, their_gradients = with_gradients(module, whole_scores(module, packed))
    if checkpointed:
        module.model.gradient_checkpointing_enable()
    actual, gradients = with_gradients(module, module(packed, "scores"))
    with torch.no_grad():
        evaluated = module(packed, "scores")
    for scores in (actual, evaluated):
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max().clamp(min=1e-3)), rtol=1e-5)
    assert not [name for name, each in module.named_modules() if "forward" in vars(each)], "modules are as before"


def test_the_last_layer_runs_for_what_is_read_and_others_in_parts(
    causal: Make, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saving is real."""
    monkeypatch.setattr(last_tokens, "NUMBERS_AT_ONCE", 0)
    monkeypatch.setattr(last_tokens, "FEWEST_TOKENS_AT_ONCE", 16)
    module = regression(causal)
    seen: dict[str, list[int]] = {}
    for name, each in module.model.backbone.named_modules():
        if name.endswith(("down_proj", "q_proj", "k_proj", "o_proj")):
            each.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, []).append(out.shape[1]))
    forward = last_tokens._token_by_token
    ran: list[int] = []
    monkeypatch.setattr(
        last_tokens,
        "_token_by_token",
        lambda f, *args: forward(lambda rows: ran.append(rows.shape[1]) or f(rows), *args),
    )
    attended: list[list[int] | None] = []
    monkeypatch.setattr(
        backends,
        "segment_attention",
        lambda *args, **options: attended.append(args[-1].read) or segment_attention(*args, **options),
    )
    with torch.no_grad():
        last_token_forward(module.model.backbone, packed)
    read, tokens = len(packed.sequences), packed.num_tokens
    assert seen["layers.1.mlp.down_proj"] == [read]
    assert sum(seen["layers.0.mlp.down_proj"]) == tokens
    assert max(seen["layers.0.mlp.down_proj"]) == 16
    assert seen["layers.1.self_attn.k_proj"] == [tokens]
    assert ran.count(read) == len(last_tokens.LAST_LAYER) + 1, "the MLP, norms before and behind it, both projections"
    assert attended == [None, packed.ends], "the last layer attends for them alone"


@pytest.mark.parametrize("model_type", ["nanochat", "hrm_text"])
def test_a_model_that_runs_a_module_twice_is_not_narrowed(model_type: str, packed: Packed) -> None:
    """nanochat normalises with one module before its layers and behind them; hrm_text runs its layers again and again."""
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in causal.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    backbone = causal.base_model
    head = make_head(backbone, "inv_sqrt", 0)
    module = PackedRegression(
        wrap_backbone(backbone, head, "reward", attention="sdpa", strict_attention=True, head_origin="")
    )
    alone = torch.stack(
        [
            backbone(input_ids=packed.token_ids[tokens][None], use_cache=False).last_hidden_state[0, -1]
            for tokens in tokens_of_sequences(packed)
        ]
    )
    torch.testing.assert_close(module(packed, "scores"), module.model.regress(alone), atol=1e-5, rtol=1e-5)


def tokens_of_sequences(packed: Packed) -> tuple[Tensor, ...]:
    lengths = packed.unshared().lengths.tolist()
    return packed.sequence_tokens.split(lengths)


def wanted_of(packed: Packed) -> Tensor:
    """Answers: the last four tokens of each sequence, and the first token after the shared prefix of the first two."""
    ends = packed.unshared().lengths.cumsum(0)
    wanted = torch.zeros(int(ends[-1]), dtype=torch.bool)
    for end in ends.tolist():
        wanted[end - 4 : end] = True
    return wanted.index_fill(0, torch.tensor([18, int(ends[0]) + 18]), True)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_values_and_log_probs_of_wanted_tokens_and_their_gradients_are_those_of_the_whole_pass(
    causal: Make, packed: Packed, family: str
) -> None:
    """The first two sequences read one hidden state, of the prefix that they share: its gradient counts once for each."""
    critic = regression(causal, family).train()
    policy = PackedPolicy(Actor(causal(family))).train()
    wanted = wanted_of(packed)
    for module, outputs in (
        (critic, lambda **options: critic(packed, "values", **options)),
        (policy, lambda **options: policy(packed, **options).log_probs),
    ):
        expected, their_gradients = with_gradients(module, outputs()[wanted])
        actual, gradients = with_gradients(module, outputs(wanted=wanted)[wanted])
        with torch.no_grad():
            assert torch.equal(outputs(wanted=wanted)[wanted], actual), "or the first ratio would not be exactly 1"
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max().clamp(min=1e-3)), rtol=1e-5)
        assert not [name for name, each in module.named_modules() if "forward" in vars(each)], "modules are as before"


def test_behind_the_last_attention_only_tokens_before_wanted_ones_run_but_not_in_a_checkpointed_model(
    causal: Make, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, ran = regression(causal).train(), list[int]()
    forward = last_tokens._token_by_token
    monkeypatch.setattr(
        last_tokens,
        "_token_by_token",
        lambda f, *args: forward(lambda rows: ran.append(rows.shape[1]) or f(rows), *args),
    )
    wanted = wanted_of(packed)
    before = packed.previous_tokens[packed.sequence_tokens[wanted]]
    read = len(before[before >= 0].unique())
    assert read < int((before >= 0).sum()), "one is read twice"
    module(packed, "values", wanted)
    assert ran == [read] * (len(last_tokens.BEHIND_ATTENTION) + 1), (
        "output projection, norm, MLP, and the norm behind the layers"
    )
    module.model.gradient_checkpointing_enable()
    module(packed, "values", wanted).sum().backward()
    assert len(ran) == len(last_tokens.BEHIND_ATTENTION) + 1
