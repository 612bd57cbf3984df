"""A PPO run with ``expose`` answers with the scores of the reward model that it trains against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import load_config
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.expose_run import bring_back
from rlhf_ray.trainers.ppo import build
from tests.trainers.test_rewards_in_process import TINY_PPO, rows, start, tiny_model


def test_a_run_answers_with_its_own_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float | None] = {}
    really = build.expose

    def expose_and_ask(groups: Any, roles: Any, config: Any, cleanup: Any, *, restarts: bool) -> str:
        address = really(groups, roles, config, cleanup, restarts=restarts)
        answer = httpx.post(f"{address}/v1/reward", json={"items": [{"token_ids": [5, 6, 7]}]}, timeout=30).json()
        seen["over HTTP"] = answer["results"][0]["raw"]
        seen["in the run"] = groups["reward"].score([ScoreRequest(token_ids=(5, 6, 7))]).result()[0].raw
        lost = groups["reward"].ranks.worker
        groups["reward"].ranks.end()
        answer = httpx.post(f"{address}/v1/reward", json={"items": [{"token_ids": [5, 6, 7]}]}, timeout=60).json()
        seen["after its death"] = answer["results"][0]["raw"]
        living = groups["reward"].ranks.worker
        assert living is not lost
        assert bring_back(groups["reward"]).ranks.worker is living, "whoever comes later finds it back"  # type: ignore[attr-defined]
        return address

    monkeypatch.setattr(build, "expose", expose_and_ask)
    config, run = start(
        tmp_path, rows(tmp_path, "notes"), f"{{model: {tiny_model('world')}}}", "expose.port=0", "steps=1"
    )
    build.train_ppo(config, run, None, place=ThisProcess(config.cluster))
    assert seen["over HTTP"] is not None
    assert seen["over HTTP"] == pytest.approx(seen["in the run"], abs=1e-6)
    assert seen["after its death"] == seen["over HTTP"], "the port stays open, and a request waits for the group"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["expose.host=0.0.0.0"], "expose.host: 0.0.0.0 is open to others: set token_file"),
        (["expose.port=5001", "reward={function: exact_match}"], "expose: there is no reward model in this job"),
        (["expose.token_file=absent"], "expose.token_file: absent does not exist"),
    ],
)
def test_what_cannot_be_exposed_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TINY_PPO, overrides, kind="ppo", files=True)
