"""What the command line costs before it does anything, and what it loads."""

from __future__ import annotations

import statistics

import pytest

HEAVY = ("torch", "ray", "transformers", "deepspeed", "vllm")
CHECK = ("check", "demo-sft")


@pytest.mark.parametrize(("arguments", "seconds"), [(("--help",), 0.5), (CHECK, 1.5)], ids=["help", "check"])
def test_it_answers_at_once(command_line, arguments, seconds):
    runs = [command_line(*arguments) for _ in range(3)]
    assert all(done.code == 0 and done.out for done in runs)
    assert statistics.median(done.seconds for done in runs) < seconds


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        CHECK,
        ("plan", "demo-ppo"),
        ("train", "sft", "demo-sft", "policy.ranks=1000", "batch.sequences_per_update=1000"),
    ],
)
def test_it_loads_nothing_heavy(command_line, arguments):
    done = command_line(*arguments, PYTHONPROFILEIMPORTTIME="1")
    loaded = {line.rpartition("|")[2].strip() for line in done.err.splitlines() if line.startswith("import time:")}
    assert "rlhf_ray.cli.main" in loaded
    assert not loaded & set(HEAVY)


def test_help_names_every_command_and_every_exit_code(command_line):
    help_text = command_line("--help").out
    for word in ("train", "check", "plan", "submit", "resume", "status", "report", "serve", "demo"):
        assert word in help_text
    for code in (
        "0 done",
        "2 the request is wrong",
        "3 the cluster cannot hold it",
        "75 stopped but resumable",
        "1 failed",
    ):
        assert code in " ".join(help_text.split())


def test_check_prints_a_config_that_checks_the_same(command_line, tmp_path):
    first = command_line(*CHECK, "epochs=2")
    (tmp_path / "resolved.yaml").write_text(first.out)
    assert "epochs: 2" in first.out
    assert command_line("check", "resolved.yaml").out == first.out


def test_an_unknown_command_is_a_wrong_request(command_line):
    done = command_line("trian")
    assert done.code == 2
    assert "trian" in done.err and "Traceback" not in done.err
