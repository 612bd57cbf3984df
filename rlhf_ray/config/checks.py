"""What the sections of a job may not be together.

Always true: every problem names the key, its value and the way out; a rule reads values and nothing else, so that a
config can be checked where its files are not. What one section alone may not hold stands in its ``conflicts``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from rlhf_ray.config.algorithm_checks import ALGORITHM_RULES
from rlhf_ray.config.schema import (
    PpoConfig,
    RewardModelConfig,
    RoleConfig,
    RunConfig,
    Section,
    ServeConfig,
    ServiceConfig,
    SftConfig,
    TokenBudget,
)
from rlhf_ray.config.validation import Problem, attempt

LOOPBACK = ("127.0.0.1", "localhost", "::1")

Rule = Callable[[], Iterable[Problem]]
RoleRule = Callable[[str, RoleConfig], Iterable[Problem]]


def check(config: Section, *, partial: bool = False) -> list[Problem]:
    """Every problem between the sections of a job; of a partial one, as far as its values go."""
    if isinstance(config, SftConfig):
        rules = _sft_rules(config)
    elif isinstance(config, RewardModelConfig):
        rules = _reward_model_rules(config)
    elif isinstance(config, PpoConfig):
        rules = _ppo_rules(config)
    elif isinstance(config, ServeConfig):
        rules = _serve_rules(config)
    else:
        raise TypeError(f"{type(config).__name__} is not a job")
    return attempt(rules, partial=partial)


def _on(key: str, role: Callable[[], RoleConfig | None], *rules: RoleRule) -> list[Rule]:
    """``rules`` about the role at ``key``; none of them applies where the job has no such role."""

    def applied(rule: RoleRule) -> Iterator[Problem]:
        found = role()
        if found is not None:
            yield from rule(key, found)

    return [lambda rule=rule: applied(rule) for rule in rules]  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------------- jobs


def _sft_rules(config: SftConfig) -> list[Rule]:
    def fits(key: str, role: RoleConfig) -> Iterator[Problem]:
        tokens = config.data.max_tokens
        return _fits(key, role, config.batch, tokens, f"data.max_tokens {tokens}")

    size = "batch.sequences_per_update", lambda: config.batch.sequences_per_update
    rules = (_is_trained, _has_no_head, *_ANY, _repeats(lambda: config.run), _shares(*size), fits)
    return [*_on("policy", lambda: config.policy, *rules), lambda: _has_no_pairs(config)]


def _reward_model_rules(config: RewardModelConfig) -> list[Rule]:
    def fits(key: str, role: RoleConfig) -> Iterator[Problem]:
        tokens = 2 * config.data.max_tokens
        return _fits(key, role, config.batch, tokens, f"the two sides of a pair, data.max_tokens {tokens // 2} each")

    size = "batch.pairs_per_update", lambda: config.batch.pairs_per_update
    rules = (_is_trained, _made_has_head, *_ANY, _repeats(lambda: config.run), _shares(*size), fits)
    between = (_sums_have_no_pairs, _says_what_is_held_out, _saves_what_is_there, _normalizes_over_what_is_there)
    return [*_on("reward", lambda: config.reward, *rules), *(lambda rule=rule: rule(config) for rule in between)]


def _sums_have_no_pairs(config: RewardModelConfig) -> Iterator[Problem]:
    if config.data.world is not None and config.data.world.task == "arithmetic":
        yield "data.world.task", "arithmetic has no preference pairs, since a function verifies it: set it to customers"


def _ppo_rules(config: PpoConfig) -> list[Rule]:
    def fits(key: str, role: RoleConfig) -> Iterator[Problem]:
        return _fits(
            key, role, config.batch, _longest(config), _why_longest(config), forward=key not in ("policy", "critic")
        )

    update = "batch.sequences_per_update", lambda: config.batch.sequences_per_update
    step = "batch.prompts_per_step x samples_per_prompt", lambda: config.batch.sequences_per_step
    every = (*_ANY, _repeats(lambda: config.run), fits)
    trained = (_is_trained, _shares(*update), *every)
    forward = (_is_not_trained, _shares(*step), *every)
    between = (
        _rollout_repeats, _rollout_fits, _sampling_is_plain, _every_engine_works, _engine_devices,
        _world_has_enough, _gold_knows_the_prompts, _has_no_pairs, _exposed, *ALGORITHM_RULES,
    )  # fmt: skip
    return [
        *_on("policy", lambda: config.policy, *trained, _has_no_head),
        *_on("critic", lambda: config.critic, *trained, _made_has_head),
        *_on("reference", lambda: config.reference, *forward, _has_no_head),
        *_rewards(config, *forward, _made_has_head),
        *(lambda rule=rule: rule(config) for rule in between),
    ]


def _rewards(config: PpoConfig, *rules: RoleRule) -> list[Rule]:
    """``rules`` about every reward model."""

    def applied(rule: RoleRule) -> Iterator[Problem]:
        for key, role in config.reward.roles.items():
            yield from rule(key, role)

    return [lambda rule=rule: applied(rule) for rule in rules]  # type: ignore[misc]


def _serve_rules(config: ServeConfig) -> list[Rule]:
    return [
        *_on("reward", lambda: config.reward, _is_not_trained, *_ANY),
        lambda: _further_models(config),
        lambda: _named_once(config),
        lambda: _closed_by_default(config),
        lambda: _requests_fit(config),
    ]


def _has_no_pairs(config: SftConfig | PpoConfig) -> Iterator[Problem]:
    """Keys that only preference pairs have."""
    if config.data.too_long != "drop":
        yield (
            "data.too_long",
            f"{config.data.too_long} is for preference pairs: this job's rows are dropped or whole; remove it",
        )
    if config.data.apply_chat_template:
        text = "is for preference pairs: write this job's prompts as the template would, and remove it"
        yield "data.apply_chat_template", text


def _says_what_is_held_out(config: RewardModelConfig) -> Iterator[Problem]:
    data = config.data
    if data.world is None and data.evaluation_file is None and data.evaluation_fraction is None:
        yield (
            "data.evaluation_fraction",
            "missing: say which share of the pairs is held out to evaluate on, such as 0.05, or 0 for none; or name held-out "
            "pairs in data.evaluation_path, or a split of them in data.evaluation_split",
        )


def _saves_what_is_there(config: RewardModelConfig) -> Iterator[Problem]:
    model = config.reward.model
    if config.save == "adapter" and (model.lora is None or model.path is None):
        lacks = "reward.model.lora is null: there is no adapter" if model.lora is None else "a made model lies nowhere"
        yield "save", f"adapter leaves the base where it lies, but {lacks}; set it to merged"


def _normalizes_over_what_is_there(config: RewardModelConfig) -> Iterator[Problem]:
    data, normalization = config.data, config.normalization
    if normalization.over == "demonstrations" and normalization.demonstrations_path is None and data.world is None:
        yield "normalization.demonstrations_path", "missing: name a file whose rows have a prompt and an answer"


# --------------------------------------------------------------------------------------------------------------- roles


def _is_trained(key: str, role: RoleConfig) -> Iterator[Problem]:
    if role.engine.optimizer is None:
        yield f"{key}.engine.optimizer", f"missing: this job trains the {key}; set {key}.engine.optimizer.learning_rate"


def _is_not_trained(key: str, role: RoleConfig) -> Iterator[Problem]:
    if role.engine.optimizer is not None:
        yield f"{key}.engine.optimizer", f"this job does not train the {key}: remove it, or set it to null"


def _made_has_head(key: str, role: RoleConfig) -> Iterator[Problem]:
    if role.model.make is not None and role.model.head_init is None:
        yield f"{key}.model.head_init", "null, but a made model has no score head: set it to inv_sqrt"


def _has_no_head(key: str, role: RoleConfig) -> Iterator[Problem]:
    if role.model.head_init is not None:
        yield f"{key}.model.head_init", f"{role.model.head_init}, but the {key} has no score head: remove it"


def _one_device_a_rank(key: str, role: RoleConfig) -> Iterator[Problem]:
    gpus = role.resources.gpus_per_rank
    if gpus > 1:
        yield f"{key}.resources.gpus_per_rank", f"{gpus:g}, but a rank uses one GPU: set it to 1 and raise {key}.ranks"


def _quantizes_what_stays(key: str, role: RoleConfig) -> Iterator[Problem]:
    quantization = role.model.quantization
    if quantization is None:
        return
    if role.engine.zero == 3:
        yield f"{key}.model.quantization", f"{quantization} weights cannot be sharded: set {key}.engine.zero to 0 or 2"
    if role.engine.optimizer is not None and role.model.lora is None:
        yield f"{key}.model.quantization", f"{quantization} weights do not train: set {key}.model.lora.rank, such as 16"


_ANY = (_one_device_a_rank, _quantizes_what_stays)


def _repeats(run: Callable[[], RunConfig]) -> RoleRule:
    """A deterministic run computes in fp32, with one thread, on CPU."""

    def rule(key: str, role: RoleConfig) -> Iterator[Problem]:
        if not run().deterministic:
            return
        threads, gpus = role.resources.threads_per_rank, role.resources.gpus_per_rank
        if role.model.dtype != "fp32":
            yield f"{key}.model.dtype", f"{role.model.dtype}, but run.deterministic needs fp32: set one of them"
        if threads != 1:
            yield f"{key}.resources.threads_per_rank", f"{threads}, but run.deterministic needs 1: set one of them"
        if gpus > 0:
            yield f"{key}.resources.gpus_per_rank", f"{gpus:g}, but run.deterministic runs on CPU: set one of them"

    return rule


def _shares(size_key: str, size: Callable[[], int]) -> RoleRule:
    """Every rank gets a sequence of each batch that the role works on."""

    def rule(key: str, role: RoleConfig) -> Iterator[Problem]:
        if role.ranks > size():
            text = f"{role.ranks} ranks cannot share {size()} ({size_key}): lower the one or raise the other"
            yield f"{key}.ranks", text

    return rule


def _fits(
    key: str, role: RoleConfig, batch: TokenBudget, tokens: int, why: str, *, forward: bool = False
) -> Iterator[Problem]:
    """The longest thing that must stay together fits into one micro-batch."""
    room = role.forward_tokens(batch) if forward else role.training_tokens(batch)
    if tokens > room:
        section = key if role.max_tokens_per_micro_batch is not None else "batch"
        least = -(-tokens // batch.forward_factor) if forward else tokens
        name = f"{section}.max_tokens_per_micro_batch"
        text = f"a micro-batch of the {key} holds {room} tokens, but the longest is {tokens} ({why})"
        yield name, f"{text}: raise {name} to {least}"


# ----------------------------------------------------------------------------------------------------------------- ppo


def _rollout_repeats(config: PpoConfig) -> Iterator[Problem]:
    if config.run.deterministic and config.rollout.dtype != "fp32":
        yield "rollout.dtype", f"{config.rollout.dtype}, but run.deterministic needs fp32: set one of them"


def _longest(config: PpoConfig) -> int:
    return config.data.max_prompt_tokens + config.rollout.max_new_tokens


def _why_longest(config: PpoConfig) -> str:
    prompt, answer = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    return f"data.max_prompt_tokens {prompt} + rollout.max_new_tokens {answer}"


def _rollout_fits(config: PpoConfig) -> Iterator[Problem]:
    room, longest = config.rollout.max_model_tokens, _longest(config)
    if longest > room:
        yield "rollout.max_model_tokens", f"{room} is below {longest} ({_why_longest(config)}): raise it to {longest}"


def _sampling_is_plain(config: PpoConfig) -> Iterator[Problem]:
    rollout = config.rollout
    for name, value, plain in (
        ("top_p", rollout.top_p, 1.0),
        ("top_k", rollout.top_k, 0),
        ("min_p", rollout.min_p, 0.0),
    ):
        if value != plain:
            yield (
                f"rollout.{name}",
                f"{value:g} is refused for training: the sampler would renormalise its probabilities and the trainer "
                f"would not; set it to {plain:g} and use rollout.temperature",
            )


def _every_engine_works(config: PpoConfig) -> Iterator[Problem]:
    engines, prompts = config.rollout.engines, config.batch.prompts_per_step
    if engines > prompts:
        yield "rollout.engines", f"{engines} engines cannot share {prompts} prompts (batch.prompts_per_step): lower it"


def _engine_devices(config: PpoConfig) -> Iterator[Problem]:
    gpus, parallel = config.rollout.resources.gpus_per_rank, config.rollout.tensor_parallel
    if gpus > parallel or (parallel > 1 and gpus != parallel):
        yield (
            "rollout.resources.gpus_per_rank",
            f"{gpus:g}, but rollout.tensor_parallel is {parallel}: an engine takes one GPU each; set the same number",
        )


def _world_has_enough(config: PpoConfig) -> Iterator[Problem]:
    world = config.data.world
    if world is None:
        return
    if world.prompts < config.batch.prompts_per_step:
        needed = config.batch.prompts_per_step
        yield "data.world.prompts", f"{world.prompts} is below batch.prompts_per_step {needed}: raise it or lower that"
    if world.evaluation_prompts < config.evaluation.prompts:
        needed = config.evaluation.prompts
        yield (
            "data.world.evaluation_prompts",
            f"{world.evaluation_prompts} is below evaluation.prompts {needed}: raise it or lower that",
        )


def _gold_knows_the_prompts(config: PpoConfig) -> Iterator[Problem]:
    named = {f"{key}.function": source.function for key, source in config.reward.sources.items()}
    for key, name in (named | {"evaluation.gold": config.evaluation.gold}).items():
        if name == "world.gold" and (config.data.world is None or config.data.world.task != "customers"):
            yield key, "world.gold scores answers to the customers of the generated world: set data.world to {}"


# --------------------------------------------------------------------------------------------------------------- serve


def _exposed(config: PpoConfig) -> Iterator[Problem]:
    if config.expose is None:
        return
    if not config.reward.roles:
        yield "expose", "there is no reward model in this job whose scores it could answer: remove it"
    for key, problem in _closed_by_default(config.expose):
        yield f"expose.{key}", problem


def _closed_by_default(config: ServiceConfig) -> Iterator[Problem]:
    if config.host not in LOOPBACK and config.token_file is None:
        yield (
            "host",
            f"{config.host} is open to others: set token_file to a file that holds a token, or host to 127.0.0.1",
        )


def _further_models(config: ServeConfig) -> Iterator[Problem]:
    for name, role in config.models.items():
        for rule in (_is_not_trained, *_ANY):
            yield from rule(f"models.{name}", role)


def _named_once(config: ServeConfig) -> Iterator[Problem]:
    if config.name in config.models:
        yield "name", f"{config.name} is also one of models: give the first model another name"


def _requests_fit(config: ServeConfig) -> Iterator[Problem]:
    if config.max_tokens > config.max_batch_tokens:
        yield (
            "max_batch_tokens",
            f"{config.max_batch_tokens} does not hold one item of max_tokens {config.max_tokens}: raise it to that",
        )
