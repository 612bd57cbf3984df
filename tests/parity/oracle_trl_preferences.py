"""What TRL's DPOTrainer, CPOTrainer and KTOTrainer compute: run in the environment of the independent implementations.

    python oracle_trl_preferences.py DIRECTORY

Reads ``inputs.json`` and ``model/`` there (trl_preferences.prepare wrote them) and writes ``values.npz`` and ``versions.json``.
Rows come as token ids, so nothing is tokenized; a batch is a step, in the order of the file. KTO's answers to other prompts are
those that its trainer takes, turned round within the step.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

ROWS: list[dict[str, Any]] = []


class Recorder:
    """Keeps each step's loss with all its digits, and takes rows as they are."""

    losses: list[float]

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(*arguments, **options)
        self.losses = [*getattr(self, "losses", []), (loss[0] if isinstance(loss, tuple) else loss).item()]
        return loss

    def _prepare_dataset(self, dataset: Dataset, *arguments: Any) -> Dataset:
        return dataset


class Dpo(Recorder, DPOTrainer):
    pass


class Kto(Recorder, KTOTrainer):
    pass


class Cpo(Recorder, CPOTrainer):
    """Its rows are texts; ``prompt`` holds the number of the row instead."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        row = ROWS[int(feature["prompt"])]
        batch: dict[str, Any] = {"prompt_input_ids": row["prompt"], "prompt_attention_mask": [1] * len(row["prompt"])}
        for side in ("chosen", "rejected"):
            ids = row["prompt"] + row[side]
            batch[f"{side}_input_ids"] = ids
            batch[f"{side}_attention_mask"] = [1] * len(ids)
            batch[f"{side}_labels"] = [-100] * len(row["prompt"]) + row[side]
        return batch


def trainer_of(directory: Path, inputs: dict[str, Any], case: dict[str, Any]) -> Any:
    """The trainer of a case, ready to train."""
    loss, optimizer = case["loss"], inputs["optimizer"]
    size = len(inputs["steps"][0])
    common: dict[str, Any] = {
        "output_dir": str(directory / "trl"),
        "per_device_train_batch_size": size,
        "max_steps": len(inputs["steps"]),
        "train_sampling_strategy": "sequential",
        "learning_rate": optimizer["learning_rate"],
        "adam_beta1": optimizer["betas"][0],
        "adam_beta2": optimizer["betas"][1],
        "adam_epsilon": optimizer["eps"],
        "weight_decay": optimizer["weight_decay"],
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1000.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "beta": loss["beta"],
        "max_length": 64,
        "remove_unused_columns": False,
    }
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype="float32")
    if case["trl"] == "simpo":
        from transformers import AutoTokenizer

        config = CPOConfig(
            **common, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=loss["simpo_gamma"],
            label_smoothing=loss.get("label_smoothing", 0.0),
        )  # fmt: skip
        rows = [{"prompt": str(number), "chosen": "x", "rejected": "y"} for number in range(len(ROWS))]
        tokenizer = AutoTokenizer.from_pretrained(directory / "model")
        return Cpo(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    if case["trl"] == "kto":
        weights = {name: loss[name] for name in ("desirable_weight", "undesirable_weight")}
        return Kto(model=model, args=KTOConfig(**common, **weights), train_dataset=Dataset.from_list(judged(inputs)))
    names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    rows = [{new: row[old] for old, new in names.items()} for row in ROWS]
    config = DPOConfig(**common, loss_type=[case["trl"]])
    return Dpo(model=model, args=config, train_dataset=Dataset.from_list(rows))


def judged(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """One side of each pair, and of the row before in its step, as KTOTrainer turns completions round."""
    found = []
    for rows in inputs["steps"]:
        answers = [row["chosen" if row["label"] else "rejected"] for row in rows]
        for row, answer, other in zip(rows, answers, [answers[-1], *answers[:-1]], strict=True):
            found.append(
                {
                    "prompt_ids": row["prompt"], "completion_ids": answer, "KL_completion_ids": other,
                    "label": row["label"],
                }
            )  # fmt: skip
    return found


def values_of(directory: Path, inputs: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """All that is compared."""
    trainer = trainer_of(directory, inputs, case)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    values: dict[str, Any] = {"loss": trainer.losses, "gradient norm": [entry["grad_norm"] for entry in logs]}
    if case["trl"] not in ("ipo", "sigmoid_norm"):
        for side in ("chosen", "rejected"):
            values[f"reward/{side}"] = [entry[f"rewards/{side}"] for entry in logs]
    if case["trl"] == "kto":
        values["kl"] = [entry["kl"] for entry in logs]
    state = trainer.model.state_dict()
    return {**values, **{f"weights/{name}": weight.numpy() for name, weight in state.items()}}


def main(directory: Path) -> None:
    inputs = json.loads((directory / "inputs.json").read_text())
    ROWS.extend(row for rows in inputs["steps"] for row in rows)
    values = {
        f"{name}/{key}": np.asarray(value, dtype=np.float32)
        for name, case in inputs["cases"].items()
        for key, value in values_of(directory, inputs, case).items()
    }
    np.savez(directory / "values.npz", **values)
    packages = ("trl", "transformers", "torch", "accelerate")
    (directory / "versions.json").write_text(json.dumps({name: version(name) for name in packages}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
