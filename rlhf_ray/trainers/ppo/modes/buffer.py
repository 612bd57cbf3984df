"""Finished samples of steps to come, in a file of a checkpoint.

Invariants: a file holds steps or parts of them, each with the prompts that it took from the stream, in order, and every token
with the version of its weights. What is read back is what was written, for the same prompts and the same sizes, or nothing.
No step is written in which an episode failed, nor one after it: a resumed run samples them again, and that may go well then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.storage import storage_errors
from rlhf_ray.trajectories.batch import TrajectoryBatch

FILE = "rollout.npz"
_ABOUT = "about"


@dataclass(frozen=True)
class BufferedStep:
    """Samples of one step, or of a part of it, that no update has used."""

    step: int
    """Counted from 0."""
    prompt_ids: tuple[int, ...]
    """Of all prompts that it took from the stream, in order, also those whose samples are left out."""
    trajectories: TrajectoryBatch
    samples: tuple[int | None, ...] | None = None
    """How many samples each of the prompts has, in their order; None for one that is not answered yet, which a resumed run
    samples. Without it all prompts are answered.
    """

    @property
    def failed(self) -> bool:
        """Whether an episode of it has no reward."""
        return "episode_failure" in self.trajectories and bool(self.trajectories["episode_failure"].any())

    def answers(self, prompts: Sequence[TokenizedPrompt]) -> bool:
        """Whether these are the prompts of the step, with the tokens that its samples begin with."""
        if tuple(prompt.prompt_id for prompt in prompts) != self.prompt_ids:
            return False
        by_id = {prompt.prompt_id: list(prompt.token_ids) for prompt in prompts}
        tokens, offsets = self.trajectories["token_ids"].tolist(), self.trajectories.offsets.tolist()
        rows = enumerate(self.trajectories["prompt_id"].tolist())
        return all(
            prompt in by_id and tokens[offsets[row] : offsets[row] + len(by_id[prompt])] == by_id[prompt]
            for row, prompt in rows
        )


def sizes_of(config: PpoConfig) -> dict[str, Any]:
    """What samples of a checkpoint must have been sampled with to be used: in plain JSON, as :func:`write_steps` wants it."""
    sampling = {
        "mode", "window", "max_new_tokens", "max_model_tokens", "stop_tokens", "temperature", "top_p", "top_k", "min_p",
        "environment", "routing_replay",
    }  # fmt: skip
    rollout = config.rollout.model_dump(mode="json", include=sampling, exclude={"environment": {"timeout_s"}})
    return rollout | config.batch.model_dump(mode="json", include={"prompts_per_step", "samples_per_prompt"})


def write_steps(directory: Path, steps: Sequence[BufferedStep], sizes: Mapping[str, Any]) -> None:
    """Write ``steps`` up to the first with a failed episode; ``sizes`` is plain JSON that says how they were sampled.

    Without steps there is no file.
    """
    steps = list(takewhile(lambda one: not one.failed, steps))
    if not steps:
        return
    about = {"sizes": dict(sizes), "steps": [_about(one) for one in steps]}
    arrays = {
        f"{number}/{name}": array
        for number, one in enumerate(steps)
        for name, array in one.trajectories.to_arrays().items()
    }
    path = directory / FILE
    with storage_errors(path), path.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **{_ABOUT: np.array(json.dumps(about)), **arrays})


def read_steps(directory: Path, sizes: Mapping[str, Any]) -> list[BufferedStep]:
    """The steps in the file of a checkpoint; none where there is no file or they were sampled with other ``sizes``."""
    path = directory / FILE
    if not path.exists():
        return []
    with storage_errors(path, "read"), np.load(path, allow_pickle=False) as content:
        about = json.loads(str(content[_ABOUT]))
        if about["sizes"] != json.loads(json.dumps(dict(sizes))):
            return []
        return [
            BufferedStep(
                entry["step"],
                tuple(entry["prompts"]),
                TrajectoryBatch.from_arrays(
                    {
                        name.removeprefix(f"{number}/"): content[name]
                        for name in content.files
                        if name.startswith(f"{number}/")
                    }
                ),
                None if entry["samples"] is None else tuple(entry["samples"]),
            )
            for number, entry in enumerate(about["steps"])
        ]


def _about(one: BufferedStep) -> dict[str, Any]:
    samples = None if one.samples is None else list(one.samples)
    return {"step": one.step, "prompts": list(one.prompt_ids), "samples": samples}
