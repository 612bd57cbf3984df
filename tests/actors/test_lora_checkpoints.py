"""A checkpoint of a model with frozen weights holds what trains, resumes to the same bits on the same base, and on no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_ray.actors.workers.critic import CriticWorker
from rlhf_ray.actors.workers.model import ModelWorker, WorkerSetup
from rlhf_ray.actors.workers.policy import LanguageSetup, PolicyWorker
from rlhf_ray.algorithms.losses import LossOutput, NegativeLogLikelihood
from rlhf_ray.config.facts import Role
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.engine import shards
from rlhf_ray.engine.engine import Program
from rlhf_ray.errors import ModelLoadError, RequestError
from rlhf_ray.planning.checkpoints import bytes_each, trained_numbers
from rlhf_ray.trajectories.batch import TrajectoryBatch
from tests.models.conftest import word_tokenizer
from tests.rollout.llamas import VOCABULARY, make_llama

SEQUENCES = [[5, 6, 7, 8, 9], [10, 11, 12]]
BASES = {"untied": False, "tied": True}
CASES = [
    (0, None, "tied", "policy"),
    (2, None, "untied", "policy"),
    (3, None, "tied", "critic"),
    (2, "nf4", "untied", "policy"),
    (0, "nf4", "tied", "critic"),
]
"""ZeRO stage, quantisation, base, and role."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of small models in bf16; one ties its output layer to its embedding."""
    directories = {}
    for name, tied in BASES.items():
        directories[name] = tmp_path_factory.mktemp(name)
        make_llama(3, tied=tied).to(torch.bfloat16).save_pretrained(directories[name])
        tokenizer: PreTrainedTokenizerBase = word_tokenizer(VOCABULARY)
        tokenizer.save_pretrained(directories[name])
    return directories


def start(base: Path, zero: int, quantization: str | None = None, kind: str = "policy") -> ModelWorker[Any]:
    torch.set_num_threads(1)
    model = {"path": str(base), "dtype": "bf16", "quantization": quantization, "lora": {"rank": 2}}
    if kind == "critic":
        model["head_init"] = "hf"
    engine = {"zero": zero, "optimizer": {"learning_rate": 0.02}}
    role = RoleConfig.model_validate({"model": model, "engine": engine})
    worker: ModelWorker[Any] = PolicyWorker() if kind == "policy" else CriticWorker()
    setup = LanguageSetup if kind == "policy" else WorkerSetup
    worker.setup(setup(role, seed=0, total_updates=16))
    return worker


def squares(values: Tensor, batch: TrajectoryBatch) -> LossOutput:
    return LossOutput((values - 1.0).square().sum(), {})


def train(worker: ModelWorker[Any], updates: int) -> list[float]:
    masks = [[False] + [True] * (len(sequence) - 1) for sequence in SEQUENCES]
    batch = TrajectoryBatch.from_sequences(SEQUENCES, action_mask=masks)
    loss: Callable[..., LossOutput] = NegativeLogLikelihood() if isinstance(worker, PolicyWorker) else squares
    losses = []
    for _ in range(updates):
        report = worker.accumulate(batch, [(0, 1)], loss, 6.0)
        assert not worker.apply(skip=not report.finite).skipped
        losses.append(report.loss)
    return losses


def weights(worker: ModelWorker[Any]) -> dict[str, Tensor]:
    return dict(worker.disk_weights())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


