"""Reading a saved reward model again, to see that it says what the trained one said.

Always true: nothing of the trained model is used: the directory is read as anybody would read it, on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.models.from_config import load_regression
from rlhf_ray.models.regression import PackedRegression
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import pack


def scores_of_directory(directory: str | Path, config: ModelConfig, batch: TrajectoryBatch) -> list[float]:
    """Raw scores of ``batch``, pair by pair, by the model in ``directory``, in the precision of ``config``.

    An adapter is read over the base that it was trained over, in 4 bits where that was so.
    """
    adapter = (Path(directory) / "adapter_config.json").exists()
    read = ModelConfig(
        path=str(directory),
        dtype=config.dtype,
        attention="sdpa",
        quantization=config.quantization if adapter else None,
        trust_remote_code=config.trust_remote_code,
        value_head_prefix=config.value_head_prefix,
    )
    module = PackedRegression(load_regression(read, "reward")).eval()
    scores: list[float] = []
    with torch.no_grad():
        for start in range(0, len(batch), 2):
            scores += module(pack(batch, [start, start + 1]), kind="scores").float().tolist()
    return scores
