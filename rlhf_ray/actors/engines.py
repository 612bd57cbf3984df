"""The rollout engines of a job as a fleet: loaded where they were placed, and started again there when they die.

Invariant: a restart ends the old process first, whatever it was doing, and waits neither for its end nor for the new one. There
is a fleet only once every engine has its model. Engines whose weights never change have them from the directory of the model,
also after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from rlhf_ray.actors.loading import Load, Loading, load_or_fail
from rlhf_ray.actors.place import Place, RankSpec
from rlhf_ray.actors.ranks import START_TIMEOUT, Ranks
from rlhf_ray.actors.workers.rollout import RanksHandle, RolloutSetup
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.console import get_logger
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.engine import ROLE
from rlhf_ray.rollout.execution import Execution
from rlhf_ray.rollout.fleet import Engines, Fleet
from rlhf_ray.rollout.health import HealthPolicy
from rlhf_ray.rollout.wire import PublishedWeights


def place_engines(place: Place, config: RolloutConfig) -> list[Ranks]:
    """Place all engines; their processes import what they need while other models load."""
    engines = [
        place.start(RankSpec("rollout", 1, config.resources, number, placement=config.placement))
        for number in range(config.engines)
    ]
    for engine in engines:
        engine.call("warm_up", [(config.backend,)])
    return engines


class LoadedHandle(RanksHandle):
    """The way to an engine that has its weights from the directory of its model, which no publication replaces."""

    def receive(self, weights: PublishedWeights) -> Pending[Execution | None]:
        return self.execution()


def load_fixed_fleet(engines: Sequence[Ranks], setup: RolloutSetup, timeout_s: float) -> Fleet:
    """Load the model of ``setup.model_dir``, weights and all, into all engines, which serve it from then on."""
    fleet = load_fleet(engines, setup, timeout_s, handle=LoadedHandle)
    fleet.update_weights(setup.weight_version, PublishedWeights(setup.weight_version, (), ""))
    return fleet


def load_fleet(
    engines: Sequence[Ranks],
    setup: RolloutSetup,
    timeout_s: float,
    load_all: Load = load_or_fail,
    *,
    handle: type[RanksHandle] = RanksHandle,
) -> Fleet:
    """Load the model into all engines; they generate nothing before the first weight update.

    ``timeout_s`` is how long loading may take, also that of an engine which is started again. ``load_all`` says what becomes of
    an engine that cannot load at first. ``handle`` is how an engine is reached.
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

    handles = [handle(engine, setup.config) for engine in engines]
    load_all({f"{ROLE} engine {number}": loading(number) for number in range(len(engines))})
    restarts = restart if setup.config.max_restarts else None
    return Fleet(Engines(handles, restart=restarts, lives=lives, policy=policy))
