"""Rewards, KL, advantages, policy and value losses against OpenRLHF, TRL, torchtune and verl, from the same numbers.

They work on right-padded (answers, tokens) matrices, this project on flat batches: results are laid out as theirs. Where an
oracle has a quirk, the inputs stay clear of it, and the docstring of the oracle says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.algorithms.advantages import gae, reward_to_go
from rlhf_ray.algorithms.denominators import denominator
from rlhf_ray.algorithms.group_baselines import group_baseline
from rlhf_ray.algorithms.importance import ImportanceCorrection
from rlhf_ray.algorithms.kl import AdaptiveKl, FixedKl, kl_loss, token_kl
from rlhf_ray.algorithms.losses import LossOutput, PolicyOutputs, ValueLoss
from rlhf_ray.algorithms.masked import masked_mean, whiten
from rlhf_ray.algorithms.policy_loss import Cispo, Clipped, Dppo, KlTerm, PolicyLoss
from rlhf_ray.algorithms.shaping import MissingEos, Overlong, TooShort
from rlhf_ray.algorithms.token_rewards import make_token_rewards
from rlhf_ray.trajectories.batch import FinishReason, TrajectoryBatch

LENGTHS = [10, 3, 7, 1, 9, 10, 4, 6]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]
FINISHED = [False, True, True, True, True, False, True, False]
LONGEST, PROMPT = max(LENGTHS), 2
PER_TOKEN = (
    "log_probs", "old_log_probs", "rollout_log_probs", "reference_log_probs", "values", "old_values", "returns", "advantages",
    "token_rewards",
)  # fmt: skip
GAMMA, LAM, BETA = 0.97, 0.9, 0.1
KLS = [0.5, 4.0, 6.5, 6.0, 9.0]
"""Mean sequence KL of steps, for the controllers."""

Values = dict[str, np.ndarray]


def make_inputs(seed: int = 31) -> dict[str, Any]:
    """Log-probs that lie apart enough to be clipped now and then; 0 at padding, as a trainer has it."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), LONGEST)
    mask = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
    numbers = {name: torch.randn(shape, generator=generator) for name in PER_TOKEN}
    old = -numbers["old_log_probs"].abs() - 0.2
    for name in ("log_probs", "rollout_log_probs", "reference_log_probs"):
        numbers[name] = old + 0.3 * numbers[name]
    numbers["old_log_probs"] = old
    numbers["values"] = numbers["old_values"] + 0.4 * numbers["values"]
    padded = {name: torch.where(mask, column, 0.0).numpy() for name, column in numbers.items()}
    scores = (2 * torch.randn(len(LENGTHS), generator=generator)).numpy()
    facts = {"seed": seed, "lengths": LENGTHS, "groups": GROUPS, "finished": FINISHED}
    return {**facts, "scores": scores, **padded}


def prepare(inputs: Mapping[str, Any], directory: Path) -> None:
    """What the oracles read."""
    np.savez(directory / "inputs.npz", **{name: value for name, value in inputs.items() if name != "seed"})


