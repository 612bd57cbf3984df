"""What OpenRLHF's functions give: run in the environment of the independent implementations, without this project.

    python oracle_algorithms_openrlhf.py DIRECTORY

Reads ``inputs.npz`` there (algorithms.prepare wrote it) and writes ``values.npz`` and ``versions.json``. Its estimates are
clamped to 10 nats and its log-ratios to 20, which no number here reaches; its token importance weights are those of its
``mask`` and ``clip`` modes; it takes KL off after the baseline of a group, so groups are compared without KL.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import openrlhf_source
import torch

GAMMA, LAM, BETA = 0.97, 0.9, 0.1
KLS = [0.5, 4.0, 6.5, 6.0, 9.0]
LOSSES = {
    "ppo": {},
    "clip higher": {"clip_eps_high": 0.28},
    "dual clip": {"dual_clip": 1.3},
    "mean of answers": {"token_level_loss": False},
    "gspo": {"policy_loss_type": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.08},
    "importance token truncate": {"is_correction_level": "token", "is_correction_mode": "clip"},
    "importance token mask": {"is_correction_level": "token", "is_correction_mode": "mask"},
}
for gating, level, threshold in (
    ("ratio", "seq", [0.95, 1.05]), ("binary_kl", "token", [0.0, 0.02]), ("binary_kl", "seq", [0.0, 0.02]),
    ("tv", "token", [0.0, 0.08]), ("tv", "seq", [0.0, 0.08]),
):  # fmt: skip
    LOSSES[f"gated {level} {gating}"] = {
        "is_correction_level": level, "is_correction_gating": gating, "is_correction_threshold": threshold,
    }  # fmt: skip
ESTIMATORS = {
    "leave_one_out": "rloo",
    "group_mean": "dr_grpo",
    "group_mean whitened": "reinforce_baseline",
    "group_norm": "group_norm",
}

Tensors = dict[str, Any]


def maker() -> Any:
    """The class of ``experience_maker``, whose module asks for ray and for the launcher of its own actors."""
    for name, content in {
        "ray": {"remote": lambda x: x},
        "openrlhf.trainer.ray.launcher": {"RayActorGroup": object},
    }.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    openrlhf_source.module("utils.logging_utils")  # so that the package around it does not run its __init__
    return openrlhf_source.module("trainer.ppo_utils.experience_maker").RemoteExperienceMaker


def kl(inputs: Tensors) -> Tensors:
    compute = openrlhf_source.module("models.utils").compute_approx_kl
    found = {}
    for name in ("k1", "k2", "k3"):
        for gradient in ("plain", "unbiased"):
            x = inputs["log_probs"].clone().requires_grad_()
            value = compute(x, inputs["reference_log_probs"], inputs["old_log_probs"], name, gradient == "unbiased")
            value.sum().backward()
            found |= {f"kl {name}/estimate": value.detach(), f"kl {name}/{gradient} gradient": x.grad * inputs["mask"]}
    return found


def estimated(inputs: Tensors) -> Tensors:
    """Advantages by the trainer's own method, one experience of all answers at a time."""
    source, utils = maker(), openrlhf_source.module("models.utils")
    mask, rewards = inputs["mask"], inputs["token_rewards"]
    k1 = inputs["log_probs"] - inputs["reference_log_probs"]
    clipped = utils.compute_reward(inputs["scores"], BETA, k1, mask, (-1.5, 1.5))
    advantages, returns = source.get_advantages_and_returns(None, inputs["old_values"], rewards, mask, GAMMA, LAM)
    to_go = source.get_cumulative_returns(None, rewards, mask, GAMMA)

    def whitened(x: torch.Tensor) -> torch.Tensor:
        return utils.masked_normalize((x * mask).flatten()[None], mask.flatten()[None]).reshape(mask.shape)

    found = {
        "rewards/clipped and placed, minus KL": clipped * mask,
        "advantages/gae": advantages * mask,
        "advantages/gae returns": returns * mask,
        "advantages/gae whitened": whitened(advantages),
        "advantages/reward to go": to_go * mask,
        "advantages/reward to go whitened": whitened(to_go),
    }
    return found | {f"advantages/{name}": grouped(source, estimator, inputs) for name, estimator in ESTIMATORS.items()}


