"""What TRL's SFTTrainer computes: run in the environment of the independent implementations, without this project.

    python oracle_trl_sft.py DIRECTORY

Reads ``inputs.json`` and ``model/`` there (trl_sft.prepare wrote them) and writes ``values.npz`` and ``versions.json``.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


class Recorder(SFTTrainer):
    """Keeps each step's loss with all its digits: the log rounds."""

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(*arguments, **options)
        self.losses = [*getattr(self, "losses", []), (loss[0] if isinstance(loss, tuple) else loss).item()]
        return loss


def train(directory: Path, inputs: dict[str, Any], case: dict[str, Any]) -> Recorder:
    """One step a batch, in the order of the file."""
    optimizer = inputs["optimizer"]
    config = SFTConfig(
        output_dir=str(directory / "trl"),
        per_device_train_batch_size=len(inputs["steps"][0]),
        max_steps=len(inputs["steps"]),
        train_sampling_strategy="sequential",
        learning_rate=optimizer["learning_rate"],
        adam_beta1=optimizer["betas"][0],
        adam_beta2=optimizer["betas"][1],
        adam_epsilon=optimizer["eps"],
        weight_decay=optimizer["weight_decay"],
        optim="adamw_torch",
        lr_scheduler_type="constant",
        max_grad_norm=case["max_grad_norm"],
        completion_only_loss=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [sequence for batch in inputs["steps"] for sequence in batch]
    dataset = Dataset.from_list([{"input_ids": row["ids"], "completion_mask": row["learned"]} for row in rows])
    trainer = Recorder(model=str(directory / "model"), args=config, train_dataset=dataset)
    trainer.train()
    return trainer


def values_of(directory: Path, inputs: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """All that is compared."""
    trainer = train(directory, inputs, case)
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "loss": trainer.losses,
        "gradient norm": [entry["grad_norm"] for entry in logs],
        **{f"weights/{name}": weight.float().numpy() for name, weight in trainer.model.state_dict().items()},
    }


def main(directory: Path) -> None:
    inputs = json.loads((directory / "inputs.json").read_text())
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
