"""What the checkpoints of a job weigh: the weights that train, and what the optimizer keeps of each of their numbers.

Invariant: sizes follow from shapes alone, those in the headers of files or those of a made model; no tensor is read. They are
within a tenth of what is written. What is not known before the model is here says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from rlhf_ray.config.facts import Role, Size
from rlhf_ray.config.files.score_heads import Shape, read_shapes
from rlhf_ray.config.jobs.base import Job, TrainingJob
from rlhf_ray.config.sections.models import MADE_SHAPES, LoraConfig, MakeConfig, ModelConfig
from rlhf_ray.config.sections.run import LEAST_KEPT
from rlhf_ray.world import language

MOMENTS, MASTER = 8, 4
"""Bytes that AdamW keeps of a number: its two moments, and a copy of it in fp32."""
SPECIAL_TOKENS = 3
OUTPUT = ("lm_head.weight", "embed_out.weight")
"""Output layers, which a reward model or critic does not have and no adapter is put on."""
EMBEDDINGS = ("embed", "wte", "wpe")
VISION = ("visual.", "vision_")


def checkpoint_sizes(config: Job) -> Iterator[Size]:
    """What each trained role weighs in a checkpoint, and all that are on disk at once; none for a job that does not train."""
    if not isinstance(config, TrainingJob):
        return
    weights: list[int | None] = []
    for name, role in config.roles().items():
        if not role.trained:
            continue
        numbers, each = trained_numbers(role), bytes_each(role)
        weights.append(None if numbers is None else numbers * each)
        frozen = "" if role.config.model.lora is None else ": adapters and heads, without the frozen base"
        yield Size(
            f"{name}: weight of a checkpoint",
            "not known yet" if numbers is None else f"about {in_bytes(numbers * each)}",
            f"{role.config.model.path} is not on this machine"
            if numbers is None
            else f"{numbers} numbers that train x {each} bytes of weight and optimizer{frozen}",
        )
    kept = max(config.checkpoint.keep, LEAST_KEPT)
    known = [weight for weight in weights if weight is not None]
    yield Size(
        "checkpoints on disk",
        f"about {in_bytes((kept + 1) * sum(known))}" if len(known) == len(weights) else "not known yet",
        f"{kept} that are kept (checkpoint.keep), and one that is being written",
    )


def bytes_each(role: Role) -> int:
    """Bytes that a checkpoint holds of each number that trains: the weight, and what the optimizer keeps of it."""
    return sum(_weight_and_optimizer(role))


def copied_bytes(role: Role, numbers: int) -> float:
    """Bytes that the first rank of a role, which writes the most, copies of ``numbers`` that train, to write them later."""
    weight, optimizer = _weight_and_optimizer(role)
    return numbers * (weight + optimizer / (role.config.ranks if role.config.engine.zero else 1))


def _weight_and_optimizer(role: Role) -> tuple[int, int]:
    engine, fp32 = role.config.engine, role.config.model.dtype == "fp32"
    weight = 0 if engine.zero == 3 else 4 if fp32 else 2  # under ZeRO-3 the copy in fp32 is the weight
    return weight, MOMENTS + (0 if fp32 and engine.zero == 0 else MASTER)


def trained_numbers(role: Role) -> int | None:
    """How many numbers of a role's model train; None where its files are not on this machine."""
    model = role.config.model
    shapes = shapes_of(model)
    if not shapes:
        return None
    if role.head:
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(OUTPUT)}
    adapter = {name: shape for name, shape in shapes.items() if ".lora_" in name}
    if adapter:
        return sum(map(prod, adapter.values()))
    if model.lora is not None:
        return sum(model.lora.rank * sum(shape) for shape in adapted(shapes, model.lora).values())
    return sum(map(prod, shapes.values()))


def shapes_of(model: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of a model's weights; empty where they are not known."""
    if model.make is not None:
        return made_shapes(model.make)
    files = sorted(Path(model.path or "").glob("*.safetensors"))
    return {name: shape for file in files for name, shape in read_shapes(file).items()}


def made_shapes(make: MakeConfig) -> dict[str, Shape]:
    """The weights of a made model; of one whose tokenizer is trained on text, those with the largest vocabulary."""
    sizes = MADE_SHAPES[make.shape]
    words = len(language.vocabulary()) + SPECIAL_TOKENS if make.tokenizer_from == "world" else make.vocabulary
    query, key = sizes.heads * sizes.head_dim, sizes.key_value_heads * sizes.head_dim
    layer: dict[str, Shape] = {
        "self_attn.q_proj": (query, sizes.hidden), "self_attn.k_proj": (key, sizes.hidden),
        "self_attn.v_proj": (key, sizes.hidden), "self_attn.o_proj": (sizes.hidden, query),
        "mlp.gate_proj": (sizes.intermediate, sizes.hidden), "mlp.up_proj": (sizes.intermediate, sizes.hidden),
        "mlp.down_proj": (sizes.hidden, sizes.intermediate), "input_layernorm": (sizes.hidden,),
        "post_attention_layernorm": (sizes.hidden,),
    }  # fmt: skip
    layers = {f"model.layers.{i}.{name}.weight": shape for i in range(sizes.layers) for name, shape in layer.items()}
    whole: dict[str, Shape] = {"model.embed_tokens.weight": (words, sizes.hidden), OUTPUT[0]: (words, sizes.hidden)}
    return whole | layers | {"model.norm.weight": (sizes.hidden,)}


def adapted(shapes: Mapping[str, Shape], lora: LoraConfig) -> dict[str, Shape]:
    """The weights that get an adapter, as far as their names tell: those of linear layers that text passes through."""
    linear = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and not name.endswith((*OUTPUT, "score.weight"))
    }
    linear = {name: shape for name, shape in linear.items() if not any(part in name for part in (*EMBEDDINGS, *VISION))}
    if lora.targets != "all-linear":
        targets = tuple(f".{target}" for target in lora.targets)
        return {name: shape for name, shape in linear.items() if f".{name}".endswith(targets)}
    mixture = any(".experts." in name for name in shapes)
    return {name: shape for name, shape in linear.items() if not mixture or "attn" in name or "attention" in name}


def in_bytes(count: int) -> str:
    """A number of bytes in the unit that people read."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
