"""The rollout engines of a run as a fleet: loaded where they were placed, and started again there when they die.

Invariant: a restart ends the old process first, whatever it was doing, and waits neither for its end nor for the new one. There
is a fleet only once every engine has its model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from rlhf_ray.actors.loading import Load, Loading, load_or_fail
from rlhf_ray.actors.ranks import START_TIMEOUT, Ranks
from rlhf_ray.actors.workers.rollout import RanksHandle, RolloutSetup
from rlhf_ray.console import get_logger
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.engine import ROLE
from rlhf_ray.rollout.fleet import Engines, Fleet
from rlhf_ray.rollout.health import HealthPolicy


def load_fleet(engines: Sequence[Ranks], setup: RolloutSetup, timeout_s: float, load_all: Load = load_or_fail) -> Fleet:
    """Load the model into all engines; they generate nothing before the first weight update.

    ``timeout_s`` is how long loading may take, also that of an engine which is started again. ``load_all`` says what becomes of
    an engine that cannot load at first.
    """

    def load(number: int, setup: RolloutSetup) -> Pending[None]:
        loading = engines[number].call("setup", [(setup,)], timeout_s=timeout_s, key=START_TIMEOUT)
        return loading.then(lambda lines: get_logger().info("rollout: %s", lines[0]))

    def loading(number: int) -> Loading:
        # With the same seed: it has drawn nothing yet.
        return Loading(ROLE, partial(load, number, setup), engines[number].restart, nullcontext(), rank=number)

    def restart(number: int, incarnation: int) -> Pending[None]:
        engines[number].restart()
        handles[number].restarted()
        # Another seed, so that it does not repeat the draws of the process that has died.
        return load(number, replace(setup, seed=setup.seed + incarnation))

    policy = HealthPolicy(max_restarts=setup.config.max_restarts, restart_s=timeout_s)

    def lives(number: int) -> Pending[list[object]]:
        return engines[number].call("health", [()], timeout_s=policy.suspect_s)

    handles = [RanksHandle(engine, setup.config) for engine in engines]
    load_all({f"{ROLE} engine {number}": loading(number) for number in range(len(engines))})
    restarts = restart if setup.config.max_restarts else None
    return Fleet(Engines(handles, restart=restarts, lives=lives, policy=policy))
