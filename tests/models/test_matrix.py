"""Every pair of {family, what is trained, layout, role} gives the numbers and gradients of plain transformers, eager and alone.

The reference shares nothing with this project but the weights: transformers' own classes with PEFT's adapters, one sequence
at a time without padding or cache, log-probs from whole logits and values by a product with the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.regression import PackedRegression, SequenceRegression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import pack

from .conftest import VOCABULARY, save_random, shake_adapters

FACTORS = {
    "family": ("llama", "qwen3", "gemma2", "mixtral", "olmoe", "olmo2"),
    "trained": ("full", "lora", "nf4+lora"),
    "layout": ("left", "right", "packed", "shared prefix"),
    "role": ("reward", "critic", "policy"),
}
CLEAR = 1e-3
"""Distance of the last expert that is taken from the first that is not, in router logits: no rounding swaps them."""


class Case(NamedTuple):
    family: str
    trained: str
    layout: str
    role: str


def covering() -> list[Case]:
    """Few cases that hold every pair of values of two factors: always the one that adds most."""
    everything = [Case(*values) for values in product(*FACTORS.values())]
    missing = {pair for case in everything for pair in pairs(case)}
    chosen = []
    while missing:
        best = max(everything, key=lambda case: len(missing & pairs(case)))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def pairs(case: Case) -> set[tuple[tuple[str, str], ...]]:
    return set(combinations(zip(case._fields, case, strict=True), 2))


CASES = covering()


def test_every_pair_is_covered() -> None:
    covered = set().union(*map(pairs, CASES))
    expected = sum(len(a) * len(b) for a, b in combinations(FACTORS.values(), 2))
    assert len(covered) == expected == 93 and len(CASES) < 36


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("bases")
    return {family: save_random(family, directory / family, seed=3) for family in FACTORS["family"]}


@pytest.fixture(scope="module")
def sequences() -> list[Tensor]:
    """Two that begin alike, one of them twice as long as the sliding windows; a short one and one of a single token."""
    generator = torch.Generator().manual_seed(8)
    prefix, *rest = (torch.randint(3, VOCABULARY, (length,), generator=generator) for length in (18, 4, 3, 7, 1))
    return [torch.cat([prefix, rest[0]]), torch.cat([prefix, rest[1]]), *rest[2:]]


# ----------------------------------------------------------------------------------------------------- plain transformers


def reference(base: Path, trained: str) -> PreTrainedModel:
    quantized = {}
    if trained == "nf4+lora":
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, **quantized
    ).train()  # in evaluation bitsandbytes would pack its weights anew
    if trained != "full":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=targets))
        shake_adapters(model.model)
    return model


def reference_outputs(model: PreTrainedModel, head: Tensor, role: str, sequences: list[Tensor]) -> Tensor:
    rows = []
    for sequence in sequences:
        if role == "policy":
            log_p = (model(input_ids=sequence[None], use_cache=False).logits[0] / 0.7).log_softmax(-1)
            rows.append(torch.cat([log_p.new_zeros(1), log_p[:-1].gather(1, sequence[1:, None])[:, 0]]))
        else:
            worth = model.model(input_ids=sequence[None], use_cache=False).last_hidden_state[0] @ head
            rows.append(worth[-1:] if role == "reward" else torch.cat([worth.new_zeros(1), worth[:-1]]))
    return torch.cat(rows)


def router_margins(model: PreTrainedModel) -> list[float]:
    """Fills, as the model runs, with the distance between the experts taken and those left."""
    margins: list[float] = []

    def watch(router: nn.Module, _: object, outputs: tuple[Tensor, ...]) -> None:
        best = outputs[0].detach().sort(-1, descending=True).values
        margins.append(float((best[:, router.top_k - 1] - best[:, router.top_k]).min()))

    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(watch)
    return margins


# ------------------------------------------------------------------------------------------------------------ this project


def ours(base: Path, trained: str, role: str) -> Actor | SequenceRegression:
    options = {"param_dtype": "fp32", "load_in_4bit": trained == "nf4+lora"}
    if trained != "full":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        options |= {"lora_rank": 3, "lora_alpha": 5, "target_modules": targets}
    if role == "policy":
        model: Actor | SequenceRegression = Actor(str(base), temperature=0.7, **options)
    else:
        model = get_llm_for_sequence_regression(str(base), role, init_value_head=True, head_init="hf", **options)
    shake_adapters(model.backbone)
    return model


def our_outputs(model: Actor | SequenceRegression, layout: str, sequences: list[Tensor]) -> Tensor:
    if layout in ("left", "right"):
        return padded_outputs(model, layout, sequences)
    packed = pack(TrajectoryBatch.from_sequences(sequences), share_prefixes=layout == "shared prefix")
    assert (packed.parent is not None) == (layout == "shared prefix")
    if isinstance(model, Actor):
        outputs: Tensor = PackedPolicy(model)(packed, temperature=0.7).log_probs
    else:
        outputs = PackedRegression(model)(packed, "values" if model.normalizes_in_training else "scores")
    return outputs


def padded_outputs(model: Actor | SequenceRegression, side: str, sequences: list[Tensor]) -> Tensor:
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_side=side)
    ones = [torch.ones_like(sequence) for sequence in sequences]
    mask = nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)
    if isinstance(model, Actor):
        predictions = model(ids, attention_mask=mask, return_logprobs=True)
    elif model.normalizes_in_training:
        predictions = model(ids, torch.ones_like(mask[:, 1:]), mask)
    else:
        scores: Tensor = model(ids, mask)
        return scores
    whole = nn.functional.pad(predictions, (1, 0))  # now at the token that they are about
    first = mask.argmax(1)[:, None] == torch.arange(ids.shape[1])
    return whole.masked_fill(first, 0.0)[mask.bool()]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_numbers_and_gradients_are_those_of_plain_transformers(
    case: Case, bases: dict[str, Path], sequences: list[Tensor]
) -> None:
    model = ours(bases[case.family], case.trained, case.role)
    theirs = reference(bases[case.family], case.trained)
    head = torch.empty(0) if isinstance(model, Actor) else model.head.weight.detach()[0].clone().requires_grad_()
    margins = router_margins(theirs)
    expected = reference_outputs(theirs, head, case.role, sequences)
    assert (len(margins) > 0) == (case.family in ("mixtral", "olmoe")) and all(margin > CLEAR for margin in margins)
    actual = our_outputs(model, case.layout, sequences)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    compared = 0
    for name, gradient in gradients_of(model):
        other = head.grad[None] if name == "head" else theirs.get_parameter(name).grad
        assert float((gradient - other).abs().max()) <= 1e-5 * float(other.abs().max()), name
        compared += 1
    assert compared == sum(parameter.requires_grad for parameter in model.parameters()) > 0


def gradients_of(model: Actor | SequenceRegression) -> Iterator[tuple[str, Tensor]]:
    """What was trained, by the names of the causal model."""
    inner = model.model if isinstance(model, Actor) else model.backbone
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad:
            yield name if isinstance(model, Actor) else f"model.{name}", parameter.grad
    if isinstance(model, SequenceRegression):
        yield "head", model.head.weight.grad
