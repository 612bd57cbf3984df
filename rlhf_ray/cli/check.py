"""The command ``rlhf-ray check``: validate a config, print it resolved, and say how its first rows and answers will be read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_ray.cli.examples import examples
from rlhf_ray.console import get_logger, write_result
from rlhf_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rlhf_ray.config.sections.models import ModelConfig

FIRST_ROWS = 200
"""So many rows of each file are read as the job will read them."""

EXAMPLES = (
    "check demo-sft",
    "check my-ppo.yaml data.path=prompts.jsonl > resolved.yaml",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "check",
        help="validate a config and print it resolved; all errors at once",
        **examples(*EXAMPLES, with_recipes=True),
    )
    command.add_argument("config", help="a file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for example run.seed=1")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the resolved config on standard output; returns the exit code."""
    from rlhf_ray.config.loading import dump_config, load_config
    from rlhf_ray.config.preflight import hub_names
    from rlhf_ray.planning.object_store import advice

    config = load_config(options.config, options.overrides, files=True)
    for sentence in advice(config):
        get_logger("check").warning("%s", sentence)
    _show_placement(config)
    unseen = [f"{key} {name}" for key, name in hub_names(config)]
    if not unseen:
        preview(config)
    write_result(dump_config(config))
    if unseen:
        sys.stderr.write(f"rlhf-ray: not looked at, since only a hub has it: {', '.join(unseen)}\n")
    return 0


def _show_placement(config: Any) -> None:
    """Log on which node each rank goes, where the job would start Ray on this machine."""
    from rlhf_ray.planning.capacity import needed
    from rlhf_ray.planning.placement import node_here, show

    here = node_here(config.cluster)
    for text in show(needed(config), [] if here is None else [here]):
        get_logger("check").info("%s", text)


def preview(config: Any) -> None:
    """Encode the first rows of each file as the job will, which says what is left out, and log what ends an answer of PPO.

    For jobs whose models and rows are all on this machine. Nothing where the tokenizer is still to be made of rows. Raises
    :class:`ConfigError` where a model reads the policy's ids with another tokenizer.
    """
    name = {"ppo": "policy", "sft": "policy", "distill": "policy", "dpo": "policy", "rm": "reward"}.get(config.kind)
    if name is None or (config.kind != "ppo" and not config.data.files):
        return
    model: ModelConfig = getattr(config, name).model
    if _is_made_of_rows(model):
        return
    from rlhf_ray.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    if config.kind == "ppo":
        _compare_tokenizers(config, tokenizer)
    prompts = _read_first_rows(config, tokenizer) if config.data.files else []
    if config.kind == "ppo":
        from rlhf_ray.data.chat import ChatFormat
        from rlhf_ray.models import load_end_tokens

        talks = any(prompt.messages is not None for prompt in prompts)
        chat = ChatFormat(tokenizer, config.data.template_variables)
        load_end_tokens(model, chat, config.rollout.stop_tokens, conversations=talks).log("check")


def _is_made_of_rows(model: ModelConfig) -> bool:
    return model.make is not None and model.make.tokenizer_from != "world"


def _compare_tokenizers(config: Any, tokenizer: Any) -> None:
    """Refuse a critic or reference with another tokenizer than the policy's, made or not."""
    from rlhf_ray.config.files.tokenizers import different_tokenizer
    from rlhf_ray.data.tokenizers import fingerprint
    from rlhf_ray.models import load_tokenizer

    policy, own = config.policy.model, fingerprint(tokenizer)
    models = {key: role.model for key in ("critic", "reference") if (role := getattr(config, key)) is not None}
    others = {key: model for key, model in models.items() if model.path != policy.path or model.make != policy.make}
    problems = [
        f"{key}.model: {different_tokenizer(key, model, policy)}"
        for key, model in others.items()
        if not _is_made_of_rows(model) and fingerprint(load_tokenizer(model)) != own
    ]
    if problems:
        raise ConfigError(problems)


def _read_first_rows(config: Any, tokenizer: Any) -> Sequence[Any]:
    """The first rows of each file, encoded; what a loader says against them is a warning, since others follow."""
    from rlhf_ray.data.load import load_demonstrations, load_judged, load_pairs, load_prompts

    most = min(config.data.max_rows or FIRST_ROWS, FIRST_ROWS)
    alone = {"cache": None, "evaluation_fraction": None, "evaluation_path": None, "evaluation_split": None}
    data = config.data.model_copy(update={"max_rows": most, **alone})
    logger, seed = get_logger("check"), config.run.seed
    logger.info("the first %d rows of each file, as the job will read them:", most)
    try:
        if config.kind in ("sft", "distill"):
            return load_demonstrations(data, tokenizer, seed).train
        if config.kind == "dpo" and not config.loss.reads_pairs:
            return load_judged(data, tokenizer, seed).train
        if config.kind in ("rm", "dpo"):
            return load_pairs(data, tokenizer, seed, graded=config.loss.name == "ordinal").train
        return load_prompts(data, tokenizer, seed, config.row_reader).train
    except DataError as error:
        logger.warning("%s", error)
        return []
