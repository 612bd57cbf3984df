"""Rules between the ``rollout`` section and what it samples for.

Invariant: every problem names the key, its value and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_ray.config.facts import Amount
from rlhf_ray.config.problems import Problem
from rlhf_ray.config.sections.algorithm import AlgorithmConfig, ShapingConfig
from rlhf_ray.config.sections.rewards import FROM_ENVIRONMENT, RewardConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.config.sections.run import RunConfig


def rollout_repeats_exactly(rollout: RolloutConfig, run: RunConfig) -> Iterator[Problem]:
    """A deterministic run samples in fp32, and without the prefix cache, by which vLLM on a GPU tells experts."""
    if run.deterministic and rollout.dtype != "fp32":
        yield "rollout.dtype", f"{rollout.dtype}, but run.deterministic needs fp32: set one of them"
    if (
        run.deterministic
        and rollout.routing_replay
        and rollout.backend == "vllm"
        and rollout.resources.gpus_per_rank > 0
    ):
        yield (
            "rollout.routing_replay",
            "true, but on a GPU vLLM returns experts only with its prefix cache, which run.deterministic turns off: set one of "
            "them to false",
        )


def longest_sequence_fits(rollout: RolloutConfig, longest: Amount) -> Iterator[Problem]:
    """An engine holds the longest prompt with the longest answer."""
    room = rollout.max_model_tokens
    if longest.value > room:
        yield (
            "rollout.max_model_tokens",
            f"{room} is below {longest.value} ({longest.origin}): raise it to {longest.value}",
        )


def environment_gives_the_rewards(rollout: RolloutConfig, reward: RewardConfig) -> Iterator[Problem]:
    """With an environment the rewards are its own, and without one there are none of it."""
    functions = {f"{key}.function": source.function for key, source in reward.sources.items()}
    named = [key for key, function in functions.items() if function == FROM_ENVIRONMENT]
    if rollout.environment is not None and not named:
        yield (
            "rollout.environment",
            f"an environment gives the rewards itself: set reward to {{function: {FROM_ENVIRONMENT}}}, or environment to null",
        )
    if rollout.environment is not None and rollout.mode == "windowed":
        yield (
            "rollout.mode",
            "windowed streams single answers and plays no episodes of several turns: set it to sync or one_step_off",
        )
    for key in named:
        if rollout.environment is None or key != "reward.function":
            yield (
                key,
                f"{FROM_ENVIRONMENT} stands for the rewards of rollout.environment, "
                + ("which is null: set it" if rollout.environment is None else "which cannot be a term of a mixture"),
            )


def lengths_are_of_one_answer(rollout: RolloutConfig, shaping: ShapingConfig) -> Iterator[Problem]:
    """A penalty on the length of one answer does not add up the answers of an episode."""
    if rollout.environment is None:
        return
    way_out = "null and have the environment (rollout.environment) judge lengths, or set environment to null"
    if shaping.overlong is not None:
        yield (
            "algorithm.shaping.overlong",
            "it would compare the tokens of all turns of an episode with rollout.max_new_tokens, the limit of one: set it to "
            + way_out,
        )
    if shaping.too_short is not None:
        yield (
            "algorithm.shaping.too_short",
            f"it would compare the tokens of all turns of an episode with {shaping.too_short.tokens}, the least of one answer: "
            f"set it to {way_out}",
        )


def every_engine_has_a_prompt(rollout: RolloutConfig, prompts_per_step: int) -> Iterator[Problem]:
    """No engine stands idle for a whole step."""
    if rollout.engines > prompts_per_step:
        yield (
            "rollout.engines",
            f"{rollout.engines} engines cannot share {prompts_per_step} prompts (batch.prompts_per_step): lower it",
        )


def mode_keeps_to_the_bound(rollout: RolloutConfig, algorithm: AlgorithmConfig) -> Iterator[Problem]:
    """A bound on staleness allows what the mode does at every step."""
    bound = algorithm.max_staleness
    if bound is not None and bound < rollout.staleness:
        yield (
            "algorithm.max_staleness",
            f"{bound}, but rollout.mode {rollout.mode} trains on answers {rollout.staleness} publication(s) old: raise "
            f"it to {rollout.staleness}, remove it, or set rollout.mode to sync",
        )


def window_collects_by_itself(rollout: RolloutConfig, algorithm: AlgorithmConfig, run: RunConfig) -> Iterator[Problem]:
    """A window takes prompts in slices, when it has room: no collector chooses among them, and time counts."""
    if rollout.mode != "windowed":
        return
    if run.deterministic:
        yield (
            "rollout.mode",
            "windowed, but which weights sample an answer is then a matter of time, and run.deterministic is true: set it to "
            "one_step_off, or run.deterministic to false",
        )
    if algorithm.dynamic_sampling:
        yield (
            "algorithm.dynamic_sampling",
            f"{algorithm.dynamic_sampling}, but rollout.mode windowed replaces no prompts: set it to 0, or rollout.mode to "
            "one_step_off",
        )
    if algorithm.collector is not None:
        yield (
            "algorithm.collector",
            f"{algorithm.collector}, but rollout.mode windowed collects by itself: remove it, or set rollout.mode to "
            "one_step_off",
        )


def engine_has_its_devices(rollout: RolloutConfig) -> Iterator[Problem]:
    """An engine takes one GPU for each of its tensor-parallel workers; on CPU, one core."""
    gpus, parallel = rollout.resources.gpus_per_rank, rollout.tensor_parallel
    cpus = rollout.resources.cpus_per_rank
    if gpus == 0 and parallel > 1 and cpus < parallel:
        yield (
            "rollout.resources.cpus_per_rank",
            f"{cpus:g}, but rollout.tensor_parallel is {parallel} and an engine on CPU takes one core each: set the same "
            f"number, or rollout.resources.gpus_per_rank to {parallel}",
        )
    elif gpus > parallel or (parallel > 1 and gpus not in (0, parallel)):
        yield (
            "rollout.resources.gpus_per_rank",
            f"{gpus:g}, but rollout.tensor_parallel is {parallel}: an engine takes one GPU each; set the same number",
        )


def engine_keeps_to_its_share(rollout: RolloutConfig, *, colocate: bool) -> Iterator[Problem]:
    """An engine that has a part of a GPU, and does not sleep, takes no more of its memory: the rest is the other roles'."""
    gpus, memory = rollout.resources.gpus_per_rank, rollout.gpu_memory_utilization
    if rollout.backend == "vllm" and not (rollout.sleep or colocate) and 0 < gpus < 1 and memory > gpus:
        yield (
            "rollout.gpu_memory_utilization",
            f"{memory:g} of a GPU's memory, but rollout.resources.gpus_per_rank is {gpus:g} and other roles share that GPU: "
            f"lower it to {gpus:g}, or set rollout.sleep",
        )
