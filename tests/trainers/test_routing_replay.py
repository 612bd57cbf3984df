"""PPO in one process with a mixture of experts: log-probs and updates use the experts that came with the samples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.errors import NumericalError, RequestError
from rlhf_ray.models.forward.routing import Routing
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.ppo import experience
from rlhf_ray.trainers.ppo.build import train_ppo
from rlhf_ray.trainers.ppo.self_check import FIRST_RATIO, LOG_PROBS, UPDATED_LOG_PROBS, way_out
from tests.e2e.rollouts import CONFIG, SMALL, save_mixture

SETTINGS = ["rollout.backend=transformers", "rollout.routing_replay=true", "monitoring.ray_metrics=false", "steps=1",
            "checkpoint.every_steps=0"]  # fmt: skip


@pytest.fixture
def train(tmp_path: Path) -> Any:
    save_mixture("mixtral", tmp_path / "model")

    def run() -> None:
        torch.set_num_threads(1)
        policy = f"policy.model={{path: {tmp_path / 'model'}, dtype: fp32}}"
        config: Any = load_config(CONFIG, [f"run.root={tmp_path}", policy, *SMALL, *SETTINGS], kind="ppo")
        directory = RunDirectory.create(tmp_path / config.run.name, dump_config(config))
        train_ppo(config, directory, None, place=ThisProcess(config.cluster))

    return run


def test_log_probs_and_updates_are_of_the_experts_that_came_with_the_samples(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With experts that no engine used, log-probs are far from the engine's, and the first ratio is 1 all the same."""
    column = Routing.column
    monkeypatch.setattr(Routing, "column", lambda self: (column(self) + 1) % 4)
    with pytest.raises(NumericalError) as refused:
        train()
    said = str(refused.value)
    assert re.search(rf"{re.escape(LOG_PROBS)} .*NO", said) and re.search(rf"{re.escape(FIRST_RATIO)} .*yes", said), (
        said
    )


def test_samples_without_their_experts_are_refused(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = experience.Experience.gather
    monkeypatch.setattr(
        experience.Experience,
        "gather",
        lambda self, trajectories, *rest, **named: gather(self, trajectories.without_routed(), *rest, **named),
    )
    with pytest.raises(RequestError, match=r"lack the column routed_experts, but rollout.routing_replay is true"):
        train()


@pytest.mark.parametrize(
    ("policy", "more", "hinted"),
    [
        ("{path: model, dtype: bf16}", [], True),
        ("{path: model, dtype: bf16}", ["rollout.routing_replay=true"], False),
        ("{path: model, dtype: fp32}", ["rollout.dtype=fp32"], False),
        ("{make: {shape: llama-tiny, tokenizer_from: world}, dtype: bf16}", [], False),
    ],
)
def test_where_log_probs_of_a_mixture_in_bf16_differ_routing_replay_is_the_first_way_out(
    policy: str, more: list[str], hinted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_mixture("mixtral", tmp_path / "model")
    settings = ["run.deterministic=false", "rollout.dtype=bf16", f"policy.model={policy}", "reference=null", *more]
    config: Any = load_config(CONFIG, settings, kind="ppo")
    for name in (LOG_PROBS, UPDATED_LOG_PROBS):
        assert way_out(name, config).startswith("rounding sends tokens to other experts") is hinted
