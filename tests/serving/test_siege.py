"""Whatever one caller does, another gets its scores: the short form of the siege, over a model that takes no time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from io import StringIO

import psutil
import pytest

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.run import RunConfig
from rlhf_ray.console import get_logger
from rlhf_ray.serving.server import WebServer

from . import siege
from .attacks import commands
from .services import Lengths, service

ATTACKER, VICTIM = "the-token-of-the-attacker", "the-token-of-the-victim"
SECONDS = 0.6


@pytest.fixture(scope="module")
def target() -> Iterator[siege.Target]:
    """A service of this process, whose score of a text is its length."""
    role = ScoringRole(model=ModelConfig(path="none"))
    config = ServeConfig(kind="serve", run=RunConfig(name="siege"), reward=role)
    server, log = WebServer("127.0.0.1", 0), StringIO()
    handler = logging.StreamHandler(log)
    get_logger().addHandler(handler)
    app = service(config, Lengths(), keys=lambda: {ATTACKER: "attacker", VICTIM: "victim"})
    server.start(app, give_up=app.state.give_up)
    logging.getLogger("uvicorn.error").addHandler(handler)
    yield siege.Target(server.address, psutil.Process(), log.getvalue, ATTACKER, VICTIM, lambda text: float(len(text)))
    server.stop()
    get_logger().removeHandler(handler)
    logging.getLogger("uvicorn.error").removeHandler(handler)


@pytest.mark.parametrize("name", ["ones", "wide"])
def test_another_caller_gets_its_scores_in_time(target: siege.Target, name: str) -> None:
    command = dict(commands(*target.place, target.attacker, SECONDS))[name]
    siege.attacked(target, name, command, SECONDS).require()


def test_no_score_is_swapped_and_nothing_is_left_behind(target: siege.Target) -> None:
    siege.scores(target, 200).require()
    siege.afterwards(target, target.memory_mb()).require()


@pytest.mark.parametrize("wrong", [lambda text: len(text) + 1.0, lambda text: float(len(text) % 7)])
def test_a_siege_finds_a_wrong_score(target: siege.Target, wrong: Callable[[str], float]) -> None:
    mistaken = siege.Target(target.address, target.process, target.log, ATTACKER, VICTIM, wrong)
    assert siege.scores(mistaken, 4).broken == ["no score is wrong or somebody else's"]


def test_a_siege_finds_memory_that_grows_with_every_round() -> None:
    assert not siege.growth([120.0, 125.0]).broken
    assert siege.growth([120.0, 240.0]).broken == ["rounds add less than 50 MB"]
