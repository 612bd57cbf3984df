"""The command ``rlhf-ray evaluate``: compare a reward model with preferences, or a policy with another one."""

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
    "evaluate POLICY --against OTHER --prompts prompts.jsonl --reward REWARD_MODEL --samples 4 --output figures.json",
    "evaluate POLICY --prompts gsm8k.jsonl --reward gsm8k --samples 16 --pass-at 1,4,16 --output figures.json",
)
KEYS = ("prompt", "chosen", "rejected")
"""Columns of pairs."""


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "evaluate",
        help="compare a reward model with preferences, or a policy with another one",
        description="With --data: how well a reward model agrees with preferences. With --prompts: how good the answers of a "
        "policy are, alone or against another's; the same command goes on after an interruption.",
        **examples(*EXAMPLES),
    )
    command.add_argument(
        "model",
        nargs="?",
        help="a directory or hub id of a reward model; with --prompts of a policy; with --data-only, of a model whose "
        "tokenizer counts tokens",
    )
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="of the recipe serve (with --prompts: of the recipe generate), such as reward.ranks=2, or of how rows are read, "
        "such as data.bad_rows=drop",
    )
    command.add_argument(
        "--data", type=Path, help="preference pairs in any layout; RewardBench's and RewardBench 2's too"
    )
    for key in KEYS:
        command.add_argument(
            f"--{key}-key", metavar="COLUMN", help=f"with --data: the column of the {key} (default: {key})"
        )
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
    _add_policy_arguments(command.add_argument_group("policies"))
    command.add_argument(
        "--output",
        type=Path,
        help="a .json file for all figures; the worst pairs are in it, and answers of policies beside it",
    )
    command.add_argument("--overwrite", action="store_true", help="let --output take the place of a file of yours")
    command.set_defaults(run=run)


def _add_policy_arguments(policies: Any) -> None:
    policies.add_argument(
        "--prompts", type=Path, help="rows with a prompt, a text or a conversation, that policies answer"
    )
    policies.add_argument("--against", metavar="MODEL", help="another policy, which answers the same prompts")
    policies.add_argument(
        "--reward", metavar="MODEL|URL|FUNCTION", help="a reward model, a scoring service, or a function that scores"
    )
    policies.add_argument("--samples", type=int, metavar="N", help="answers to each prompt (default: 1)")
    policies.add_argument(
        "--pass-at", metavar="K,...", help="report pass@k, where an answer is right whose reward is 1 or more"
    )
    policies.add_argument("--greedy", action="store_true", help="the likeliest token each time")
    policies.add_argument("--config", help="a file or recipe of kind generate (default: generate)")
    policies.add_argument("--in-process", action="store_true", help="in this process, without Ray, to debug it")


def run(options: argparse.Namespace) -> int:
    """Check, sample, score or count, print the tables."""
    from rlhf_ray.rows.layouts import Keys

    _check_kind(options)
    if options.prompts is not None:
        return _measure_policies(options)
    keys = Keys(*(getattr(options, f"{key}_key") or key for key in KEYS))
    return _measure_data(options, keys) if options.data_only else _measure_model(options, keys)


def _check_kind(options: argparse.Namespace) -> None:
    """Refuse options of one kind of evaluation in another."""
    from rlhf_ray.errors import RequestError

    of_pairs = ("data_only", "held_out", "allow_shared_prompts", "apply_chat_template", *(f"{key}_key" for key in KEYS))
    of_policies = ("against", "reward", "samples", "pass_at", "greedy", "in_process", "config")
    if (options.data is None) == (options.prompts is None):
        raise RequestError(
            "name either --data, pairs that a reward model is compared with, or --prompts, which a policy answers"
        )
    other, kind = (of_policies, "--prompts") if options.prompts is None else (of_pairs, "--data")
    given = [f"--{name.replace('_', '-')}" for name in other if getattr(options, name) not in (None, False)]
    if given:
        raise RequestError(f"{given[0]} has no effect without {kind}: remove it")
    if options.prompts is not None and (
        options.model is None or "=" in options.model
    ):  # a setting may stand in its place
        raise RequestError("evaluate --prompts needs a policy: name its directory or hub id")
    if options.prompts is not None and options.output is None:
        raise RequestError(
            "evaluate --prompts needs --output FIGURES.json: answers are kept beside it, to go on from there"
        )


def _measure_policies(options: argparse.Namespace) -> int:
    from rlhf_ray.launch.parent import with_own_ray
    from rlhf_ray.launch.sampling.policies import PolicyEvaluation, check_output
    from rlhf_ray.launch.sampling.request import RECIPE, generate_config

    models = [options.model] if options.against is None else [options.model, options.against]
    configs = [
        generate_config(
            model,
            options.prompts,
            recipe=options.config or RECIPE,
            reward=options.reward,
            overrides=["run.name=evaluate", *options.overrides],
            samples=options.samples,
            greedy=options.greedy or None,
        )
        for model in models
    ]
    pass_at, output = _sizes(options.pass_at), _output(options)
    assert output is not None, "asked for above"
    evaluation = PolicyEvaluation(configs, pass_at)
    evaluation.check()
    check_output(output)

    def work() -> int:
        from rlhf_ray.launch.sampling.policies import evaluate_policies, print_report

        places: list[Any] = [None] * len(configs)
        if options.in_process:
            from rlhf_ray.launch.in_process import place_for_generating

            places = [place_for_generating(config) for config in configs]
        report = evaluate_policies(evaluation, output, places=places)
        print_report(report, output.path)
        return 0

    return work() if options.in_process else with_own_ray(configs[0], options.arguments, work)


def _sizes(text: str | None) -> list[int]:
    """The k of each pass@k, without repetition."""
    from rlhf_ray.errors import RequestError

    try:
        return sorted({int(part) for part in (text or "").split(",") if text})
    except ValueError:
        raise RequestError(f"--pass-at {text}: write whole numbers with commas between them, such as 1,4,16") from None


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

    reads = [file for file in (options.data, options.held_out, options.prompts) if file is not None]
    if options.output is None:
        return None
    ending = None if options.prompts is None else ".json"  # a page and answers lie beside the figures of policies
    return OutputFile(options.output, overwrite=options.overwrite, reads=reads, ending=ending)
