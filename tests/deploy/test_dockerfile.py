"""The Dockerfile, as far as it can be known without building it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINES = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text()).splitlines()


def stages() -> dict[str, list[str]]:
    """Instructions of every stage, those of the stage it starts from first."""
    instructions: dict[str, list[str]] = {}
    current = ""
    for line in LINES:
        begun = re.fullmatch(r"FROM (\S+) AS (\S+)", line)
        if begun:
            current = begun[2]
            instructions[current] = list(instructions.get(begun[1], []))
        elif current and line and not line.startswith("#"):
            instructions[current].append(line)
    return instructions


def copied(stage: str) -> set[str]:
    """What a stage takes from the source tree."""
    lines = (line.split()[1:-1] for line in stages()[stage] if line.startswith("COPY") and "--from" not in line)
    return {source for sources in lines for source in sources}


def test_both_targets_are_there_and_run_as_an_ordinary_user() -> None:
    for target in ("cpu", "gpu"):
        users = [line.split()[1] for line in stages()[target] if line.startswith("USER")]
        assert users[-1] == "1000", "a number, so that Kubernetes can tell that it is not root"


def test_a_target_takes_the_environment_that_was_built_for_it() -> None:
    for target in ("cpu", "gpu"):
        taken = [line.split() for line in stages()[target] if line.startswith("COPY --from")]
        assert taken == [["COPY", f"--from=build-{target}", "/opt/rlhf", "/opt/rlhf"]]
        assert f"build-{target}" in stages()


def test_what_is_copied_exists_and_is_enough_to_build_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {*wheel["packages"], *wheel["force-include"]}
    for stage in ("build-cpu", "build-gpu"):
        assert needed <= copied(stage)
        assert all((ROOT / source).exists() for source in copied(stage))


def test_lists_of_pins_that_are_installed_exist() -> None:
    for stage in ("build-cpu", "build-gpu"):
        lists = {name for line in stages()[stage] for name in re.findall(r"-r /build/(\S+)", line)}
        assert len(lists) >= 3
        assert all((ROOT / name).is_file() for name in lists)


def test_usage_reports_are_off() -> None:
    text = "\n".join(stages()["cpu"])
    assert "RAY_USAGE_STATS_ENABLED=0" in text and "VLLM_NO_USAGE_STATS=1" in text