class Ours:
    """The inputs as a flat batch, and back."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.lengths = inputs["lengths"]
        self.scores = torch.from_numpy(inputs["scores"])
        self.groups = torch.tensor(inputs["groups"])
        self.every = torch.ones(len(self.lengths), dtype=torch.bool)
        reasons = [FinishReason.STOP if done else FinishReason.LENGTH for done in inputs["finished"]]
        self.batch = TrajectoryBatch.from_sequences(
            [[1] * (PROMPT + length) for length in self.lengths],
            action_mask=[[False] * PROMPT + [True] * length for length in self.lengths],
            finish_reason=reasons,
        )
        self.mask, self.offsets = self.batch["action_mask"], self.batch.offsets
        self.column = {name: self.flat(inputs[name]) for name in PER_TOKEN}
        self.batch = self.batch.with_columns(
            log_probs=self.column["old_log_probs"],
            values=self.column["old_values"],
            **{name: self.column[name] for name in ("reference_log_probs", "returns", "advantages")},
        )

    def flat(self, padded: np.ndarray) -> Tensor:
        """A per-token column; NaN where no action is."""
        column = torch.full((self.batch.num_tokens,), float("nan"))
        rows = [torch.from_numpy(row[:length]) for row, length in zip(padded, self.lengths, strict=True)]
        column[self.mask] = torch.cat(rows)
        return column

    def padded(self, column: Tensor) -> np.ndarray:
        """The actions of each answer, right-padded with 0."""
        found = torch.zeros(len(self.lengths), max(self.lengths), dtype=column.dtype)
        for row, actions in enumerate(column[self.mask].split(self.lengths)):
            found[row, : len(actions)] = actions
        return found.detach().numpy()

    def loss(self, loss: PolicyLoss | ValueLoss, batch: TrajectoryBatch | None = None) -> Values:
        """The value over its denominator, the gradient, and the share of what is clipped."""
        batch, critic = batch or self.batch, isinstance(loss, ValueLoss)
        x = self.column["values" if critic else "log_probs"].clone().requires_grad_()
        out: LossOutput = loss(x if critic else PolicyOutputs(x), batch)  # type: ignore[arg-type]
        value = out.loss / denominator(loss.denominator, batch, range(len(batch)))
        (gradient,) = torch.autograd.grad(value, x)
        total, count = out.metrics["clip_fraction/value" if critic else "clip_fraction"]
        named = {"loss": value.detach(), "clipped": (total / count).float()}
        return {name: number.numpy() for name, number in named.items()} | {"gradient": self.padded(gradient)}

    def baseline(self, name: str, epsilon: float) -> np.ndarray:
        return group_baseline(self.scores, self.groups, self.every, name, epsilon=epsilon).numpy()  # type: ignore[arg-type]

    def weighted(self, level: str, rule: str, low: float, high: float, gating: str = "ratio") -> TrajectoryBatch:
        """The batch with importance weights."""
        correction = ImportanceCorrection(level, rule, low, high, gating)  # type: ignore[arg-type]
        rollout = self.column["rollout_log_probs"]
        weights, _ = correction(self.column["old_log_probs"], rollout, self.mask, self.offsets)
        return self.batch.with_columns(importance_weights=weights)


def named(prefix: str, values: Mapping[str, np.ndarray]) -> Values:
    return {f"{prefix}/{name}": value for name, value in values.items()}


# -------------------------------------------------------------------------------------------------------------- OpenRLHF


def openrlhf(inputs: Mapping[str, Any]) -> Values:
    """What OpenRLHF has functions for."""
    us = Ours(inputs)
    values: Values = {}
    for estimator in ("k1", "k2", "k3"):
        values |= {f"kl {estimator}/estimate": us.padded(_kl(us, estimator))}
        for gradient in ("plain", "unbiased"):
            values |= {f"kl {estimator}/{gradient} gradient": _kl_gradient(us, estimator, gradient)}
    values |= _placed(us) | _estimated(us) | _shaped(us) | _controlled()
    for name, loss in OPENRLHF_LOSSES.items():
        found = us.loss(loss)
        told = found if isinstance(loss, PolicyLoss) else {key: found[key] for key in ("loss", "gradient")}
        values |= named(name, told)
    for rule, level in (("truncate", "token"), ("mask", "token")):
        batch = us.weighted(level, rule, 0.8, 1.25)
        values |= named(f"importance {level} {rule}", us.loss(PolicyLoss(Clipped(0.2, 0.2)), batch))
    for name, (level, gating, low, high) in GATED.items():
        batch = us.weighted(level, "mask", low, high, gating)
        values |= named(f"gated {name}", us.loss(PolicyLoss(Clipped(0.2, 0.2)), batch))
    return values


GATED = {
    "seq ratio": ("sequence", "geometric_mean", 0.95, 1.05),
    "token binary_kl": ("token", "binary_kl", 0.0, 0.02),
    "seq binary_kl": ("sequence", "binary_kl", 0.0, 0.02),
    "token tv": ("token", "tv", 0.0, 0.08),
    "seq tv": ("sequence", "tv", 0.0, 0.08),
}
"""OpenRLHF's names of level and gating; level, gating and bounds here."""

OPENRLHF_LOSSES: dict[str, PolicyLoss | ValueLoss] = {
    "ppo": PolicyLoss(Clipped(0.2, 0.2)),
    "clip higher": PolicyLoss(Clipped(0.2, 0.28)),
    "dual clip": PolicyLoss(Clipped(0.2, 0.2, dual=1.3)),
    "mean of answers": PolicyLoss(Clipped(0.2, 0.2), aggregation="sequences"),
    "gspo": PolicyLoss(Clipped(0.05, 0.08), ratio="sequence", aggregation="sequences"),
    "value": ValueLoss(None),
    "clipped value": ValueLoss(0.2),
}


def _kl(us: Ours, estimator: str) -> Tensor:
    return token_kl(us.column["log_probs"], us.column["reference_log_probs"], us.mask, estimator)  # type: ignore[arg-type]


def _kl_gradient(us: Ours, estimator: str, gradient: str) -> np.ndarray:
    x = us.column["log_probs"].clone().requires_grad_()
    ratio = torch.where(us.mask, x.detach() - us.column["old_log_probs"], 0.0)
    reference = us.column["reference_log_probs"]
    term = kl_loss(x, ratio, reference, us.mask, estimator=estimator, gradient=gradient)  # type: ignore[arg-type]
    return us.padded(torch.autograd.grad(term.sum(), x)[0])


