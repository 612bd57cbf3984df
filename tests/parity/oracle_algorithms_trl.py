"""What the losses and advantages of TRL's GRPO and RLOO trainers are: run in the environment of the oracles.

    python oracle_algorithms_trl.py DIRECTORY

Reads ``inputs.npz`` there (algorithms.prepare wrote it) and writes ``values.npz`` and ``versions.json``. The losses are
``_compute_loss`` of trainers whose model gives the log-probs of the inputs; advantages and importance weights stand inline
in ``_generate_and_score_completions``. CISPO's ``epsilon_high`` is the bound itself there, 1 + clip_high here.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import excerpts
import numpy as np
import torch
from trl import GRPOTrainer, RLOOTrainer

BETA = 0.1
GRPO = {
    "grpo": {},
    "grpo with plain kl": {"beta": BETA},
    "grpo with unbiased kl": {"beta": BETA, "use_bias_correction_kl": True},
    "bnpo": {"loss_type": "bnpo", "epsilon_high": 0.28},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "beta": BETA, "use_bias_correction_kl": True},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "two-sided clip": {"loss_type": "bnpo", "delta": 1.3},
    "gspo": {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
}
DEFAULTS = {
    "loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False, "aux_loss_enabled": False,
    "vllm_importance_sampling_correction": True, "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False,
    "_last_world_entropy": 0.0, "num_generations": 4, "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize", "reward_weights": torch.ones(1), "normalize_advantages": False,
    "reward_clip_range": [-1.5, 1.5],
}  # fmt: skip

Tensors = dict[str, Any]


def trainer(inputs: Tensors, log_probs: torch.Tensor | None = None, **options: Any) -> SimpleNamespace:
    """A trainer on one process whose model says ``log_probs``."""
    accelerator = SimpleNamespace(
        gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, process_index=0,
        sync_gradients=True,
    )  # fmt: skip
    args = SimpleNamespace(
        delta=options.pop("delta", None), steps_per_generation=1,
        use_bias_correction_kl=options.pop("use_bias_correction_kl", False),
    )  # fmt: skip
    entropies = torch.zeros_like(inputs["mask"])
    return SimpleNamespace(
        **(DEFAULTS | options), args=args, accelerator=accelerator, model=SimpleNamespace(training=True),
        max_completion_length=inputs["mask"].shape[1], _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, entropies, None),
    )  # fmt: skip


def loss_of(kind: Any, inputs: Tensors, given: Tensors, **options: Any) -> Tensors:
    """Loss and gradient of ``_compute_loss`` of a trainer class."""
    x = inputs["log_probs"].clone().requires_grad_()
    ids = torch.ones_like(inputs["mask"], dtype=torch.int64)
    batch = {
        "prompt_ids": ids[:, :2], "prompt_mask": ids[:, :2], "completion_ids": ids, "completion_mask": inputs["mask"],
        "num_items_in_batch": inputs["mask"].sum(), **given,
    }  # fmt: skip
    value = kind._compute_loss(trainer(inputs, x, **options), None, batch)
    value.backward()
    return {"loss": value.detach(), "gradient": x.grad}


def lost(inputs: Tensors) -> Tensors:
    given = {
        "advantages": inputs["advantages"], "old_per_token_logps": inputs["old_log_probs"],
        "ref_per_token_logps": inputs["reference_log_probs"],
    }  # fmt: skip
    found = {name: loss_of(GRPOTrainer, inputs, given, **options) for name, options in GRPO.items()}
    for level in ("token", "sequence"):
        for rule in ("truncate", "mask"):
            weights = corrected(inputs, f"{level}_{rule}")
            name = f"importance {level} {rule}"
            both = given | {"importance_sampling_ratio": weights}
            found[name] = loss_of(GRPOTrainer, inputs, both, loss_type="bnpo", use_vllm=True)
            found[name]["weights"] = (weights * inputs["mask"]).expand_as(inputs["mask"])
    return {f"{name}/{key}": value for name, values in found.items() for key, value in values.items()}


def rloo(inputs: Tensors) -> Tensors:
    """RLOO weighs a whole answer by one advantage: the loss of one answer at a time, for each of its tokens' advantages.

    Ours takes an advantage for each token, so the sum over an answer's tokens of ``L(A_t) / length`` is compared.
    """
    mask, total, gradient = inputs["mask"], torch.zeros(()), torch.zeros_like(inputs["mask"])
    for row, length in enumerate(inputs["lengths"].tolist()):
        one = {name: inputs[name][row : row + 1] for name in ("mask", "log_probs")}
        for t in range(length):
            given = {
                "advantages": inputs["advantages"][row, t : t + 1],
                "old_logps": (inputs["old_log_probs"] * mask).sum(1)[row : row + 1],
            }
            found = loss_of(RLOOTrainer, one, given)
            total = total + found["loss"] / length
            gradient[row] += found["gradient"][0] / length
    return {"rloo/loss": total / len(mask), "rloo/gradient": gradient / len(mask)}


def corrected(inputs: Tensors, mode: str) -> torch.Tensor:
    """The weights of vLLM's tokens, from the statement inside ``_generate_and_score_completions``."""
    own = trainer(
        inputs, use_vllm=True, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=0.8,
        vllm_importance_sampling_clip_max=1.25,
    )  # fmt: skip
    start = "mask = completion_mask if tool_mask is None"
    space = excerpts.run(
        GRPOTrainer._generate_and_score_completions, start, "if self.vllm_importance_sampling_mode in",
        {"self": own, "completion_mask": inputs["mask"], "tool_mask": None,
         "old_per_token_logps": inputs["old_log_probs"], "sampling_per_token_logps": inputs["rollout_log_probs"]},
    )  # fmt: skip
    return space["vllm_importance_sampling_ratio"]


def advantages(inputs: Tensors) -> Tensors:
    found = {}
    for name, scale in {"grpo": "group", "dr_grpo": "none"}.items():
        space = excerpts.run(
            GRPOTrainer._generate_and_score_completions, "unscorable_mask =", "if self.multi_objective_aggregation ==",
            {"self": trainer(inputs, scale_rewards=scale), "rewards_per_func": inputs["scores"][:, None],
             "num_generations": 4, "device": "cpu"},
        )  # fmt: skip
        found[f"advantages/{name}"] = space["advantages"]
    space = excerpts.run(
        RLOOTrainer._generate_and_score_completions, "if self.reward_clip_range:", "advantages = torch.nan_to_num(",
        {"self": trainer(inputs, beta=BETA), "rewards": inputs["scores"].clone(), "num_generations": 4, "gather": lambda x: x,
         "old_per_token_logps": inputs["old_log_probs"], "ref_per_token_logps": inputs["reference_log_probs"],
         "completion_mask": inputs["mask"]},
    )  # fmt: skip
    return found | {"advantages/rloo, clipped, KL in the rewards": space["advantages"]}


def main(directory: Path) -> None:
    with np.load(directory / "inputs.npz") as arrays:
        inputs: Tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    width = inputs["log_probs"].shape[1]
    inputs["mask"] = (torch.arange(width) < inputs["lengths"][:, None]).float()
    values = lost(inputs) | rloo(inputs) | advantages(inputs)
    np.savez(directory / "values.npz", **{name: value.detach().numpy() for name, value in values.items()})
    (directory / "versions.json").write_text(json.dumps({name: version(name) for name in ("trl", "torch")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
