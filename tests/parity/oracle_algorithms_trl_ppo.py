"""What TRL's last PPO (1.12) and torchtune give: run in the environment of the independent implementations.

    python oracle_algorithms_trl_ppo.py DIRECTORY

Reads ``inputs.npz`` there (algorithms.prepare wrote it) and writes ``values.npz`` and ``versions.json``. TRL's rewards,
advantages and losses stand inline in ``PPOTrainer.train``. It gives the score to the first padding after an answer where
there is one; told that answers end one token earlier, it gives it to their last token, as this project does.
torchtune's ``estimate_advantages`` adds the mean back after whitening. Its package does not import here: its two files do.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import excerpts
import numpy as np
import torch

TRL, TORCHTUNE = Path(sys.prefix) / "trl-1.12", Path(sys.prefix) / "torchtune" / "torchtune" / "rlhf"
GAMMA, LAM, BETA = 0.97, 0.9, 0.1

Tensors = dict[str, Any]


def trl() -> Any:
    """The module of TRL's PPO, of 1.12 and not of the version that is installed."""
    sys.path.insert(0, str(TRL))
    from trl.experimental.ppo import ppo_trainer

    assert str(TRL) in ppo_trainer.__file__, ppo_trainer.__file__
    return ppo_trainer


def trl_step(module: Any, inputs: Tensors, estimator: str, *, whiten_rewards: bool) -> Tensors:
    mask, lengths = inputs["mask"], inputs["lengths"]
    options = SimpleNamespace(
        kl_estimator=estimator,
        kl_coef=BETA,
        gamma=GAMMA,
        lam=LAM,
        whiten_rewards=whiten_rewards,
        missing_eos_penalty=0.8,
    )
    scores = inputs["scores"].clone()
    scores[~inputs["finished"]] -= options.missing_eos_penalty
    ends = lengths - 2  # TRL's sequence_lengths are last indices; one less each
    space = excerpts.run(
        module.PPOTrainer.train, "logr = ref_logprobs - logprobs", "advantages = torch.masked_fill(",
        {"args": options, "logprobs": inputs["old_log_probs"], "ref_logprobs": inputs["reference_log_probs"],
         "scores": scores, "values": inputs["old_values"], "responses": mask, "padding_mask": ~mask.bool(),
         "padding_mask_p1": ~mask.bool(), "sequence_lengths": ends + 1, "sequence_lengths_p1": ends + 1},
    )  # fmt: skip
    keep = mask.bool()
    return {
        "rewards": torch.where(keep, space["rewards"], 0.0),
        "advantages": space["advantages"],
        "returns": torch.where(keep, space["returns"], 0.0),
    }


def trl_losses(module: Any, inputs: Tensors) -> Tensors:
    x, v = (inputs[name].clone().requires_grad_() for name in ("log_probs", "values"))
    padding = ~inputs["mask"].bool()
    space = excerpts.run(
        module.PPOTrainer.train, "vpredclipped = torch.clamp(", "pg_loss = masked_mean(",
        {"args": SimpleNamespace(cliprange_value=0.2, cliprange=0.2), "vpred": v, "mb_values": inputs["old_values"],
         "mb_return": inputs["returns"], "padding_mask": padding, "padding_mask_p1": padding,
         "micro_batch_inds": slice(None), "new_logprobs": x, "mb_logprobs": inputs["old_log_probs"],
         "mb_advantage": inputs["advantages"]},
    )  # fmt: skip
    (space["pg_loss"] + space["vf_loss"]).backward()
    clipped = module.masked_mean((space["pg_losses2"] > space["pg_losses"]).float(), ~padding)
    return {
        "policy loss": space["pg_loss"], "policy clipped": clipped, "policy gradient": x.grad,
        "value loss": space["vf_loss"], "value gradient": v.grad,
    }  # fmt: skip


def torchtune() -> tuple[ModuleType, ModuleType]:
    """``rlhf/rewards.py`` and ``rlhf/loss/ppo.py``."""
    rewards = _file("torchtune_rewards", TORCHTUNE / "rewards.py")
    sys.modules["torchtune"] = ModuleType("torchtune")
    sys.modules["torchtune"].rlhf = rewards  # type: ignore[attr-defined]
    return rewards, _file("torchtune_loss", TORCHTUNE / "loss" / "ppo.py")


def _file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchtune_values(inputs: Tensors) -> Tensors:
    rewards, losses = torchtune()
    mask, lengths = inputs["mask"].bool(), inputs["lengths"]
    placed, _, _ = rewards.get_rewards_ppo(
        inputs["scores"], inputs["log_probs"], inputs["reference_log_probs"], BETA, lengths - 1
    )
    advantages, returns = rewards.estimate_advantages(inputs["old_values"], placed, GAMMA, LAM, mask)
    x, v = (inputs[name].clone().requires_grad_() for name in ("log_probs", "values"))
    given = inputs["old_log_probs"], x, inputs["advantages"], inputs["old_values"], v, inputs["returns"]
    loss, policy, value, _, clipped = losses.PPOLoss(0.2, 0.2, 1.0)(*given, mask, mask)
    loss.backward()
    # An answer that was cut has no padding for torchtune, whose masks are made before it pads to a batch.
    padding = inputs["finished"][:, None] & torch.tensor([False, True])
    penalised = rewards.get_reward_penalty_mask(padding, lengths, True, 5)
    kept = rewards.whiten(inputs["advantages"], mask)
    return {
        "torchtune whitening/mean kept": torch.where(mask, kept, 0.0),
        "torchtune whitening/mean": rewards.masked_mean(inputs["advantages"], mask),
        "torchtune step/rewards": placed,
        "torchtune step/advantages": advantages,
        "torchtune step/returns": torch.where(mask, returns, 0.0),
        "torchtune losses/policy loss": policy,
        "torchtune losses/policy clipped": clipped,
        "torchtune losses/policy gradient": x.grad,
        "torchtune losses/value loss": value,
        "torchtune losses/value gradient": v.grad,
        "torchtune shaping/penalised": torch.where(penalised, -2.0, inputs["scores"]),
    }


def main(directory: Path) -> None:
    with np.load(directory / "inputs.npz") as arrays:
        inputs: Tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    width = inputs["log_probs"].shape[1]
    inputs["mask"] = (torch.arange(width) < inputs["lengths"][:, None]).float()
    mask, module = inputs["mask"].bool(), trl()
    values = torchtune_values(inputs)
    for estimator in ("k1", "k3"):
        found = trl_step(module, inputs, estimator, whiten_rewards=estimator == "k3")
        values |= {f"trl {estimator}/{name}": value for name, value in found.items()}
    values |= {f"trl losses/{name}": value for name, value in trl_losses(module, inputs).items()}
    for name, shift in {"zero mean": True, "mean kept": False}.items():
        whitened = module.masked_whiten(inputs["advantages"], mask, shift_mean=shift)
        values[f"trl whitening/{name}"] = torch.where(mask, whitened, 0.0)
    np.savez(directory / "values.npz", **{name: value.detach().numpy() for name, value in values.items()})
    versions = {"trl": "1.12.0", "torchtune": "0.6.1", "torch": torch.__version__}
    (directory / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
