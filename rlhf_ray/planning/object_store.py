"""How large Ray's object store must be, and what a user should know about memory before a job starts.

Invariants: what the policy publishes fits twice, since the last publication may still be read while the next one is written;
so do the changes beside it, where ``rollout.weight_delta`` has them published.
Advice refuses nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from rlhf_ray.config.facts import Role
from rlhf_ray.config.files.models import model_config_file
from rlhf_ray.config.files.positions import text_part
from rlhf_ray.config.files.sampled import EXPERTS, EXPERTS_OF_A_TOKEN, most
from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.rollout import DELTA_SHARE, RolloutConfig
from rlhf_ray.network import cluster_address
from rlhf_ray.planning.job_memory import GB, Files, published_size, role_size, weights_here
from rlhf_ray.planning.memory import BYTES

LEAST = 512 * 2**20
"""Bytes of the store of a job that publishes little."""
PUBLICATIONS = 2
TOKEN = 100
"""Bytes of a token in the columns of a trajectory, at most."""
WORD, BITS = 4, 32
"""Bytes and bits of a word of a kept set (``trajectories/kept_sets.py``)."""
BYTE_EXPERTS = 255
"""Most experts of a router whose numbers take a byte each."""
TIES = 8
"""Tokens that top-k keeps besides, because they tie with the last: seen in bf16 up to 6."""
SHARED_MEMORY = "/dev/shm"
STEP_OF_A_NUMBER = 2.2e-9
"""Seconds of one thread for the step of an offloaded optimizer, of each number: AdamW, clipping and rounding to bf16, measured
on a core with AVX-512."""
LONG_STEP_S = 1.0


def store_bytes(config: Job, files: Files = weights_here) -> int | None:
    """Bytes that the object store of every node must have; None where the size of the policy is not known."""
    published, size = 0, None
    sampling = config.sampling()
    if sampling is not None:
        size = published_size(sampling, files)
        if size is None:
            return None
        published = size.numbers * BYTES[sampling.role.config.model.dtype]
        if sampling.config.weight_delta:
            published += int(DELTA_SHARE * published)
    work = [role.work for role in config.roles().values() if role.work is not None]
    token = TOKEN
    if sampling is not None and size is not None:
        routed = routed_bytes(sampling.config, sampling.role.config.model, size.layers)
        token += kept_bytes(sampling.config, size.vocabulary) + routed
    batch = max((one.items().value * one.longest().value * token for one in work), default=0)
    return max(LEAST, PUBLICATIONS * (published + batch))


def kept_bytes(rollout: RolloutConfig, vocabulary: int) -> int:
    """Bytes of the set among which a token was sampled, at most: ``top_k`` ids and some that tie with the last, or a bitmap."""
    if not rollout.cuts:
        return 0
    bitmap = WORD * -(-vocabulary // BITS)
    return min(WORD * (rollout.top_k + TIES), bitmap) if rollout.top_k else bitmap


def routed_bytes(rollout: RolloutConfig, policy: ModelConfig, layers: int) -> int:
    """Bytes of a token in the column ``routed_experts``, at most: with a router in every layer."""
    if not rollout.routing_replay:
        return 0
    widths = text_part(model_config_file(policy))
    return layers * most(widths, EXPERTS_OF_A_TOKEN) * (1 if most(widths, EXPERTS) <= BYTE_EXPERTS else 2)


def store_to_start(config: Job, shared: int | None = None) -> int | None:
    """Bytes of the object store if Ray is started here and the config names none; None lets Ray take its own share of memory.

    Never more than ``shared``, the free bytes of shared memory (by default those here): Ray would put all of it on the disk,
    while it writes only what a smaller store cannot hold. Where that is less than a small store, as in a container with 64 MB,
    all of it may lie on the disk: Ray refuses a store below 75 MiB.
    """
    needed, free = store_bytes(config), shared_memory() if shared is None else shared
    return needed if needed is None or free is None else min(needed, max(LEAST, free * 9 // 10))


def shared_memory(path: str = SHARED_MEMORY) -> int | None:
    """Free bytes of shared memory on this machine, where Ray keeps its store; None where there is none."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def advice(config: Job, files: Files = weights_here, shared: int | None = None) -> Iterator[str]:
    """What would make the job slow or end it on the way: one sentence each, with the numbers and the way out.

    ``shared`` is how many bytes of shared memory are free, by default those here.
    """
    yield from _store_advice(config, files, shared_memory() if shared is None else shared)
    for name, role in config.roles().items():
        yield from _step_advice(name, role, files)


def _store_advice(config: Job, files: Files, shared: int | None) -> Iterator[str]:
    needed, given = store_bytes(config, files), config.cluster.object_store_mb
    if cluster_address(config.cluster.address) is not None:
        return
    if given is not None and needed is not None and given * 2**20 < needed:
        yield (
            f"cluster.object_store_mb is {given}, but weights and batches take {-(-needed // 2**20)}: Ray would write the rest "
            "to disk at every step. Set it to null, which sizes it from the model"
        )
    size = given * 2**20 if given is not None else needed
    if size is not None and shared is not None and size > shared:
        yield (
            f"the object store takes {size / GB:.1f} GB, but {SHARED_MEMORY} has {shared / GB:.1f} GB free: Ray would write "
            f"the rest to disk. Enlarge that to {-(-size // 2**30) + 1} GiB (a container: --shm-size; else mount -o remount)"
        )


def _step_advice(name: str, role: Role, files: Files) -> Iterator[str]:
    section = role.config
    size = role_size(role, files) if section.engine.offload != "none" and role.trained else None
    if size is None:
        return
    threads = section.resources.threads_per_rank
    seconds = size.trained / section.ranks * STEP_OF_A_NUMBER
    if seconds / threads > LONG_STEP_S and threads < 8:
        yield (
            f"{name}.resources.threads_per_rank is {threads}, and its optimizer runs on the CPU (engine.offload): about "
            f"{seconds / threads:.0f} s an update for {size.trained / section.ranks:.2g} numbers on each rank, with 8 threads "
            f"about {seconds / 8:.1f} s. Set it, and {name}.resources.cpus_per_rank, to 8"
        )
