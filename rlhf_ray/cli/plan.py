"""The command ``rlhf-ray plan``: print the batch arithmetic, the placement and the memory of a job."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.cli.examples import examples
from rlhf_ray.console import get_logger, write_result

if TYPE_CHECKING:
    from rlhf_ray.config.files.score_heads import Shape
    from rlhf_ray.config.sections.models import ModelConfig
    from rlhf_ray.config.sections.run import ClusterConfig
    from rlhf_ray.planning.placement import Node

EXAMPLES = (
    "plan llama-3-8b-8gpu",
    "plan my-ppo.yaml policy.ranks=8 --gpu-gb 80",
    "plan llama-3-70b-4nodes --nodes 4x80x8",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "plan",
        help="batch arithmetic, placement and memory, before anything is allocated",
        **examples(*EXAMPLES, with_recipes=True),
    )
    command.add_argument("config", help="a file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for example run.seed=1")
    command.add_argument(
        "--gpu-gb",
        type=positive,
        metavar="GB",
        help="memory of each GPU, to see whether the job fits; by default that of those here",
    )
    command.add_argument(
        "--nodes",
        type=shape,
        metavar="COUNTxCPUSxGPUS",
        help="show on which node each rank goes, on so many nodes such as 4x64x8, which are taken to have every label",
    )
    command.set_defaults(run=run)


def positive(text: str) -> float:
    """A number of gigabytes above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a size above 0 in GB, such as 80")
    return value


def shape(text: str) -> tuple[int, int, int]:
    """The number of nodes, and the CPUs and GPUs of each."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts) or 0 in (int(parts[0]), int(parts[1])):
        raise argparse.ArgumentTypeError(f"{text} is not nodes x CPUs x GPUs, such as 4x64x8")
    return int(parts[0]), int(parts[1]), int(parts[2])


def nodes_of(given: tuple[int, int, int] | None, cluster: ClusterConfig) -> list[Node]:
    """The nodes of that shape; without one this machine, where Ray would be started on it, else none."""
    from rlhf_ray.planning.placement import Node, node_here

    if given is None:
        here = node_here(cluster)
        return [] if here is None else [here]
    count, cpus, gpus = given
    return [Node(f"node {number}", cpus, gpus, labels=None) for number in range(1, count + 1)]


def run(options: argparse.Namespace) -> int:
    """Print the sizes of the job and what the cluster must hold; returns the exit code.

    Raises :class:`CapacityError` after that where a rank does not fit its share of a GPU whose size is known.
    """
    from rlhf_ray.config.loading import load_config
    from rlhf_ray.network import cluster_address
    from rlhf_ray.planning.arithmetic import batch_table
    from rlhf_ray.planning.capacity import capacity_table, needed
    from rlhf_ray.planning.colocation.memory import colocated_gpu_needed, phases_table, requirement
    from rlhf_ray.planning.gpus import gpu_bytes
    from rlhf_ray.planning.job_memory import job_memory, memory_table
    from rlhf_ray.planning.object_store import advice, store_bytes
    from rlhf_ray.planning.placement import show
    from rlhf_ray.planning.staleness import staleness_table

    config = load_config(options.config, options.overrides)
    memory, by_turns = job_memory(config, files_here), config.cluster.colocate
    tables = (
        batch_table(config), capacity_table(needed(config)), *show(needed(config), nodes_of(options.nodes, config.cluster)),
        memory_table(memory, store_bytes(config, files_here), colocated_gpu_needed(config, memory) if by_turns else None),
        *([phases_table(config, memory)] if by_turns else []),
    )  # fmt: skip
    ages = staleness_table(config, files_here)
    write_result("\n\n".join((*tables, *([] if ages is None else [ages]))) + "\n")
    for sentence in advice(config, files_here):
        get_logger("plan").warning("%s", sentence)
    starts_here = cluster_address(config.cluster.address) is None
    size = options.gpu_gb * 1e9 if options.gpu_gb is not None else gpu_bytes() if starts_here else None
    if size is not None:
        requirement(config, memory)(size)
    return 0


def files_here(model: ModelConfig) -> tuple[ModelConfig, Mapping[str, Shape]]:
    """Where a model's files are, and the shapes of its weights, of a language model where only its config is here."""
    from rlhf_ray.planning.job_memory import weights_here

    found, shapes = weights_here(model)
    if shapes or found.path is None or not (Path(found.path) / "config.json").is_file():
        return found, shapes
    from rlhf_ray.models.description import shapes_on_meta  # slow, and few plans need it

    return found, shapes_on_meta(found.path, found.trust_remote_code)
