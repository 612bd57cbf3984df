"""A run's reward models answer at a port while the run goes on scoring with them; the port closes with the run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.model import WorkerSetup
from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.config.sections.service import ServiceConfig
from rlhf_ray.errors import DeadlineError, DeadRankError, RequestError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.expose_run import bring_back, expose

from .reward_models import Reference


@pytest.fixture(scope="module")
def group(model: Path) -> RewardGroup:
    from rlhf_ray.config.sections.models import ModelConfig

    group = RewardGroup(InProcessRanks("reward", RewardWorker()))
    role = RoleConfig(model=ModelConfig(path=str(model), dtype="fp32"))
    group.setup(RewardSetup(role, seed=0, max_tokens=256, max_item_tokens=200), timeout_s=60.0).result()
    return group


def test_others_get_scores_while_the_run_goes_on_with_its_own(
    group: RewardGroup, model: Path, config: Callable[..., ServeConfig]
) -> None:
    reference, role = Reference(model), config(str(model)).reward
    mine, theirs = [f"mine {i}" for i in range(40)], [f"theirs {i}" for i in range(40)]
    with ExitStack() as run, ThreadPoolExecutor(4) as pool:
        address = expose({"reward.mixture.taste": group}, {"reward.mixture.taste": role}, ServiceConfig(port=0), run)
        body = {"model": "taste", "add_special_tokens": False}
        pending = [pool.submit(httpx.post, f"{address}/classify", json={**body, "input": text}) for text in theirs]
        own = [group.score([ScoreRequest(text=text)]).result()[0].raw for text in mine]
        answers = [one.result().json()["data"][0]["probs"][0] for one in pending]
    assert own == [pytest.approx(reference.of_text(text), rel=0, abs=1e-5) for text in mine]
    assert answers == [pytest.approx(reference.of_text(text), rel=0, abs=1e-5) for text in theirs]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


def test_another_address_needs_a_token(group: RewardGroup, model: Path, config: Callable[..., ServeConfig]) -> None:
    role = config(str(model)).reward
    with ExitStack() as run, pytest.raises(RequestError, match="give token_file"):
        expose({"reward": group}, {"reward": role}, ServiceConfig(port=0, host="0.0.0.0"), run)


class StandIns:
    """Ranks that say what they are doing, and have no time for anything else."""

    role, size = "reward", 1

    def __init__(self, phase: str | None) -> None:
        self.phase, self.restarted = phase, 0

    def call(self, method: str, arguments: Any, **options: Any) -> Pending[list[Any]]:
        if method == "setup":
            return Pending.done([""])
        if self.phase is None:
            raise DeadRankError("reward", 0, method, "died")
        if method != "health":
            raise DeadlineError("reward", 0, method, "no answer within 10 s")
        return Pending.done([{"phase": self.phase}])

    def restart(self) -> None:
        self.restarted += 1


@pytest.mark.parametrize(("phase", "restarts"), [("scores", 0), ("ready", 0), ("starting", 1), (None, 1)])
def test_what_fails_for_a_caller_ends_no_group_that_lives_however_busy_the_run_keeps_it(
    phase: str | None, restarts: int
) -> None:
    ranks = StandIns(phase)
    group = RewardGroup(ranks)
    group.setup(WorkerSetup(RoleConfig.model_construct(), seed=0), timeout_s=1.0).result()
    assert bring_back(group) is group and ranks.restarted == restarts
