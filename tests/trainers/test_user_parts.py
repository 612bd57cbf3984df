"""A user's own objective, estimator, reward source and collector: each example in a run, and each mistake refused by name.

What must hold: the parts decide what a run learns; a run that stopped goes on with them; what does not keep the protocol is
refused before anything is started, and what returns a wrong value at its first call.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.algorithms.losses import PolicyOutputs
from rlhf_ray.algorithms.policy_loss import PolicyLoss
from rlhf_ray.algorithms.user_parts import UserObjective
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.config.paths import with_absolute_paths
from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.source import score_or_hold
from rlhf_ray.rewards.user_source import UserRewardSource, make_user_source
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.ppo.algorithm import make_estimator, make_objective
from rlhf_ray.trainers.ppo.build import check_own_parts, train_ppo
from rlhf_ray.trainers.ppo.sampling import Collected, UserCollector
from rlhf_ray.trajectories.batch import TrajectoryBatch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TINY_PPO = ROOT / "tests" / "e2e" / "ppo_tiny.yaml"
ONE_PROCESS = ["policy.ranks=1", "policy.engine.zero=0", "rollout.backend=transformers", "rollout.engines=1",
               "monitoring.ray_metrics=false", "evaluation.prompts=4", "critic=null", "steps=2", "checkpoint.every_steps=1",
               "batch.prompts_per_step=8", "batch.samples_per_prompt=2", "batch.sequences_per_update=16"]  # fmt: skip
GRPO = "algorithm={name: grpo, kl: {coefficient: 0.0}}"


@pytest.fixture(autouse=True)
def single_thread() -> None:
    torch.set_num_threads(1)


def configured(*overrides: str, directory: Path = ROOT, **options: Any) -> Any:
    return load_config(TINY_PPO, [*ONE_PROCESS, GRPO, f"run.root={directory}", *overrides], kind="ppo", **options)


def own(kind: str, code: str, directory: Path, parameters: str = "{}") -> list[str]:
    """Overrides that name the class ``Own`` of ``code`` as the part of this kind."""
    (directory / "own.py").write_text(code)
    name = f"{directory / 'own.py'}:Own"
    if kind == "reward":
        return [f"reward={{source: '{name}', parameters: {parameters}}}"]
    return [f"algorithm.{kind}={name}", f"algorithm.parameters.{kind}={parameters}"]


# The examples


def test_the_four_examples_train_a_policy_and_go_on_after_a_stop(tmp_path: Path) -> None:
    parts = [
        f"algorithm.objective={EXAMPLES / 'own_objective.py'}:Tapered",
        "algorithm.parameters.objective.most=0.5",
        f"algorithm.advantages={EXAMPLES / 'own_advantages.py'}:Ranks",
        "algorithm.parameters.advantages.scale=2.0",
        f"algorithm.collector={EXAMPLES / 'own_collector.py'}:Longest",
        f"reward={{source: {EXAMPLES / 'own_reward_source.py'}:Length, parameters: {{tokens: 6}}}}",
    ]
    config = configured(*parts, directory=tmp_path, files=True)
    run = RunDirectory.create(tmp_path / "tiny", dump_config(config))
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    lines = [line for line in run.metrics.read() if "loss/policy" in line]
    assert len(lines) == 2 and all(-1.0 <= line["reward/learned"] <= 0.0 for line in lines)
    assert all(0.0 < line["advantages/std"] <= 2.0 for line in lines), "ranks of two answers are -2, 0 and 2"
    checks = {check.name: check.value for check in run.summary().checks}
    assert checks["what the reward reads"] == "text"
    used = sum(len(json.loads(line)["prompt_ids"]) for line in (run.path / "ledger.jsonl").read_text().splitlines())
    assert used == 2 * 2 * 8, "the collector takes twice as many prompts as a step learns from"

    run.release()
    again, checkpoint = RunDirectory.resume(run.path, config.checkpoint.keep)
    assert checkpoint is not None
    resumed = load_config(again.path / "config.yaml", ["steps=3"], kind="ppo")
    train_ppo(resumed, again, checkpoint, place=ThisProcess(resumed.cluster))
    assert len([line for line in again.metrics.read() if "loss/policy" in line]) == 3


def test_an_objective_travels_to_a_process_that_never_saw_its_file(tmp_path: Path) -> None:
    objective = UserObjective(f"{EXAMPLES / 'own_objective.py'}:Tapered", {"most": 0.5})
    (tmp_path / "loss.pickle").write_bytes(pickle.dumps(PolicyLoss(objective)))
    program = (
        "import pickle, sys, torch; loss = pickle.load(open(sys.argv[1], 'rb')); one = torch.ones(2);"
        "print(loss.objective(-one, one, torch.tensor([1.0, -1.0]))[0].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "loss.pickle")], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [-1.0, 0.5]


def test_the_example_of_an_estimator_gives_ranks() -> None:
    config = configured(f"algorithm.advantages={EXAMPLES / 'own_advantages.py'}:Ranks")
    estimator = make_estimator(config)
    batch = TrajectoryBatch.from_sequences([[1, 2]] * 5, action_mask=[[False, True]] * 5, prompt_id=[0, 0, 0, 1, 1])
    advantages, returns = estimator(batch, torch.tensor([0.0, 5.0, 0.0, 7.0, 0.0, 5.0, 0.0, 1.0, 0.0, 1.0]))
    assert advantages.tolist() == [0.0, -0.5, 0.0, 1.0, 0.0, -0.5, 0.0, 0.0, 0.0, 0.0] and returns is None


# What check says: the file and the name


@pytest.mark.parametrize("kind", ["objective", "advantages", "collector", "reward"])
def test_check_refuses_a_name_that_leads_nowhere(kind: str, tmp_path: Path) -> None:
    key = "reward.source" if kind == "reward" else f"algorithm.{kind}"

    def problems(name: str) -> str:
        override = f"reward={{source: '{name}'}}" if kind == "reward" else f"{key}={name}"
        with pytest.raises(RequestError) as refused:
            configured(override, directory=tmp_path, files=True)
        return str(refused.value)

    (tmp_path / "own.py").write_text("class Other: ...\n")
    assert f"{key}: {tmp_path}/none.py does not exist: name a Python file" in problems(f"{tmp_path}/none.py:Own")
    assert f"{key}: {tmp_path}/own.py defines no 'Own'; it defines Other" in problems(f"{tmp_path}/own.py:Own")
    assert f"{key}: there is no module not_here.at_all" in problems("not_here.at_all:Own")
    assert f"{key}: 'word' is not one of package.module:name, path.py:name" in problems("word")
    assert "nor an installed entry point of the group rlhf_ray." in problems("word")


def test_check_refuses_parameters_without_a_part_and_settings_without_effect() -> None:
    with pytest.raises(
        RequestError, match=r"algorithm\.parameters\.objective: it is for a part of your own: set algorithm"
    ):
        configured("algorithm.parameters.objective.most=1.0")
    with pytest.raises(RequestError, match=r"reward\.parameters: they are for a reward source of your own"):
        configured("reward.parameters.tokens=1")
    with pytest.raises(RequestError, match=r"dynamic_sampling: 2 has no effect: algorithm.collector decides"):
        configured("algorithm.collector=a.b:C", "algorithm.dynamic_sampling=2")
    with pytest.raises(RequestError, match=r"dual_clip: 3 has no effect on an objective of your own"):
        configured("algorithm.objective=a.b:C", "algorithm.dual_clip=3.0")


# What making says: parameters and protocol

ESTIMATOR = "class Own:\n    needs = {}\n    def __call__(self, batch, token_rewards): ...\n"
COLLECTOR = "class Own:\n    def __init__(self, config, often=1): ...\n"
OBJECTIVE = (
    "class Own:\n    def __init__(self, low: float, high: float = 1.0): ...\n    def __call__(self, a, b, c): {}\n"
)


@pytest.mark.parametrize(
    ("kind", "code", "parameters", "refusal"),
    [
        ("objective", OBJECTIVE, "{low: 1.0, hihg: 2.0}", r"it takes no parameter hihg; it takes low, high"),
        ("objective", OBJECTIVE, "{high: 2.0}", r"it needs the parameter low: add it to the parameters in the config"),
        ("objective", "class Own:\n    pass\n", "{}", r"makes Own .*, which cannot be called with \(log_probs, log_ratio, adv"),
        ("objective", "class Own:\n    def __call__(self, a): ...\n", "{}", r"cannot be called with \(log_probs"),
        ("objective", "class Own:\n    def __init__(self): 1 / 0\n", "{}", r"making it with {} raised ZeroDivisionError"),
        ("objective", "import nothing_like_it\nclass Own: ...\n", "{}", r"cannot be imported \(ModuleNotFoundError"),
        ("objective", "Own = 3\n", "{}", r"has no class Own"),
        ("advantages", "class Own:\n    def __call__(self, a, b): ...\n", "{}", "which is not an estimator: give it"),
        ("advantages", ESTIMATOR.format("'prompt_id'"), "{}", r"its needs are 'prompt_id', not a tuple of names of columns"),
        ("advantages", ESTIMATOR.format("('values',)"), "{}", r"which a critic gives: add a critic section"),
        ("advantages", ESTIMATOR.format("('x',)"), "{}", r"it reads x, but the columns of a batch are action_mask, "),
        ("collector", "class Own:\n    def __init__(self, config, often): ...\n", "{}", r"needs the parameter often"),
        ("collector", COLLECTOR, "{config: 1}", r"it takes no parameter config; it takes often"),
        ("reward", "class Own:\n    def __init__(self, url): ...\n", "{}", r"needs the parameter url"),
    ],
)  # fmt: skip
def test_a_part_that_does_not_keep_its_protocol_is_refused_before_a_run(
    kind: str, code: str, parameters: str, refusal: str, tmp_path: Path
) -> None:
    config = configured(*own(kind, code, tmp_path, parameters))
    key = "reward.source" if kind == "reward" else f"algorithm.{kind}"
    with pytest.raises(RequestError, match=rf"{key} '.*own.py:Own': .*{refusal}"):
        check_own_parts(config)


def test_a_critic_that_an_estimator_does_not_read_is_refused(tmp_path: Path) -> None:
    code = "class Own:\n    needs = ()\n    def __call__(self, batch, token_rewards): ...\n"
    critic = (
        "critic={model: {make: {shape: llama-tiny, tokenizer_from: world}, head_init: zero, dtype: fp32}, "
        "engine: {optimizer: {learning_rate: 1.0e-3}}}"
    )
    with pytest.raises(RequestError, match="does not read the column values, so a critic is of no use"):
        make_estimator(configured(*own("advantages", code, tmp_path), critic))


@pytest.mark.parametrize(
    ("code", "refusal"),
    [("class Own:\n    reads = 'text'\n", "which is not a reward source"),
     ("class Own:\n    def score(self, samples): ...\n", "give it an attribute reads")],
)  # fmt: skip
def test_an_object_that_is_no_source_is_refused(code: str, refusal: str, tmp_path: Path) -> None:
    config = configured(*own("reward", code, tmp_path))
    with pytest.raises(RequestError, match=refusal):
        make_user_source("reward", config.reward, None, ExitStack())


# What the first call says: shape, dtype, finite


@pytest.mark.parametrize(
    ("returned", "refusal"),
    [
        ("None", r"returned NoneType None, not two tensors of shape \(3,\)"),
        (
            "(a[:2], a > 0)",
            r"returned a tensor of float32 with shape \(2,\) and a tensor of bool with shape \(3,\), not two",
        ),
        ("(a, a)", r"and a tensor of float32 with shape \(3,\), not two tensors"),
        ("(a.long(), a > 0)", r"returned a tensor of int64 with shape"),
        ("(a / 0, a > 0)", r"returned NaN or Inf where log_probs, log_ratio and advantages are finite"),
        ("(a * p.detach(), a > 0)", r"what it maximises has no gradient, so nothing would be learned"),
    ],
)
def test_what_an_objective_returns_is_checked(returned: str, refusal: str, tmp_path: Path) -> None:
    code = f"class Own:\n    def __call__(self, p, r, a):\n        return {returned}\n"
    objective = make_objective(configured(*own("objective", code, tmp_path)).algorithm)
    batch = TrajectoryBatch.from_sequences(
        [[1, 2, 3]], action_mask=[[False, True, True]], log_probs=[[0.0, 0.0, 0.0]], advantages=[[0.0, 1.0, 1.0]]
    )
    with pytest.raises(RequestError, match=refusal):
        PolicyLoss(objective)(PolicyOutputs(torch.zeros(3, requires_grad=True)), batch)


def test_an_objective_whose_file_changed_is_loaded_anew_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it has the same size, and changed within the same second: then Python itself keeps what it compiled."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    code = "class Own:\n    def __call__(self, p, r, a):\n        return (FACTOR * p, a > 0)\n"
    gained = []
    for factor in (2.0, 3.0):
        algorithm = configured(*own("objective", code.replace("FACTOR", str(factor)), tmp_path)).algorithm
        os.utime(tmp_path / "own.py", (1e9, 1e9))
        gained.append(make_objective(algorithm)(torch.ones(1), torch.ones(1), torch.ones(1))[0].item())
    assert gained == [2.0, 3.0]


def test_later_an_objective_may_return_nan_which_skips_the_update(tmp_path: Path) -> None:
    code = "class Own:\n    def __call__(self, p, r, a):\n        return (a / a.sum(), a > 0)\n"
    objective = make_objective(configured(*own("objective", code, tmp_path)).algorithm)
    objective(torch.ones(2), torch.ones(2), torch.ones(2))
    assert objective(torch.ones(2), torch.ones(2), torch.zeros(2))[0].isnan().all()


BATCH = TrajectoryBatch.from_sequences([[1, 2]], action_mask=[[False, True]])


@pytest.mark.parametrize(
    ("returned", "refusal"),
    [
        ("rewards", r"returned a tensor of float32 with shape \(2,\), not a pair: advantages \(2,\)"),
        ("(rewards[:1], None)", r"its advantages are a tensor of float32 with shape \(1,\)"),
        ("(rewards.long(), None)", r"its advantages are a tensor of int64"),
        ("(rewards, 3)", r"its returns are int 3, not a float tensor"),
        ("(rewards / 0, None)", r"returned NaN or Inf at an action"),
    ],
)
def test_what_an_estimator_returns_is_checked(returned: str, refusal: str, tmp_path: Path) -> None:
    code = f"class Own:\n    needs = ()\n    def __call__(self, batch, rewards):\n        return {returned}\n"
    estimator = make_estimator(configured(*own("advantages", code, tmp_path)))
    with pytest.raises(RequestError, match=refusal):
        estimator(BATCH, torch.tensor([0.0, 1.0]))


def test_what_an_estimator_gives_to_other_tokens_is_set_to_zero(tmp_path: Path) -> None:
    code = "class Own:\n    needs = ()\n    def __call__(self, batch, rewards):\n        return rewards / 0, None\n"
    estimator = make_estimator(configured(*own("advantages", code, tmp_path)))
    estimator.called = True
    assert estimator(BATCH, torch.tensor([0.0, 1.0]))[0].tolist() == [0.0, math.inf]


class Source:
    reads = "nothing"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def score(self, samples: Sequence[Any]) -> Any:
        return self.answer() if callable(self.answer) else self.answer


@pytest.mark.parametrize(
    ("answer", "error", "refusal"),
    [
        ([ScoreResult.of(1.0)], RequestError, "score returned list, not Pending: return Pending.done"),
        (Pending.done([]), RequestError, "it gave list of 0 for 1 samples, not a list of 1"),
        (Pending.done([1.0]), RequestError, "1.0 is not a ScoreResult: return ScoreResult.of"),
        (lambda: 1 / 0, ScoringError, r"reward.source 'a:b' raised ZeroDivisionError"),
        (Pending(lambda: 1 / 0), ScoringError, r"reward.source 'a:b' raised ZeroDivisionError"),
        (lambda: sys.exit(3), ScoringError, r"reward.source 'a:b' raised SystemExit"),
        (Pending(lambda: sys.exit(3)), ScoringError, r"reward.source 'a:b' raised SystemExit"),
    ],
)
def test_what_a_source_answers_is_checked(answer: Any, error: type[Exception], refusal: str) -> None:
    with pytest.raises(error, match=refusal):
        UserRewardSource("reward", "a:b", Source(answer)).score([SimpleNamespace()]).result()  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ConnectionError("refused"), "source"),
        (KeyError("x"), "model"),
        (SystemExit(1), "model"),
        (RequestError("refuses the request: 404"), "model"),
        (ScoringError("later"), "source"),
        (ScoringError("never", may_pass=False), "model"),
    ],
    ids=repr,
)
def test_a_source_that_raises_is_asked_again_only_where_that_may_help(error: BaseException, fault: str) -> None:
    def fail() -> list[ScoreResult]:
        raise error

    for answer in (fail, Pending(fail)):
        source = UserRewardSource("reward", "a:b", Source(answer))
        (result,) = score_or_hold(source, [SimpleNamespace()], hold_s=0.0)  # type: ignore[list-item]
        assert result.fault == fault


# What a collector collects


def prompt(number: int) -> Any:
    return SimpleNamespace(prompt_id=number)


def samples(*prompts: int, version: int = 0, **columns: Any) -> TrajectoryBatch:
    count = len(prompts)
    return TrajectoryBatch.from_sequences(
        [[1, 2]] * count, action_mask=[[False, True]] * count, weight_version=[[-1, version]] * count,
        rollout_log_probs=[[0.0, 0.0]] * count, prompt_id=list(prompts), sample_index=list(range(count)),
        finish_reason=[0] * count, **columns,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("taken", "collected", "refusal"),
    [
        ([0], None, "collect returned NoneType, not Collected"),
        ([0, 1], Collected([prompt(0)], samples(0)), "took 2 prompts from the stream, but names 1 or others"),
        ([0], Collected([prompt(0)], samples(0, 5)), "a sample answers prompt 5, which is not among Collected.prompts"),
        (range(9), Collected([*map(prompt, range(9))], samples(*range(9))), "9 prompts, more than batch.prompts_per_step 8"),
        ([0], Collected([prompt(0)], samples(0).without("finish_reason")), "the batch lacks 'finish_reason'"),
        ([0], Collected([prompt(0)], samples()), "must be a TrajectoryBatch with one sequence or more"),
        ([0], Collected([prompt(0)], samples(0).with_columns(action_mask=[[False, False]])), "no token of its samples is an"),
        ([0], Collected([prompt(0)], samples(0, version=-1)), "an action has weight_version -1, which says that no weights"),
    ],
)  # fmt: skip
def test_what_a_collector_collects_is_checked(taken: Any, collected: Any, refusal: str) -> None:
    prompts = SimpleNamespace(taken=[])

    class Own:
        def collect(self, step: int, version: int, phase: Any) -> Any:
            prompts.taken += [prompt(number) for number in taken]
            return collected

    collector = UserCollector(configured("algorithm.collector=a.b:Own"), Own(), prompts)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=rf"algorithm.collector 'a.b:Own': .*{refusal}"):
        collector.collect(0, 0, lambda name: nullcontext())


def test_a_run_keeps_absolute_paths_of_code_and_leaves_parameters_alone(tmp_path: Path) -> None:
    config = configured(
        "algorithm.objective=mine/own.py:Own", "algorithm.parameters.objective={path: here, objective: a.py:b}",
        "algorithm.advantages=package.module:Own", "reward={source: own.py:Own}", "evaluation.gold=judge.py:gold",
    )  # fmt: skip
    kept = with_absolute_paths(config, tmp_path)
    assert kept.algorithm.objective == f"{tmp_path}/mine/own.py:Own"
    assert kept.algorithm.parameters.objective == {"path": "here", "objective": "a.py:b"}
    assert kept.algorithm.advantages == "package.module:Own"
    assert kept.reward.source == f"{tmp_path}/own.py:Own" and kept.evaluation.gold == f"{tmp_path}/judge.py:gold"