def _placed(us: Ours) -> Values:
    rewards = make_token_rewards(us.scores.clamp(-1.5, 1.5), _kl(us, "k1"), us.mask, us.offsets, kl_coefficient=BETA)
    return {"rewards/clipped and placed, minus KL": us.padded(rewards)}


def _estimated(us: Ours) -> Values:
    rewards, old = us.column["token_rewards"], us.column["old_values"]
    advantages, returns = gae(rewards, old, us.mask, us.offsets, gamma=GAMMA, lam=LAM)
    to_go = reward_to_go(rewards, us.mask, us.offsets, gamma=GAMMA)
    values = {
        "advantages/gae": us.padded(advantages),
        "advantages/gae returns": us.padded(returns),
        "advantages/gae whitened": us.padded(whiten(advantages, us.mask)),
        "advantages/reward to go": us.padded(to_go),
        "advantages/reward to go whitened": us.padded(whiten(to_go, us.mask)),
    }
    rows = us.batch.sequence_ids
    for name in ("leave_one_out", "group_mean", "group_norm"):
        of_answers = torch.from_numpy(us.baseline(name, 1e-9))
        values[f"advantages/{name}"] = us.padded(of_answers[rows])
        if name == "group_mean":
            values[f"advantages/{name} whitened"] = us.padded(whiten(of_answers[rows], us.mask))
    return values


def _shaped(us: Ours) -> Values:
    reasons, tokens = us.batch["finish_reason"], torch.tensor(us.lengths)
    return {
        "shaping/overlong": Overlong(limit=10, buffer=5, penalty=0.7)(us.scores, tokens).numpy(),
        "shaping/cut answers scaled": MissingEos("scale", 0.3)(us.scores, reasons).numpy(),
        "shaping/cut answers replaced": MissingEos("replace", -0.5)(us.scores, reasons).numpy(),
    }


def _controlled() -> Values:
    adaptive, fixed = AdaptiveKl(BETA, 6.0, 1000), FixedKl(BETA)
    found = []
    for kl in KLS:
        adaptive, fixed = adaptive.update(kl, 64), fixed.update(kl, 64)
        found.append([adaptive.coefficient, fixed.coefficient])
    return {"kl control/adaptive and fixed": np.float32(found)}


# ------------------------------------------------------------------------------------------------------------------- TRL


def trl(inputs: Mapping[str, Any]) -> Values:
    """The losses of TRL's GRPO and RLOO trainers, their advantages, and the correction for vLLM."""
    us = Ours(inputs)
    values: Values = {}
    for name, loss in TRL_LOSSES.items():
        values |= named(name, {key: value for key, value in us.loss(loss).items() if key != "clipped"})
    for level in ("token", "sequence"):
        for rule in ("truncate", "mask"):
            batch = us.weighted(level, rule, 0.8, 1.25)
            found = us.loss(PolicyLoss(Clipped(0.2, 0.2)), batch)
            values |= {f"importance {level} {rule}/weights": us.padded(batch["importance_weights"])}
            values |= named(f"importance {level} {rule}", {key: found[key] for key in ("loss", "gradient")})
    for name, baseline in {"grpo": "group_norm", "dr_grpo": "group_mean"}.items():
        values[f"advantages/{name}"] = us.baseline(baseline, 1e-4)
    kl = token_kl(us.column["old_log_probs"], us.column["reference_log_probs"], us.mask)
    sums = torch.stack([part.sum() for part in kl[us.mask].split(us.lengths)])
    compared = group_baseline(us.scores.clamp(-1.5, 1.5) - BETA * sums, us.groups, us.every, "leave_one_out")
    return values | {"advantages/rloo, clipped, KL in the rewards": compared.numpy()}


K3 = KlTerm(BETA, "k3")
TRL_LOSSES: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss(Clipped(0.2, 0.2), aggregation="sequences"),
    "grpo with plain kl": PolicyLoss(Clipped(0.2, 0.2), aggregation="sequences", kl=KlTerm(BETA, "k3", "plain")),
    "grpo with unbiased kl": PolicyLoss(Clipped(0.2, 0.2), aggregation="sequences", kl=K3),
    "bnpo": PolicyLoss(Clipped(0.2, 0.28)),
    "dapo": PolicyLoss(Clipped(0.2, 0.28), kl=K3),
    "dr_grpo": PolicyLoss(Clipped(0.2, 0.2), aggregation="constant", constant_tokens=LONGEST),
    "two-sided clip": PolicyLoss(Clipped(0.2, 0.2, dual=1.3)),
    "gspo": PolicyLoss(Clipped(0.05, 0.08), ratio="sequence", aggregation="sequences"),
    "cispo": PolicyLoss(Cispo(None, 0.3)),
    "rloo": PolicyLoss(Clipped(0.2, 0.2), ratio="trajectory", aggregation="sequences"),
}


