"""What the checks see: on the CPU what is right passes, and what is wrong is told."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_ray.models.actor import Actor
from rlhf_ray.models.disk_names import to_disk_names
from rlhf_ray.models.forward.segments import Group, Segments
from rlhf_ray.planning.flops import training_flops
from tests.gpu import agreement, engines, loaders, memory, publication, shapes, throughput
from tests.gpu.checks import FoundWrong
from tests.gpu.sizes import SIZES

TINY = SIZES["cpu"]


def test_attention_that_looks_past_its_segment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_the_mask(self: Segments, group: Group, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(group.longest, group.context + group.longest, dtype=dtype)

    monkeypatch.setattr(Segments, "mask", forgets_the_mask)
    monkeypatch.setattr("rlhf_ray.models.actor.check_packing", lambda *models: None)
    with pytest.raises(AssertionError, match="hidden states of packs"):
        agreement.attention_agrees("cpu", TINY, attention="sdpa", dtype_name="bfloat16")


def test_four_bit_weights_that_are_others_than_those_written_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    write = agreement.save_pretrained

    def write_another(actor: Actor, tokenizer: None, directory: str) -> None:
        write(actor, tokenizer, directory, state={name: 1.1 * tensor for name, tensor in to_disk_names(actor.model)})

    monkeypatch.setattr(agreement, "save_pretrained", write_another)
    with pytest.raises(AssertionError, match="NF4 and its dequantised weights differ"):
        agreement.four_bit_agrees("cpu", dataclasses.replace(TINY, sequences=2, longest=30))


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_a_known_model_are_counted(tied: bool) -> None:
    config = shapes.config_of("tiny")
    config.tie_word_embeddings = tied
    model = throughput.Actor(shapes.AutoModelForCausalLM.from_config(config), attn_implementation="sdpa").model
    # Of 2 layers: queries, keys, values and outputs of 2, 1, 1 and 2 heads of 32, and three matrices of 32 times 64.
    weights = 2 * (6 * 32 * 32 + 3 * 32 * 64) + 128 * 32
    assert shapes.compute_shape(model).parameters == weights == shapes.compute_shape(model).trained
    # One token attends to itself, in 2 layers of 2 heads, at 2 operations a number of a head; the head's share included.
    assert shapes.scoring_flops(shapes.compute_shape(model), [1]) == 2 * weights + 2 * 2 * 2 * 32
    model.requires_grad_(False)
    frozen = shapes.compute_shape(model)
    assert training_flops(frozen, [1]) == 4 * weights + 6 * 2 * 2 * 32


def test_the_shapes_have_as_many_weights_as_their_names_say() -> None:
    for name, billions in (("qwen3-0.6b", 0.596), ("qwen3-8b", 8.19)):
        with torch.device("meta"):
            model = shapes.AutoModelForCausalLM.from_config(shapes.config_of(name))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=2e-3)
    assert len(shapes.config_of("qwen3-8b", layers=3).layer_types) == 3


def test_what_takes_the_time_is_listed_where_the_share_is_low(monkeypatch: pytest.MonkeyPatch) -> None:
    work: Callable[[], throughput.Findings] = lambda: throughput.policy_scoring_of_large_model("cpu", TINY)  # noqa: E731
    assert "aten::mm" in work()[1]
    monkeypatch.setattr(throughput, "GOOD_SHARE", 0.0)
    assert work()[1] == ""


class Hands:
    """A queue that lets somebody change the buffer on the way."""

    def __init__(self, meddle: Callable[[torch.Tensor], None] | None = None) -> None:
        self.queue: queue.Queue[Any] = queue.Queue()
        self.meddle = meddle

    def put(self, message: Any) -> None:
        if self.meddle is not None and isinstance(message, tuple):
            self.meddle(message[1])
        self.queue.put(message)

    def get(self, timeout: float | None = None) -> Any:
        return self.queue.get(timeout=timeout)


def test_weights_that_changed_on_their_way_to_another_process_are_told() -> None:
    model, buffer = shapes.make("tiny", "cpu"), torch.empty(10_000, dtype=torch.uint8)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    def flip(sent: torch.Tensor) -> None:
        sent[5] ^= 1

    arrived = []
    for meddle in (None, flip):
        there, back = Hands(meddle), Hands()
        receiver = threading.Thread(target=publication.receive, args=(there, back))
        receiver.start()
        checksum, held = publication._send(model, buffer, there, back)
        arrived.append(back.get() == checksum)
        there.put(None)
        receiver.join()
        assert held == size > 2 * len(buffer), "the weights are not sent once each, or in one chunk"
    assert arrived == [True, False]


def test_memory_that_does_not_follow_the_formula_is_told_with_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, limit in ((105.0, "rest"), (100.0, "peak")):
        held = memory.Held(rest=found * 1.01e7, peak=120e7)
        monkeypatch.setattr(memory, "_update", lambda *arguments, held=held: (held, memory.Held(100e7, 100e7)))
        monkeypatch.setattr(memory, "init_process_group", lambda *arguments, **options: None)
        with pytest.raises(FoundWrong, match=limit) as caught:
            memory.memory_follows_formulas("cpu", TINY, zero=0)
        assert caught.value.figures["gpu.memory.tiny.zero0.peak_to_formula"].value == pytest.approx(1.2)


def test_an_engine_that_does_not_train_as_plain_adamw_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros_to(name: str) -> dict[str, torch.Tensor]:
        return {"weight": torch.zeros(3), name: torch.ones(3)}

    monkeypatch.setattr(engines, "init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr(
        engines, "_reference", lambda *arguments: (zeros_to("bias"), {"weight": torch.ones(3), "bias": torch.ones(3)})
    )
    monkeypatch.setattr(
        engines, "_trained", lambda *arguments: {"weight": torch.full((3,), 0.9), "bias": torch.ones(3)}
    )
    with pytest.raises(AssertionError, match=r"at ZeRO 2 weights are off by .*0\.1"):
        engines.engine_trains_as_plain_adamw("cpu", TINY, zero=2)
    monkeypatch.setattr(engines, "_trained", lambda *arguments: {"weight": torch.ones(3)})
    with pytest.raises(AssertionError, match="holds other weights"):
        engines.engine_trains_as_plain_adamw("cpu", TINY, zero=2)


def test_a_model_that_loads_elsewhere_or_with_other_weights_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = loaders.ModelConfig.model_validate({"make": loaders._made(TINY), "dtype": "bf16"})
    with pytest.raises(AssertionError, match="tensors are not on cuda"):
        monkeypatch.setattr(loaders.torch, "device", lambda name: "cpu")  # a loader that forgets the device
        monkeypatch.setattr(loaders, "load", lambda kind, config, device: torch.nn.Linear(2, 2))
        loaders._off("policy", config, "cuda", TINY)
    with pytest.raises(AssertionError, match="weight has other values"):
        loaders._make_alike(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), compare=True)
    with pytest.raises(AssertionError, match=r"differ by more than .*policy fp32 1\.0e-02"):
        loaders._worst([("policy fp32", 1e-2), ("reward bf16", 1e-2)])


def test_as_many_layers_are_trained_as_a_gpu_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(free: float) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free), int(free)))
        return engines._layers_that_fit("qwen3-8b")

    # A layer has 193 million weights of 20 bytes, the embedding 622 million.
    assert layers(141e9) == int((0.7 * 141e9 - 12.4e9) // 3.86e9) == 22
    assert layers(24e9) == 1 and layers(400e9) == 36
