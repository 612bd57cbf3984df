"""Read a saved reward model again, to check that it gives the scores of the trained one.

Invariants: nothing of the model in memory is used. The directory is read as any user would read it, and all of it computes
on the device that the caller names; on the CPU where that GPU has no room for a second model.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.devices import CPU
from rlhf_ray.models.from_config import load_regression
from rlhf_ray.models.regression import PackedRegression
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import pack


def score_directory(
    directory: str | Path, config: ModelConfig, batch: TrajectoryBatch, device: torch.device
) -> list[float]:
    """Return the raw scores of the model in ``directory`` for ``batch``, two sequences at a time, in ``config``'s dtype.

    An adapter is read on the base that it was trained on, in 4 bits if the base was.
    """
    try:
        return _scores(Path(directory), config, batch, device)
    except (ModelLoadError, torch.OutOfMemoryError) as error:
        if device == CPU or not (_is_out_of_memory(error) or _is_out_of_memory(error.__cause__)):
            raise
        get_logger(__name__).warning(
            "%s: the GPU has no room for a second model beside the one in training, so it is read back on the CPU: %s",
            directory, str(error).partition("\n")[0],
        )  # fmt: skip
    return _scores(Path(directory), config, batch, CPU)  # when the error no longer holds what was read


def _is_out_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def _scores(directory: Path, config: ModelConfig, batch: TrajectoryBatch, device: torch.device) -> list[float]:
    adapter = (directory / "adapter_config.json").exists()
    saved = ModelConfig(
        path=str(directory),
        dtype=config.dtype,
        attention="sdpa" if device == CPU else config.attention,
        quantization=config.quantization if adapter else None,
        trust_remote_code=config.trust_remote_code,
        value_head_prefix=config.value_head_prefix,
    )
    module = PackedRegression(load_regression(saved, "reward", device=device)).eval()
    scores: list[float] = []
    with torch.no_grad():
        for start in range(0, len(batch), 2):
            packed = pack(batch, [start, start + 1]).to(device)
            scores += module(packed, kind="scores").float().tolist()
    return scores
