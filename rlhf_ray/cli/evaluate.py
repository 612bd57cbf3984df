"""The command ``rlhf-ray evaluate``: compare a reward model with a file of preferences."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.cli.examples import examples

if TYPE_CHECKING:
    from rlhf_ray.rows.layouts import Keys
    from rlhf_ray.storage.output import OutputFile

EXAMPLES = (
    "evaluate runs/demo-rm/final --data pairs.jsonl --output figures.json",
    "evaluate --data-only --data pairs.jsonl --held-out test.jsonl",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "evaluate",
        help="compare a reward model with a file of preferences",
        **examples(*EXAMPLES),
    )
    command.add_argument(
        "model",
        nargs="?",
        help="a directory or hub id of a reward model; with --data-only, a model whose tokenizer counts tokens",
    )
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="of the recipe serve, such as reward.ranks=2, or of how rows are read, such as data.bad_rows=drop",
    )
    command.add_argument(
        "--data", required=True, type=Path, help="preference pairs in any layout; RewardBench's and RewardBench 2's too"
    )
    command.add_argument("--prompt-key", default="prompt")
    command.add_argument("--chosen-key", default="chosen")
    command.add_argument("--rejected-key", default="rejected")
    command.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="make turns of plain texts, where the model does not remember that",
    )
    command.add_argument(
        "--data-only",
        action="store_true",
        help="measure the pairs themselves: repeated and contradicting ones, length bias, label noise",
    )
    command.add_argument(
        "--held-out", type=Path, help="with --data-only: a file that must not share prompts with --data"
    )
    command.add_argument(
        "--allow-shared-prompts", action="store_true", help="with --held-out: report shared prompts and accept them"
    )
    command.add_argument("--output", type=Path, help="a .json file for all figures, the worst pairs among them")
    command.add_argument("--overwrite", action="store_true", help="let --output take the place of a file of yours")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check, score or count, print the tables."""
    from rlhf_ray.rows.layouts import Keys

    keys = Keys(options.prompt_key, options.chosen_key, options.rejected_key)
    return _measure_data(options, keys) if options.data_only else _measure_model(options, keys)


def _measure_model(options: argparse.Namespace, keys: Keys) -> int:
    import json

    from rlhf_ray.config.jobs.serve import ServeConfig
    from rlhf_ray.config.loading import load_job, take_rows_settings
    from rlhf_ray.errors import RequestError
    from rlhf_ray.launch.parent import with_own_ray

    def work() -> int:
        from rlhf_ray.launch.evaluate import evaluate

        return evaluate(config, options.data, reader, output=_output(options))

    if options.model is None:
        raise RequestError("evaluate needs a reward model: name its directory or hub id, or measure the --data-only")
    if options.held_out is not None or options.allow_shared_prompts:
        raise RequestError(
            "--held-out and --allow-shared-prompts are about the data: add --data-only, or leave them out"
        )
    model = f"reward.model.path={json.dumps(options.model)}"
    rows, overrides = take_rows_settings(options.overrides)
    config = load_job(ServeConfig, "serve", [model, "run.name=evaluate", *overrides], files=True)
    reader = rows.pair_reader(keys, turns=options.apply_chat_template)
    return with_own_ray(config, options.arguments, work)


def _measure_data(options: argparse.Namespace, keys: Keys) -> int:
    from rlhf_ray.config.loading import take_rows_settings
    from rlhf_ray.launch.evaluate_data import DataRequest, evaluate_data, longest_pair

    settings = list(options.overrides)
    if options.model is not None and "=" in options.model:  # without a model the first setting stands in its place
        settings.insert(0, options.model)
        options.model = None
    rows, settings = take_rows_settings(settings)
    request = DataRequest(
        options.data,
        options.held_out,
        rows.pair_reader(keys, turns=options.apply_chat_template),
        tokenizer_from=options.model,
        max_tokens=longest_pair(settings, has_tokenizer=options.model is not None),
    )
    return evaluate_data(request, output=_output(options), allow_shared_prompts=options.allow_shared_prompts)


def _output(options: argparse.Namespace) -> OutputFile | None:
    from rlhf_ray.storage.output import OutputFile

    reads = [file for file in (options.data, options.held_out) if file is not None]
    return None if options.output is None else OutputFile(options.output, overwrite=options.overwrite, reads=reads)
