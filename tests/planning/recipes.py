"""The published models that the recipes name, as their config.json describes them; run, it writes the recipes' notes anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlhf_ray.config.files.score_heads import Shape
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.models.description import shapes_on_meta
from rlhf_ray.planning.notes import TITLE, recipe_note

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = Path(__file__).parent / "published"
MODELS = {
    "Qwen/Qwen3-0.6B": "Qwen3-0.6B",
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": "Qwen3-0.6B",
    "Qwen/Qwen3-8B": "Qwen3-8B",
    "OpenRLHF/Llama-3-8b-sft-mixture": "Llama-3-8B",
    "OpenRLHF/Llama-3-8b-rm-mixture": "Llama-3-8B",
    "meta-llama/Meta-Llama-3-8B-Instruct": "Llama-3-8B",
    "meta-llama/Meta-Llama-3-70B-Instruct": "Llama-3-70B",
}
"""What is in ``published`` of each; those with a score head have the shapes of the language model that they came from."""
ON_GPUS = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if "gpus_per_rank" in path.read_text()]


def published_files(model: ModelConfig) -> tuple[ModelConfig, Mapping[str, Shape]]:
    """The files of a published model: its config, and the shapes of its weights."""
    assert model.path is not None
    directory = str(PUBLISHED / MODELS[model.path])
    return model.model_copy(update={"path": directory}), shapes_on_meta(directory)


def note_of(recipe: str) -> list[str]:
    """The note as its function writes it."""
    return recipe_note(load_config(recipe), published_files)


def written_note(recipe: str) -> list[str]:
    """The note that the file holds."""
    comment = [line for line in (CONFIGS / f"{recipe}.yaml").read_text().splitlines() if line.startswith("#")]
    return comment[comment.index(TITLE) :] if TITLE in comment else []


def main() -> None:
    """Write every note anew, at the end of the comment above ``kind``."""
    for recipe in ON_GPUS:
        path = CONFIGS / f"{recipe}.yaml"
        head, key, rest = path.read_text().partition("kind:")
        kept = head.splitlines()
        kept = kept[: kept.index(TITLE)] if TITLE in kept else kept
        path.write_text("\n".join([*kept, *note_of(recipe), key]) + rest)


if __name__ == "__main__":
    main()
