"""Rules about one role: its engine, its head, its devices, and whether its share of a batch fits.

Invariant: every problem names the key, its value and the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from rlhf_ray.config.facts import Role
from rlhf_ray.config.problems import Problem, Rule
from rlhf_ray.config.sections.run import RunConfig

RoleRule = Callable[[str, Role], Iterable[Problem]]
"""A rule about the role at a key."""


def role_rules(roles: Mapping[str, Role], *further: RoleRule) -> list[Rule]:
    """Every rule of this module about each of ``roles``, and ``further`` ones."""
    return [
        partial(rule, key, role) for key, role in roles.items() if not role.derived for rule in (*ROLE_RULES, *further)
    ]


def repeats_exactly(key: str, role: Role, run: RunConfig) -> Iterator[Problem]:
    """A deterministic run computes in fp32, with one thread, on CPU."""
    if not run.deterministic:
        return
    threads, gpus = role.config.resources.threads_per_rank, role.config.resources.gpus_per_rank
    if role.config.model.dtype != "fp32":
        yield f"{key}.model.dtype", f"{role.config.model.dtype}, but run.deterministic needs fp32: set one of them"
    if threads != 1:
        yield f"{key}.resources.threads_per_rank", f"{threads}, but run.deterministic needs 1: set one of them"
    if gpus > 0:
        yield f"{key}.resources.gpus_per_rank", f"{gpus:g}, but run.deterministic runs on CPU: set one of them"


def _has_an_optimizer_if_trained(key: str, role: Role) -> Iterator[Problem]:
    optimizer = role.config.engine.optimizer
    if role.trained and optimizer is None:
        yield f"{key}.engine.optimizer", f"missing: this job trains the {key}; set {key}.engine.optimizer.learning_rate"
    if not role.trained and optimizer is not None:
        yield f"{key}.engine.optimizer", f"this job does not train the {key}: remove it, or set it to null"


def _has_the_right_head(key: str, role: Role) -> Iterator[Problem]:
    model = role.config.model
    if role.head is True and model.make is not None and model.head_init is None:
        yield f"{key}.model.head_init", "null, but a made model has no score head: set it to inv_sqrt"
    if role.head is False and model.head_init is not None:
        yield f"{key}.model.head_init", f"{model.head_init}, but the {key} has no score head: remove it"
    if role.head is not False and model.head_dtype != "fp32":
        yield f"{key}.model.head_dtype", f"{model.head_dtype}, but the {key} gives no log-probs: remove it"


def _uses_one_device_per_rank(key: str, role: Role) -> Iterator[Problem]:
    gpus = role.config.resources.gpus_per_rank
    if gpus > 1:
        yield f"{key}.resources.gpus_per_rank", f"{gpus:g}, but a rank uses one GPU: set it to 1 and raise {key}.ranks"


def _quantizes_frozen_weights_only(key: str, role: Role) -> Iterator[Problem]:
    quantization = role.config.model.quantization
    if quantization is None:
        return
    if role.config.engine.zero == 3:
        yield f"{key}.model.quantization", f"{quantization} weights cannot be sharded: set {key}.engine.zero to 0 or 2"
    if role.config.engine.optimizer is not None and role.config.model.lora is None:
        yield f"{key}.model.quantization", f"{quantization} weights do not train: set {key}.model.lora.rank, such as 16"


def _runs_in_half_precision(key: str, role: Role) -> Iterator[Problem]:
    """DeepSpeed trains in fp16 only with ZeRO, and on GPUs."""
    config = role.config
    if config.model.dtype != "fp16":
        return
    if config.engine.optimizer is not None and config.engine.zero == 0:
        yield (
            f"{key}.model.dtype",
            f"fp16 at {key}.engine.zero 0 does not scale the loss in DeepSpeed: set that to 1, 2 or 3, or dtype to bf16",
        )
    elif config.engine.zero > 0 and config.resources.gpus_per_rank == 0:
        yield (
            f"{key}.model.dtype",
            f"DeepSpeed has no fp16 on CPU, and {key}.resources.gpus_per_rank is 0: set that to 1, or dtype to bf16",
        )


def _every_rank_has_an_item(key: str, role: Role) -> Iterator[Problem]:
    if role.work is None:
        return
    items, ranks = role.work.items(), role.config.ranks
    if ranks > items.value:
        yield (
            f"{key}.ranks",
            f"{ranks} ranks cannot share {items.value} ({items.origin}): lower the one or raise the other",
        )


def _longest_item_fits(key: str, role: Role) -> Iterator[Problem]:
    if role.work is None:
        return
    batch, longest, config = role.work.budget(), role.work.longest(), role.config
    room = config.training_tokens(batch) if role.trained else config.forward_tokens(batch)
    if longest.value > room:
        section = key if config.max_tokens_per_micro_batch is not None else "batch"
        # without gradients a micro-batch holds forward_factor times what the key says
        least = longest.value if role.trained else -(-longest.value // batch.forward_factor)
        name = f"{section}.max_tokens_per_micro_batch"
        yield (
            name,
            f"a micro-batch of the {key} holds {room} tokens, but the longest is {longest.value} ({longest.origin}): "
            f"raise {name} to {least}",
        )


ROLE_RULES: tuple[RoleRule, ...] = (
    _has_an_optimizer_if_trained,
    _has_the_right_head,
    _uses_one_device_per_rank,
    _quantizes_frozen_weights_only,
    _runs_in_half_precision,
    _every_rank_has_an_item,
    _longest_item_fits,
)