def tensors_in(value: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a pickled state, wherever it lies, with the keys that lead to it."""
    if isinstance(value, Tensor):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield from tensors_in(item, f"{path}/{key}")


@pytest.mark.parametrize(("zero", "quantization", "base", "kind"), CASES)
def test_it_holds_no_frozen_weight_and_goes_on_with_the_same_bits(
    zero: int, quantization: str | None, base: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    worker = start(bases[base], zero, quantization, kind)
    train(worker, 2)
    worker.save(str(tmp_path / "shards"))
    module = worker.engine.module
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    buffers = {name for name, _ in module.named_buffers() if name in nn.Module.state_dict(module)}
    states = {path: torch.load(path, weights_only=False) for path in (tmp_path / "shards").rglob("*model_states.pt")}
    assert states
    for state in states.values():
        assert set(state["module"]) == {f"module.{name}" for name in trained | buffers}
        held = [path for path, tensor in tensors_in(state) if "frozen" in path and tensor.numel()]
        assert not held
    if kind == "critic":
        assert any("lora" not in name for name in trained), "a head that trains beside the adapters is kept"
    expected, end = train(worker, 2), weights(worker)
    again = start(bases[base], zero, quantization, kind)
    again.load(str(tmp_path / "shards"))
    assert train(again, 2) == expected and equal(weights(again), end)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_base_with_one_changed_byte_is_refused_by_name(zero: int, bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in bases["tied"].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    worker = start(base, zero)
    train(worker, 1)
    worker.save(str(tmp_path / "shards"))
    changed = change_one_byte(base / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    other = start(base, zero)
    before = weights(other)
    with pytest.raises(ModelLoadError) as error:
        other.load(str(tmp_path / "shards"))
    assert str(error.value).startswith(f"{base} is not the base that this run trained on: of its frozen weights ")
    assert changed.removesuffix(".weight") in str(error.value) and ", 1 of 20 in all" in str(error.value)
    assert equal(weights(other), before), "nothing was loaded"


def change_one_byte(file: Path, name: str) -> str:
    with safe_open(file, framework="pt") as held:
        assert name in held.keys()  # noqa: SIM118  (safe_open is not a mapping)
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    at = 8 + header + json.loads(content[8 : 8 + header])[name]["data_offsets"][0]
    content[at] ^= 1
    file.write_bytes(content)
    return name


@pytest.mark.parametrize(("zero", "quantization"), [(2, None), (3, None), (0, "nf4")])
def test_a_checkpoint_of_before_with_its_base_still_loads(
    zero: int, quantization: str | None, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start(bases["untied"], zero, quantization)
    train(worker, 2)
    old = tmp_path / "shards"
    worker.save(str(old))
    with monkeypatch.context() as before:
        before.setattr(Program, "state_dict", nn.Module.state_dict)
        worker.engine._deepspeed.save_checkpoint(str(old), tag=shards.TAG, save_latest=False)
    (old / shards.FROZEN_FILE).unlink()
    expected, end = train(worker, 2), weights(worker)
    again = start(bases["untied"], zero, quantization)
    again.load(str(old))
    assert train(again, 2) == expected and equal(weights(again), end)
    if zero == 3:
        as_if_two_ranks_had_saved(old)
        with pytest.raises(RequestError, match="which only 2 ranks can join: resume with ranks=2"):
            start(bases["untied"], zero, quantization).load(str(old))


def as_if_two_ranks_had_saved(state: Path) -> None:
    """Let a state say so, which is then carried over to one rank by way of DeepSpeed's universal checkpoint."""
    file = state / shards.IDENTITY_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ranks": 2}))


@pytest.mark.long
@pytest.mark.parametrize(("zero", "quantization", "base", "kind"), [*(case for case in CASES if case[0]), CASES[-1]])
def test_it_is_carried_over_to_other_ranks_with_the_same_bits(
    zero: int, quantization: str | None, base: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    state = tmp_path / "checkpoints" / "step-000002" / "policy"
    worker = start(bases[base], zero, quantization, kind)
    train(worker, 2)
    worker.save(str(state))
    expected, end = train(worker, 2), weights(worker)
    as_if_two_ranks_had_saved(state)
    again = start(bases[base], zero, quantization, kind)
    again.load(str(state))
    assert train(again, 2) == expected and equal(weights(again), end)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize(("lora", "share"), [({"rank": 8}, 0.2), (None, None)], ids=["lora", "full"])
def test_the_shard_of_an_adapter_is_a_fifth_of_what_it_was_and_weighs_what_the_plan_says(
    lora: dict[str, int] | None, share: float | None, tmp_path: Path
) -> None:
    """llama-14m, rank 8, bf16: 26.95 MB with the base."""
    model = {"make": {"shape": "llama-14m", "tokenizer_from": "world"}, "dtype": "bf16", "lora": lora}
    role = RoleConfig.model_validate({"model": model, "engine": {"optimizer": {"learning_rate": 1e-3}}})
    worker = PolicyWorker()
    worker.setup(LanguageSetup(role, seed=0, total_updates=16))
    train(worker, 1)
    worker.save(str(tmp_path / "shards"))
    size = sum(file.stat().st_size for file in (tmp_path / "shards").rglob("*") if file.is_file())
    assert share is None or size <= share * 26.95e6
    planned = Role(role, trained=True, head=False)
    numbers = trained_numbers(planned)
    assert numbers is not None and numbers * bytes_each(planned) == pytest.approx(size, rel=0.05)
