"""Roles that take turns on the same GPUs: calls in the order of their phases, with real engines of DeepSpeed on CPU."""

from __future__ import annotations

import ast
import inspect
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.actors import engines, groups, publisher, turns
from rlhf_ray.actors.place import RankSpec
from rlhf_ray.actors.ranks import InProcessRanks, Ranks
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.actors.turns import NEEDS, SETUP, SharedPlace, TurnRanks, Turns
from rlhf_ray.actors.workers import rollout
from rlhf_ray.actors.workers.model import ModelWorker
from rlhf_ray.actors.workers.registry import WORKERS
from rlhf_ray.actors.workers.rollout import RanksHandle, RolloutWorker
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.errors import DeadlineError, DeadRankError, GroupError, ResumableStop
from rlhf_ray.launch.driver import continue_run, train_new_run
from rlhf_ray.pending import Pending
from rlhf_ray.planning.colocation.phases import Kind, Level
from rlhf_ray.rollout.fleet import Engines, Fleet
from rlhf_ray.rollout.requests import make_requests
from rlhf_ray.rollout.wire import PublishedWeights
from rlhf_ray.trainers import session, stopping
from tests.trainers.small_runs import signals_as_before

TINY = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
SMALL = [
    "policy.ranks=1", "policy.engine.zero=2", "critic.engine.zero=1", "rollout.backend=transformers", "steps=2",
    "rollout.max_new_tokens=4", "data.world={prompts: 16, evaluation_prompts: 2}", "evaluation={prompts: 2}",
    "batch={prompts_per_step: 4, samples_per_prompt: 1, sequences_per_update: 4, max_tokens_per_micro_batch: 512}",
    "algorithm.kl.coefficient=0.1", "checkpoint.every_steps=1", "run.deterministic=true", "monitoring.ray_metrics=false",
    "rollout.engines=2",
]  # fmt: skip


class OnTheSame(SharedPlace):
    """This process as a place where all ranks take turns, although it has no GPU."""

    def __init__(self, config: Any) -> None:
        self.inside = ThisProcess(config)
        super().__init__(self.inside, 0.2)

    def start(self, spec: RankSpec) -> Ranks:
        return self.take_turns(spec, self.inside.start(spec))


class Witness:
    """Sees what each worker was told to have on the device, and each call that finds something else there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.levels: dict[str, int] = {}
        self.calls: list[str] = []
        true_call = InProcessRanks.call

        def call(ranks: InProcessRanks, method: str, arguments: Any, **options: Any) -> Pending[list[Any]]:
            name = f"rollout/{ranks.worker.rank}" if ranks.role == "rollout" else ranks.role
            if method == "go_to":
                self.levels[name] = arguments[0][0]
            elif method == "setup":
                self.levels[name] = 2
            self.calls.append(f"{ranks.role}.{method}")
            self.look(name, method)
            return true_call(ranks, method, arguments, **options)

        monkeypatch.setattr(InProcessRanks, "call", call)

    def look(self, name: str, method: str) -> None:
        """What must hold at this call; written without the table that the order is made from."""
        models = {who: level for who, level in self.levels.items() if not who.startswith("rollout")}
        asleep = {level for who, level in self.levels.items() if who.startswith("rollout")}
        if method in ("accumulate", "apply", "save", "begin_save", "load", "save_pretrained"):
            assert self.levels[name] == 2 and asleep <= {0}, (name, method, self.levels)
            assert {models.get("reference", 0), models.get("reward", 0)} == {0}, (name, method, self.levels)
        elif method in ("log_probs", "values", "scores", "score"):
            assert self.levels[name] == 2 and asleep <= {0}, (name, method, self.levels)
        elif method == "publish_weights":
            assert models == {"policy": 1, "critic": 0, "reference": 0, "reward": 0}, (name, method, self.levels)
            assert asleep == {1}, (name, method, self.levels)
        elif method == "receive":
            assert self.levels[name] >= 1, (name, method, self.levels)
        elif method == "generate":
            assert self.levels[name] == 2 and set(models.values()) == {0}, (name, method, self.levels)


def config_in(root: Path) -> Any:
    return load_config(str(TINY), [f"run.root={root}", "run.name=turns", *SMALL])


def weights_in(root: Path) -> dict[str, torch.Tensor]:
    final = root / "turns" / "final"
    critic = {f"critic.{name}": weight for name, weight in load_file(final / "critic/model.safetensors").items()}
    return load_file(final / "model.safetensors") | critic


@pytest.fixture
def as_before() -> Iterator[None]:
    with signals_as_before():
        yield


@pytest.mark.usefixtures("as_before")
def test_a_run_in_which_all_roles_take_turns_learns_the_same_bits_and_no_call_finds_its_model_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart, together = config_in(tmp_path / "apart"), config_in(tmp_path / "together")
    train_new_run(dump_config(apart), place=ThisProcess(apart.cluster))
    witness = Witness(monkeypatch)
    with monkeypatch.context() as stopped:  # after the first step, to be resumed
        stopped.setattr(stopping._stop, "is_set", lambda: witness.calls.count("policy.begin_save") == 1)
        with pytest.raises(ResumableStop, match="after step 1 of 2"):
            train_new_run(dump_config(together), place=OnTheSame(together.cluster))
    witness.levels.clear()
    continue_run(str(tmp_path / "together" / "turns"), place=OnTheSame(together.cluster))
    expected, found = weights_in(tmp_path / "apart"), weights_in(tmp_path / "together")
    assert {name for name, weight in expected.items() if not torch.equal(weight, found[name])} == set()
    assert expected.keys() == found.keys()
    for call in (
        "policy.publish_weights",
        "rollout.generate",
        "critic.apply",
        "reward.score",
        "policy.begin_save",
        "critic.load",
    ):
        assert call in witness.calls, "the run does all that takes turns"


def called_methods(module: Any) -> set[str]:
    """The names of methods of ranks that a module calls: constants that are the first argument of a call of ranks."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            name, first = node.func.attr, node.args[0]
            if name in ("call", "_everywhere", "_column", "_sample") and isinstance(first, ast.Constant):
                found.add(str(first.value))
    return found


