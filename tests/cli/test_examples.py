"""Every example that a command's ``--help`` shows parses, and is one of that command."""

from __future__ import annotations

import argparse
import importlib
import shlex

import pytest

from rlhf_ray.cli.main import COMMANDS, module_of, parse, parser
from rlhf_ray.config.recipes import recipes


def subparser(command: str) -> argparse.ArgumentParser:
    (commands,) = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    chosen: argparse.ArgumentParser = commands.choices[command]
    return chosen


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_parse_as_the_command_that_shows_them(command: str) -> None:
    text = subparser(command).format_help()
    for example in importlib.import_module(module_of(command)).EXAMPLES:
        assert f"  rlhf-ray {example}\n" in text + "\n"
        words = shlex.split(example.partition(" > ")[0])
        assert parse(words).command == command == words[0]


@pytest.mark.parametrize("command", ["train", "check", "plan", "submit"])
def test_help_names_every_recipe(command: str) -> None:
    text = subparser(command).format_help().replace("\n", " ")
    assert all(f" {name}" in text for name in recipes())