def grouped(source: Any, estimator: str, inputs: Tensors) -> torch.Tensor:
    """``compute_advantages_and_returns`` of one of the estimators that compare answers to the same prompt."""
    count = len(inputs["scores"])
    experience = SimpleNamespace(
        index=list(range(count)), rewards=inputs["scores"].clone(), kl=torch.zeros_like(inputs["mask"]),
        action_mask=inputs["mask"], info={}, values=None,
    )  # fmt: skip
    advantage = SimpleNamespace(estimator=estimator, gamma=1.0, no_std_norm=False)
    samples = count // len(set(inputs["groups"].tolist()))
    args = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=samples), reward=SimpleNamespace(clip_range=None),
        algo=SimpleNamespace(advantage=advantage),
    )  # fmt: skip
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(args=args), kl_ctl=SimpleNamespace(value=0.0), advantage_estimator=estimator,
        get_cumulative_returns=lambda *given: source.get_cumulative_returns(None, *given),
    )  # fmt: skip
    (done,) = source.compute_advantages_and_returns(trainer, [experience])
    return done.advantages * inputs["mask"]


def shaped(inputs: Tensors) -> Tensors:
    penalty = openrlhf_source.module("trainer.ppo_utils.length_penalty")
    cut = ~inputs["finished"]

    def after(apply: Any, *arguments: Any) -> torch.Tensor:
        experience = SimpleNamespace(rewards=inputs["scores"].clone(), truncated=cut, response_length=inputs["lengths"])
        apply([experience], *arguments)
        return experience.rewards

    return {
        "shaping/overlong": after(penalty.apply_overlong_penalty, 10, 5, 0.7),
        "shaping/cut answers scaled": after(penalty.apply_stop_properly_penalty, 0.3),
        "shaping/cut answers replaced": after(penalty.apply_stop_properly_penalty, -0.5),
    }


def controlled() -> Tensors:
    control = openrlhf_source.module("trainer.ppo_utils.kl_controller")
    adaptive, fixed = control.AdaptiveKLController(BETA, 6.0, 1000), control.FixedKLController(BETA)
    found = []
    for measured in KLS:
        adaptive.update(measured, 64)
        fixed.update(measured, 64)
        found.append([adaptive.value, fixed.value])
    return {"kl control/adaptive and fixed": torch.tensor(found)}


def lost(inputs: Tensors) -> Tensors:
    """Losses, gradients and clipped shares of the policy and the critic."""
    losses = openrlhf_source.module("models.loss")
    mask, found = inputs["mask"], {}
    for name, options in LOSSES.items():
        loss = losses.PolicyLoss(**{"is_correction_threshold": [0.8, 1.25], **options})
        x = inputs["log_probs"].clone().requires_grad_()
        value, clipped, *_ = loss(x, inputs["old_log_probs"], inputs["advantages"], mask, inputs["rollout_log_probs"])
        value.backward()
        found |= {f"{name}/loss": value.detach(), f"{name}/clipped": clipped, f"{name}/gradient": x.grad}
    for name, clip in {"value": None, "clipped value": 0.2}.items():
        x = inputs["values"].clone().requires_grad_()
        value = losses.ValueLoss(clip)(x, inputs["old_values"], inputs["returns"], mask)
        value.backward()
        found |= {f"{name}/loss": value.detach(), f"{name}/gradient": x.grad}
    return found


def main(directory: Path) -> None:
    with np.load(directory / "inputs.npz") as arrays:
        inputs: Tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    width = inputs["log_probs"].shape[1]
    inputs["mask"] = (torch.arange(width) < inputs["lengths"][:, None]).float()
    values = kl(inputs) | estimated(inputs) | shaped(inputs) | controlled() | lost(inputs)
    np.savez(directory / "values.npz", **{name: value.float().numpy() for name, value in values.items()})
    (directory / "versions.json").write_text(json.dumps({"openrlhf": "0.11.2", "torch": version("torch")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