def test_it_is_known_of_every_call_in_which_phases_it_may_run() -> None:
    """A call of another name would be a KeyError in the middle of a run."""
    called = set().union(*(called_methods(module) for module in (groups, engines, publisher, rollout, session)))
    of_training = {"save_adapter", "scores_on_disk", "compute_shape", "matmul_rate"}  # of a reward model that learns
    assert called - of_training == {*NEEDS, SETUP}, (
        "name it in NEEDS of actors/turns.py, with the phases that it may run in"
    )
    workers = {name: WORKERS[name] for name in WORKERS if name not in ("vllm_reward", "trained_reward")}
    assert [name for name, worker in workers.items() if not hasattr(worker, "go_to")] == []


class Slow:
    """Ranks of which a test decides when and how a call ends."""

    def __init__(self, role: str, log: list[str]) -> None:
        self.role, self.size, self.log = role, 1, log
        self.open: list[threading.Event] = []
        self.errors: dict[str, Exception] = {}
        self.holds = False

    def call(self, method: str, arguments: Any, **_: Any) -> Pending[list[Any]]:
        self.log.append(
            f"{self.role} {method}{''.join(f' {Level(*one).name}' for one in arguments if method == 'go_to')}"
        )
        error = self.errors.pop(method, None)
        ended = threading.Event()
        if not self.holds or method == "go_to":
            ended.set()
        self.open.append(ended)

        def wait() -> list[Any]:
            ended.wait()
            if error is not None:
                raise error
            return [None]

        return Pending(wait, ended.wait)

    def restart(self) -> None:
        self.log.append(f"{self.role} restart")

    def end(self) -> None:
        self.log.append(f"{self.role} end")

    stop = end


class Always(dict[str, Exception]):
    """Errors that do not pass."""

    def pop(self, key: str, default: Any = None) -> Any:
        return self.get(key, default)


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def shared(log: list[str]) -> tuple[Turns, dict[str, TurnRanks], dict[str, Slow]]:
    """A policy and two engines, loaded."""
    taking = Turns(timeout_s=5.0)
    inside = {"policy": Slow("policy", log), "rollout/0": Slow("zero", log), "rollout/1": Slow("one", log)}
    outside = {
        name: taking.share(name, Kind.POLICY if name == "policy" else Kind.ENGINE, ranks)  # type: ignore[arg-type]
        for name, ranks in inside.items()
    }
    for ranks in outside.values():
        ranks.call("setup", [()]).result()
    log.clear()
    return taking, outside, inside


def test_no_phase_is_left_while_a_call_that_needs_it_is_under_way(shared: Any, log: list[str]) -> None:
    _, outside, inside = shared
    inside["rollout/0"].holds = True
    outside["rollout/0"].call("generate", [()])
    outside["policy"].call("health", [()])
    learning = threading.Thread(target=lambda: outside["policy"].call("accumulate", [()]))
    learning.start()
    learning.join(0.3)
    assert log == ["zero generate", "policy health"], "a health check waits for nothing, and learning waits"
    inside["rollout/0"].open[-1].set()
    learning.join(5)
    assert log[2:] == ["zero go_to AWAY", "one go_to AWAY", "policy go_to ALL", "policy accumulate"]