# ------------------------------------------------------------------------------------------ TRL's last PPO, and torchtune


def trl_ppo(inputs: Mapping[str, Any]) -> Values:
    """The PPO that TRL had until 1.12, and torchtune's functions."""
    us = Ours(inputs)
    values: Values = {}
    for estimator in ("k1", "k3"):
        values |= named(f"trl {estimator}", _trl_step(us, estimator, whiten_rewards=estimator == "k3"))
    values |= named("trl losses", _both_losses(us))
    kept = us.column["advantages"]
    scale = whiten(kept, us.mask, unbiased=True, shift_mean=False)
    values |= {
        "trl whitening/zero mean": us.padded(whiten(kept, us.mask, unbiased=True)),
        "trl whitening/mean kept": us.padded(scale),
        "torchtune whitening/mean kept": us.padded(scale),
        "torchtune whitening/mean": masked_mean(kept, us.mask).numpy(),
    }
    kl = token_kl(us.column["log_probs"], us.column["reference_log_probs"], us.mask)
    rewards = make_token_rewards(us.scores, kl, us.mask, us.offsets, kl_coefficient=BETA)
    advantages, returns = gae(rewards, us.column["old_values"], us.mask, us.offsets, gamma=GAMMA, lam=LAM)
    values |= {
        "torchtune step/rewards": us.padded(rewards),
        "torchtune step/advantages": us.padded(whiten(advantages, us.mask, unbiased=True, shift_mean=False)),
        "torchtune step/returns": us.padded(returns),
    }
    values |= named("torchtune losses", _both_losses(us))
    shaped = TooShort(5, 0.0)(
        MissingEos("replace", -2.0)(us.scores, us.batch["finish_reason"]), torch.tensor(us.lengths)
    )
    short = torch.tensor(us.lengths) < 5
    return values | {"torchtune shaping/penalised": torch.where(short, -2.0, shaped).numpy()}


def _trl_step(us: Ours, estimator: str, *, whiten_rewards: bool) -> Values:
    kl = token_kl(us.column["old_log_probs"], us.column["reference_log_probs"], us.mask, estimator)  # type: ignore[arg-type]
    scores = MissingEos("subtract", 0.8)(us.scores, us.batch["finish_reason"])
    rewards = make_token_rewards(scores, kl, us.mask, us.offsets, kl_coefficient=BETA)
    if whiten_rewards:
        rewards = whiten(rewards, us.mask, unbiased=True, shift_mean=False)
    advantages, returns = gae(rewards, us.column["old_values"], us.mask, us.offsets, gamma=GAMMA, lam=LAM)
    whitened = whiten(advantages, us.mask, unbiased=True)
    columns = {"rewards": rewards, "advantages": whitened, "returns": returns}
    return {name: us.padded(column) for name, column in columns.items()}


def _both_losses(us: Ours) -> Values:
    policy, value = us.loss(PolicyLoss(Clipped(0.2, 0.2))), us.loss(ValueLoss(0.2))
    return {f"policy {name}": number for name, number in policy.items()} | {
        f"value {name}": number for name, number in value.items() if name != "clipped"
    }


# ------------------------------------------------------------------------------------------------------------------ verl


def verl(inputs: Mapping[str, Any]) -> Values:
    """DPPO by both divergences."""
    us = Ours(inputs)
    corrected = us.weighted("token", "truncate", 0.8, 1.25)
    values: Values = {}
    for name, loss in VERL_LOSSES.items():
        values |= named(name, us.loss(loss, corrected if name.endswith("corrected") else None))
    return values


VERL_LOSSES: dict[str, PolicyLoss] = {
    "tv": PolicyLoss(Dppo("tv", 0.05, 0.05)),
    "tv, wider above": PolicyLoss(Dppo("tv", 0.02, 0.06)),
    "tv, cut ratios": PolicyLoss(Dppo("tv", 0.05, 0.05, cap=1.1)),
    "tv, mean of answers": PolicyLoss(Dppo("tv", 0.05, 0.05), aggregation="sequences"),
    "kl": PolicyLoss(Dppo("binary_kl", 0.01, 0.01)),
    "kl, wider above": PolicyLoss(Dppo("binary_kl", 0.002, 0.02)),
    "kl, constant": PolicyLoss(Dppo("binary_kl", 0.01, 0.01), aggregation="constant", constant_tokens=LONGEST),
    "kl, corrected": PolicyLoss(Dppo("binary_kl", 0.01, 0.01)),
}


COMPARISONS: dict[str, Callable[[Mapping[str, Any]], Values]] = {
    "algorithms_openrlhf": openrlhf, "algorithms_trl": trl, "algorithms_trl_ppo": trl_ppo, "algorithms_verl": verl,
}  # fmt: skip
