"""What an engine moves to the host and back: the same bits at every stage that can, and where DeepSpeed cannot."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import deepspeed
import pytest
import torch
from torch import nn

from rlhf_ray.algorithms.losses import LossOutput
from rlhf_ray.config.sections.engine import EngineConfig
from rlhf_ray.engine import distributed
from rlhf_ray.engine.engine import Engine
from rlhf_ray.engine.offload import ALL_BUT_WEIGHTS
from rlhf_ray.engine.report import Report
from rlhf_ray.errors import RlhfRayError

BATCH = torch.linspace(-1, 1, 3 * 8 * 16).view(3, 8, 16)


@pytest.fixture(autouse=True)
def process_group() -> None:
    if not torch.distributed.is_initialized():
        distributed.init_process_group(0, 1, None)


def make(zero: int, offload: str, dtype: Literal["bf16", "fp32"], *, frozen: bool) -> Engine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    module.to({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    module[0].requires_grad_(not frozen)
    values = {"zero": zero, "offload": offload, "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1}}
    return Engine(module, EngineConfig.model_validate(values), dtype=dtype, total_updates=10, trainable=True)


def output(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module(rows.to(next(module.parameters()).dtype)).float()
    return result


def accumulate(engine: Engine) -> Report:
    return engine.accumulate(
        [BATCH[0], BATCH[1]], lambda module, rows: LossOutput(output(module, rows).square().sum(), {}), 8.0
    )


def weights(engine: Engine) -> list[torch.Tensor]:
    return [weight.clone() for group in engine.full_state() for _, weight in group]


def trained(engine: Engine, *, moves: bool) -> list[Any]:
    """Losses, norms and outputs of three updates, one of which is dropped; after two of them everything goes and comes back."""
    seen: list[Any] = []
    for update in range(3):
        report = accumulate(engine)
        seen += [report.loss, engine.apply(skip=update == 1).grad_norm]
        if moves and update < 2:
            before = weights(engine)
            engine.offload(keep_weights=True)
            assert all(map(torch.equal, before, weights(engine))), "the weights can be sent"
            engine.offload(keep_weights=False)
            engine.offload(keep_weights=False)
            engine.reload()
    seen.append(engine.evaluate(lambda module: output(module, BATCH[2])).tolist())
    return seen


CAN: list[tuple[int, str, bool, Literal["bf16", "fp32"]]] = [
    (1, "none", False, "fp32"),
    (1, "optimizer", True, "bf16"),
    (2, "none", True, "bf16"),
    (2, "optimizer", False, "fp32"),
    (3, "optimizer", False, "bf16"),
]


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


@pytest.mark.parametrize(("zero", "offload", "frozen", "dtype"), CAN)
def test_what_went_to_the_host_between_two_updates_comes_back_with_the_same_bits(
    zero: int, offload: str, frozen: bool, dtype: Literal["bf16", "fp32"], engines: list[Engine]
) -> None:
    engines += [make(zero, offload, dtype, frozen=frozen) for _ in range(2)]
    assert trained(engines[0], moves=True) == trained(engines[1], moves=False)


def test_an_engine_computes_nothing_while_its_weights_are_away_and_does_not_move_in_an_update(
    engines: list[Engine], tmp_path: Path
) -> None:
    engine = make(1, "none", "fp32", frozen=True)
    engines.append(engine)
    engine.offload(keep_weights=True)
    for call in (
        lambda: engine.evaluate(lambda module: None),
        lambda: accumulate(engine),
        lambda: engine.save_shards(tmp_path),
    ):
        with pytest.raises(RlhfRayError, match="was moved to the host: reload it first"):
            call()
    engine.reload()
    accumulate(engine)
    with pytest.raises(RlhfRayError, match="offload: call apply first"):
        engine.offload(keep_weights=False)


def test_frozen_weights_go_to_the_host_once_and_come_back_to_the_device(
    engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Linear(16, 4)
    engine = Engine(module, EngineConfig(), dtype="fp32", total_updates=None, trainable=False)
    engines.append(engine)
    before = engine.evaluate(lambda one: output(one, BATCH[0]))
    moves: list[tuple[int, str]] = []

    def to(tensor: torch.Tensor, device: object) -> torch.Tensor:
        moves.append((tensor.numel(), str(device)))
        return tensor

    engine._off._device = torch.device("cuda", 0)  # where they come back to shows that they are moved
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", to)
        for freed in ("ipc_collect", "empty_cache"):
            patched.setattr(torch.cuda, freed, lambda freed=freed: moves.append((0, freed)))
        engine.offload(keep_weights=True)
        assert [numbers for numbers, _ in moves if numbers] == [], "it has weights alone, and they stay"
        engine.offload(keep_weights=False)
        engine.offload(keep_weights=False)
        engine.reload()
    assert [move for move in moves if move[0]] == [(64, "cpu"), (4, "cpu"), (4, "cuda:0"), (64, "cuda:0")]
    assert moves[moves.index((4, "cpu")) :][1:3] == [(0, "ipc_collect"), (0, "empty_cache")], (
        "others may have the memory"
    )
    assert torch.equal(engine.evaluate(lambda one: output(one, BATCH[0])), before)


@pytest.mark.parametrize(
    ("zero", "offload", "frozen", "error"),
    [(0, "none", False, AttributeError), (3, "none", False, AssertionError), (3, "all", False, AssertionError),
     (3, "optimizer", True, RuntimeError)],
)  # fmt: skip
def test_what_check_refuses_deepspeed_cannot_move(
    zero: int, offload: str, frozen: bool, error: type[Exception], engines: list[Engine]
) -> None:
    """Fails when DeepSpeed learns it: then config/checks/colocation.py may allow it."""
    engine = make(zero, offload, "fp32", frozen=frozen)
    engines.append(engine)
    trained(engine, moves=False)
    with pytest.raises(error):
        engine.offload(keep_weights=False)


def test_deepspeeds_calls_take_what_they_are_given() -> None:
    parameters = inspect.signature(deepspeed.DeepSpeedEngine.offload_states).parameters
    assert parameters["include"].default is None and {state.value for state in ALL_BUT_WEIGHTS} == {
        "optim_states", "hp_params", "lp_grads", "contiguous_grad_buffer"
    }  # fmt: skip
    assert list(inspect.signature(deepspeed.DeepSpeedEngine.reload_states).parameters) == ["self", "non_blocking"]