def test_a_call_that_never_ends_is_an_error_which_names_the_key(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taking, outside, inside = shared
    monkeypatch.setattr(taking, "_timeout_s", 0.2)
    inside["rollout/0"].holds = True
    outside["rollout/0"].call("generate", [()])
    with pytest.raises(DeadlineError, match=r"in use for generate after 0\.2 s \(cluster\.call_timeout_s\)"):
        outside["policy"].call("accumulate", [()])


def test_an_engine_that_does_not_go_is_ended_and_comes_back_only_when_there_is_room(
    shared: Any, log: list[str]
) -> None:
    _, outside, inside = shared
    inside["rollout/1"].errors["go_to"] = GroupError("rollout", 1, "go_to", "out of memory")
    outside["policy"].call("accumulate", [()]).result()
    assert log == ["zero go_to AWAY", "one go_to AWAY", "one end", "policy go_to ALL", "policy accumulate"]
    log.clear()
    outside["rollout/1"].restart()
    outside["rollout/1"].call("setup", [()]).result()
    assert log == ["policy go_to AWAY", "zero go_to ALL", "one restart", "one setup"]
    outside["rollout/1"].call("receive", [()])
    assert log[4:] == ["one receive"], "it takes weights while others generate"


def test_a_role_that_trains_and_does_not_come_is_an_error_and_the_next_call_asks_again(
    shared: Any, log: list[str]
) -> None:
    _, outside, inside = shared
    inside["policy"].errors["go_to"] = GroupError("policy", 0, "go_to", "out of memory")
    with pytest.raises(GroupError, match="out of memory"):
        outside["policy"].call("save", [()])
    assert "policy save" not in log
    log.clear()
    outside["policy"].call("save", [()]).result()
    assert log == ["policy go_to ALL", "policy save"]


@pytest.mark.parametrize("what", ["generate", "receive", "restart"])
def test_no_engine_is_blamed_for_a_role_that_does_not_make_room_for_it(shared: Any, log: list[str], what: str) -> None:
    """An engine that fails is restarted; this failure would meet the new process too, and is the policy's."""
    _, outside, inside = shared
    names = ("rollout/0", "rollout/1")
    engines = Engines(
        [RanksHandle(outside[name], RolloutConfig()) for name in names],
        restart=lambda number, incarnation: Pending.done(outside[names[number]].restart()),
    )
    outside["policy"].call("accumulate", [()]).result()
    if what == "restart":
        engines.health.died(0, "it was killed", 0)
    failure = DeadRankError("policy", 1, "go_to", "its process died")
    inside["policy"].errors["go_to"] = failure
    log.clear()
    with pytest.raises(GroupError) as caught:
        if what == "restart":
            engines.heal()
        elif what == "generate":
            engines.start(0, lambda handle: handle.generate([], 1.0))
        else:
            engines.start(0, lambda handle: handle.receive(PublishedWeights(1, [], "")))
    assert caught.value is failure
    assert not engines.health.has_died(1, 0) and log[-1] == "policy go_to AWAY", (
        "nothing was asked of an engine behind it"
    )


def test_a_run_whose_policy_does_not_make_room_ends_by_the_error_of_the_policy(shared: Any) -> None:
    """Then no commit is tried of a group, one of whose ranks has died."""
    _, outside, inside = shared
    fleet = Fleet(Engines([RanksHandle(outside[name], RolloutConfig()) for name in ("rollout/0", "rollout/1")]))
    fleet.health.publish(1)
    for engine in range(2):
        fleet.health.updated(engine, 1, 0)
    outside["policy"].call("accumulate", [()]).result()
    inside["policy"].errors = Always(go_to=DeadRankError("policy", 1, "go_to", "its process died"))
    with pytest.raises(GroupError) as caught:
        fleet.generate(make_requests([(0, [1])], samples_per_prompt=1, max_new_tokens=1, run_seed=0), 1.0)
    assert caught.value.role == "policy", caught.value
    assert fleet.health.healthy == (0, 1)


def test_a_worker_that_was_ended_answers_no_call_until_it_is_started_again() -> None:
    ranks = InProcessRanks("rollout", RolloutWorker())
    ranks.end()
    with pytest.raises(DeadRankError, match="it was ended"):
        ranks.call("health", [()])
    ranks.restart()
    assert ranks.call("health", [()]).result()[0]["role"] == "rollout"
    assert not issubclass(RolloutWorker, ModelWorker) and turns.KINDS["rollout"] is Kind.ENGINE
