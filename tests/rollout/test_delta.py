"""Only what changed travels, in the smallest form, and turns the last version into the next one bit for bit."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.rollout.engine import RolloutEngine
from rlhf_ray.rollout.errors import WeightUpdateError, WireError
from rlhf_ray.rollout.requests import make_requests
from rlhf_ray.rollout.transformers_engine import TransformersEngine
from rlhf_ray.rollout.vllm_engine import VllmEngine
from rlhf_ray.rollout.weights.delta import LastReceived, LastSent, WeightChange, apply_change, change_of
from rlhf_ray.rollout.wire import PublishedWeights, publish, to_array

from .llamas import EOS, largest_difference, make_llama, weights_of

pytestmark = pytest.mark.vllm
SIZE = 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize(("changed", "form"), [(0, "indices"), (1, "indices"), (150, "bitmap"), (SIZE, "whole")])
def test_a_change_turns_the_old_weight_into_the_new_one_bit_for_bit(
    dtype: torch.dtype, changed: int, form: str
) -> None:
    generator = torch.Generator().manual_seed(changed)
    before = torch.randint(0, 2, (10, SIZE // 10), generator=generator).to(dtype)
    after = before.clone()
    where = torch.randperm(SIZE, generator=generator)[:changed]
    flat = after.view(-1)
    flat[where] = (~flat[where] if dtype == torch.bool else flat[where] + 1).to(dtype)
    change, held = change_of("w", to_array(before), to_array(after)), to_array(before).copy()
    if dtype != torch.bool:
        assert change.form == form
    item = after.element_size()
    assert change.nbytes == min(changed * (4 + item), SIZE // 8 + changed * item, SIZE * item)
    apply_change(change, held)
    assert held.tobytes() == to_array(after).tobytes()


def test_signs_of_zero_and_kinds_of_nan_are_changes_too() -> None:
    before = np.array([0.0, np.nan, 1.0], np.float32)
    after = before.copy()
    after.view(np.uint32)[:2] ^= np.array([2**31, 1], np.uint32)
    assert len(change_of("w", before, after).values) == 2
    assert not len(change_of("w", after, after.copy()).values), "the same NaN is no change"


def test_a_change_of_another_weight_is_refused() -> None:
    held = np.zeros(4, np.float32)
    for change, message in (
        (WeightChange("w", "indices", np.array([4], np.uint32), np.ones(1, np.float32)), "do not fit its shape"),
        (WeightChange("w", "bitmap", np.array([255], np.uint8), np.ones(1, np.float32)), "do not fit its shape"),
        (WeightChange("w", "whole", np.empty(0, np.uint8), np.ones(5, np.float32)), "changed to shape"),
        (WeightChange("w", "indices", np.array([0], np.uint32), np.ones(1, np.float64)), "changed to dtype"),
    ):
        with pytest.raises(WireError, match=message):
            apply_change(change, held)


def test_a_publication_that_failed_half_way_is_the_base_of_nothing() -> None:
    last = LastSent()
    weights = [("a", torch.zeros(8)), ("b", torch.zeros(8))]
    assert publish(0, weights, last=last).delta is None
    assert publish(1, weights, last=last).delta is not None

    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(8)
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        publish(2, failing(), last=last)
    assert publish(3, weights, last=last).delta is None


def test_what_an_engine_does_not_hold_is_no_base() -> None:
    last, held = LastSent(), LastReceived()
    first = publish(0, [("a", torch.zeros(8))], last=last)
    second = publish(1, [("a", torch.tensor([1.0, *[0.0] * 7]))], last=last)
    assert second.delta is not None and second.delta.base == first.checksum
    assert not held.holds(second.delta)
    list(held.remember(first.buckets, to_array))
    assert not held.holds(second.delta), "weights that an update has not checked yet"
    held.adopted(first.checksum)
    assert held.holds(second.delta)


def test_changes_of_more_than_half_of_all_bytes_do_not_travel_beside_the_weights() -> None:
    last, kept = LastSent(), list[Any]()
    publish(0, [("a", torch.zeros(100)), ("b", torch.zeros(100))], last=last)
    most = torch.cat([torch.ones(49), torch.zeros(51)])
    weights = [("a", torch.ones(100)), ("b", most)]
    assert publish(1, weights, last=last, keep=kept.append, bucket_bytes=10).delta is None
    again = publish(2, [("a", torch.zeros(100)), ("b", most)], last=last)
    assert again.delta is not None and again.delta.nbytes == 400, "half of all is worth it, and counts from version 1"


# In engines

TOLERANCE, DEADLINE_S = 1e-4, 60.0


CONFIG = RolloutConfig(dtype="fp32", kv_cache_gib=0.1, max_model_tokens=64, weight_delta=True)
REQUESTS = make_requests([(row, [2 + row, 5, 7, 9 + row]) for row in range(6)], samples_per_prompt=1, max_new_tokens=8)


@pytest.fixture(params=[TransformersEngine, VllmEngine])
def engine(request: pytest.FixtureRequest, save_llama: Any) -> Iterator[RolloutEngine]:
    started: RolloutEngine = request.param(save_llama(0, tied=True)[1], CONFIG, stop_token_ids=(EOS,))
    yield started
    started.shutdown()


def changed(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """One query projection alone, a part of a layer that vLLM fuses, and a few numbers of the tied embedding."""
    torch.manual_seed(seed)
    other = make_llama(0, tied=True)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight.add_(torch.randn(64, 64) * 0.3)
        other.model.embed_tokens.weight[5:9].mul_(-1)
    return other


def watched(published: PublishedWeights, read: list[int]) -> PublishedWeights:
    """The same publication, which notes in ``read`` when all weights are read."""

    def buckets() -> Iterator[Any]:
        read.append(published.version)
        yield from published.buckets

    return replace(published, buckets=buckets())


def test_engines_that_hold_the_last_version_take_its_changes_alone_and_compute_the_trainers_log_probs(
    engine: RolloutEngine,
) -> None:
    last, models, read = LastSent(), [make_llama(0, tied=True)], list[int]()
    for seed in (1, 2):
        models.append(changed(models[-1], seed))
    for version, model in enumerate(models):
        published = publish(version, weights_of(model), last=last, bucket_bytes=20_000)
        engine.receive(watched(published, read))
        assert read == [0], "all weights are read for the first version alone"
        generations = engine.generate(REQUESTS, DEADLINE_S)
        assert {v for one in generations for v in one.weight_versions} == {version}
        assert largest_difference(model, REQUESTS, generations, 1.0) < TOLERANCE
        if version:
            assert 0.0 < published.share_to_send < 0.2
            assert largest_difference(models[version - 1], REQUESTS, generations, 1.0) > 0.01
    missed = publish(3, weights_of(models[0]), last=last)
    later = publish(4, weights_of(models[1]), last=last)
    assert missed.delta is not None and later.delta is not None
    engine.receive(watched(later, read))
    assert read == [0, 4], "it missed version 3, and so takes all"
    assert largest_difference(models[1], REQUESTS, engine.generate(REQUESTS, DEADLINE_S), 1.0) < TOLERANCE


def test_changes_that_end_in_other_weights_are_refused_and_a_new_engine_takes_all(save_llama: Any) -> None:
    directory, last = save_llama(0, tied=True)[1], LastSent()
    models = [make_llama(0, tied=True)]
    models.append(changed(models[0], 1))
    engine = TransformersEngine(directory, CONFIG, stop_token_ids=(EOS,))
    engine.receive(publish(0, weights_of(models[0]), last=last))
    second = publish(1, weights_of(models[1]), last=last)
    with pytest.raises(WeightUpdateError, match="checksum"):
        engine.receive(replace(second, checksum="0" * 64))
    fresh = TransformersEngine(directory, CONFIG, stop_token_ids=(EOS,))
    fresh.receive(second)
    assert largest_difference(models[1], REQUESTS, fresh.generate(REQUESTS, DEADLINE_S), 1.0) < TOLERANCE


def test_a_delta_weighs_on_the_wire_what_it_says() -> None:
    last = LastSent()
    model = make_llama(0, tied=True)
    publish(0, weights_of(model), last=last)
    delta = publish(1, weights_of(changed(model, 1)), last=last, bucket_bytes=20_000).delta
    assert delta is not None
    wire = sum(len(pickle.dumps(bucket, protocol=5)) for bucket in delta.buckets)
    assert delta.nbytes < wire < delta.nbytes + 400 * len(weights_of(model)), "names, forms and shapes besides"
