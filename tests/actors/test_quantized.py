"""A policy in 4 bits with adapters trains in an engine, and publishes what the trainer computes with, dequantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_ray.actors.workers.policy import LanguageSetup, PolicyWorker
from rlhf_ray.algorithms.losses import NegativeLogLikelihood
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models import load_policy, save_pretrained
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.weights.quantization import four_bit_layers
from rlhf_ray.rollout.wire import to_tensor
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import pack

SEQUENCES = [[5, 6, 7, 8, 9], [10, 11, 12]]


def start(zero: int, *, base: int = 1) -> PolicyWorker:
    torch.set_num_threads(1)
    make = {"shape": "llama-tiny", "tokenizer_from": "world", "seed": base}
    model = {"make": make, "dtype": "bf16", "quantization": "nf4", "lora": {"rank": 4}, "gradient_checkpointing": True}
    engine = {"zero": zero, "optimizer": {"learning_rate": 0.02}}
    worker = PolicyWorker()
    role = RoleConfig.model_validate({"model": model, "engine": engine})
    line = worker.setup(LanguageSetup(role, seed=0, total_updates=16))
    assert "NF4 on 14 layers, LoRA rank 4 on 14 layers" in line
    return worker


def examples() -> TrajectoryBatch:
    masks = [[False] + [True] * (len(sequence) - 1) for sequence in SEQUENCES]
    return TrajectoryBatch.from_sequences(SEQUENCES, action_mask=masks)


def train(worker: PolicyWorker, updates: int) -> list[float]:
    losses = []
    for _ in range(updates):
        report = worker.accumulate(examples(), [(0, 1)], NegativeLogLikelihood(), 6.0)
        assert not worker.apply(skip=not report.finite).skipped
        losses.append(report.loss)
    return losses


@pytest.mark.parametrize("zero", [0, 2])
def test_training_improves_and_what_is_published_is_what_was_trained(zero: int, tmp_path: Path) -> None:
    worker, batch = start(zero), examples()
    frozen = {n: p.weight.clone() for n, p in four_bit_layers(worker.actor).items()}
    losses = train(worker, 16)
    assert losses[-1] < 0.95 * losses[0]  # the embedding and the output layer are frozen
    layers = four_bit_layers(worker.actor)
    assert len(frozen) == 14 and all(torch.equal(layers[name].weight, weight) for name, weight in frozen.items())

    ((_, trained),) = worker.log_probs(batch, [(0, 1)])
    published = worker.publish_weights(1)
    assert published is not None and published.execution is not None and published.execution.quantization == "nf4"
    state = {name: to_tensor(array) for bucket in published.buckets for name, array in bucket}
    plain = load_policy(worker.config.model.model_copy(update={"quantization": None, "lora": None}))
    save_pretrained(plain, None, tmp_path / "rollout", state=state)
    rollout = PackedPolicy(Actor(str(tmp_path / "rollout"), param_dtype="bf16"))(pack(batch)).log_probs.detach()
    before = PackedPolicy(plain)(pack(batch)).log_probs.detach()
    moved, apart = (float((each - rollout).norm()) for each in (before, torch.as_tensor(trained)))
    assert apart < 0.1 * moved and moved > 0.5, (apart, moved)


@pytest.mark.parametrize("zero", [0, 2])
def test_resuming_gives_the_same_bits_on_the_same_base_only(zero: int, tmp_path: Path) -> None:
    worker = start(zero)
    train(worker, 2)
    worker.save(str(tmp_path / "shards"))
    expected = train(worker, 2)
    again = start(zero)
    again.load(str(tmp_path / "shards"))
    assert train(again, 2) == expected
    with pytest.raises(ModelLoadError, match="not the base that this run trained on: of its frozen weights"):
        start(zero, base=2).load(str(tmp_path / "shards"))
