"""The gateway on a real Ray: a reward group that is killed comes back while requests wait and no reward is lost or wrong; a
job of the cluster scores by the service's name; a new version takes over without a dropped request; files are scored.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.errors import EXIT_WRONG_REQUEST, RequestError
from rlhf_ray.rewards import ScoreRequest
from rlhf_ray.serving.cluster_client import ServedScorer, find_service

from ..faults.serving import ASKERS, LIMIT_S, ask, campaign, gateway, reward_processes
from ..serving.reward_models import MEAN, STD, Reference, save_reward_model

TEXTS = [f"number {number}" for number in range(200)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("models")
    return save_reward_model(directory / "old"), save_reward_model(directory / "new", seed=1)


@pytest.fixture(scope="module")
def address(models: tuple[Path, Path]) -> Iterator[str]:
    """A service on a Ray of its own; this process is a job of that cluster."""
    with gateway(models[0], "gateway-test") as address:
        yield address


def reward(address: str, text: str) -> float:
    """As OpenRLHF's client gets it."""
    score = ask(address, text)
    assert score is not None
    return score


def test_a_killed_group_comes_back_and_no_reward_is_lost_or_wrong(address: str, models: tuple[Path, Path]) -> None:
    before = reward_processes()
    finding = campaign(address, models[0], restarts=1)
    assert (finding.kills, finding.lost, finding.wrong) == (1, [], [])
    assert finding.asked >= 2 * ASKERS
    assert 'rlhf_scoring_restarts_total{model="reward"} 1.0' in httpx.get(f"{address}/metrics").text
    assert len(reward_processes()) == len(before) == 1 and reward_processes() != before


def test_a_job_of_the_cluster_scores_by_name(address: str, models: tuple[Path, Path]) -> None:
    reference = Reference(models[0])
    scorer = ServedScorer("gateway-test")
    results = scorer.score([ScoreRequest(text=text) for text in TEXTS[:3]]).result()
    assert [result.raw for result in results] == [
        pytest.approx(reference.of_text(text), abs=1e-5) for text in TEXTS[:3]
    ]
    assert scorer.describe()["model"] == str(models[0])
    with pytest.raises(RequestError, match="no such model is served here"):
        ServedScorer("gateway-test", "absent").score([ScoreRequest(text="a")]).result()
    with pytest.raises(RequestError, match="no service named absent runs on this cluster"):
        ServedScorer("absent")


def test_a_file_is_scored_as_by_the_service_and_once(
    address: str,
    models: tuple[Path, Path],
    in_this_process: None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    reference = Reference(models[0])
    source, target = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    source.write_text("".join(f"{json.dumps({'text': text, 'mine': i})}\n" for i, text in enumerate(TEXTS)))
    command = [
        "score",
        str(models[0]),
        "--input",
        str(source),
        "--output",
        str(target),
        "reward.resources.cpus_per_rank=0.2",
    ]
    assert main(command) == 0
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["mine"] for line in lines] == list(range(len(TEXTS)))
    expected = [pytest.approx(reference.of_text(text), rel=0, abs=1e-5) for text in TEXTS]
    assert [line["score"]["raw"] for line in lines] == expected
    assert lines[0]["score"]["reward"] == pytest.approx((lines[0]["score"]["raw"] - MEAN) / STD)
    assert main(command) == EXIT_WRONG_REQUEST
    assert "exists and is finished" in capfd.readouterr().err


def test_a_new_version_takes_over_without_a_dropped_request(address: str, models: tuple[Path, Path]) -> None:
    old, new = (Reference(path) for path in models)
    rewards: list[float] = []
    over = threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            rewards.append(reward(address, TEXTS[0]))

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking) for _ in range(2)]
        version = find_service("gateway-test", timeout_s=LIMIT_S).call("reload", [(str(models[1]), "reward")]).result()
        over.set()
        for one in asking:
            one.result(timeout=LIMIT_S)
    assert version == ["2"]
    expected = [old.of_text(TEXTS[0]), new.of_text(TEXTS[0])]
    assert abs(expected[0] - expected[1]) > 1e-3
    assert all(min(abs(reward_seen - one) for one in expected) < 1e-5 for reward_seen in rewards)
    assert reward(address, TEXTS[0]) == pytest.approx(expected[1], abs=1e-5)
    deadline = time.monotonic() + LIMIT_S
    while len(reward_processes()) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(reward_processes()) == 1, "the old version is gone"
