"""What README, docs, deploy pages and the headers of recipes tell a reader to do can be done.

Every command parses, every recipe and key in it exists, every make target exists; every link leads somewhere; every example
compiles, and its imports resolve. Nothing is run.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from rlhf_ray.cli.main import COMMANDS, parser
from rlhf_ray.config.loading import load_config, parse_config
from rlhf_ray.config.recipes import recipes
from rlhf_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / page for page in ("README.md", "CHANGELOG.md", "benchmarks/README.md")),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("deploy/*/README.md"),
    ]
)
RECIPES = sorted(ROOT.glob("configs/*.yaml"))
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))

FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"(?:rlhf-ray|python -m rlhf_ray|make)(?: |$)")
SYNOPSIS = re.compile(r"[\[\]{|]|\.\.\.")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*")
"""Stands for something of the reader's: CONFIG, RUN_DIR, MODEL."""


def name(path: Path) -> str:
    """A page as pytest shows it."""
    return str(path.relative_to(ROOT))


def code_lines(page: Path) -> Iterator[str]:
    """Lines of code of a page: indented and fenced blocks, inline code, and the comment that begins a recipe."""
    text = page.read_text()
    if page.suffix == ".yaml":
        yield from (line.lstrip("# ") for line in text.splitlines() if re.match(r"# {3,}", line))
        return
    text = re.sub(r"\\\n\s*", " ", text)
    for _, block in FENCED.findall(text):
        yield from (line.strip() for line in block.splitlines())
    text = FENCED.sub("", text)
    yield from (line.strip() for line in text.splitlines() if line.startswith("    "))
    yield from INLINE.findall("\n".join(line for line in text.splitlines() if not line.startswith("    ")))


def commands(page: Path) -> list[str]:
    """What a page says to type, from the program on: without what stands before it, such as ``ray job submit --``."""
    listed = []
    for line in code_lines(page):
        for part in line.replace(".venv/bin/", "").split("&&"):
            after = part.strip().rpartition("-- ")[2] if part.strip().startswith("ray job submit") else part.strip()
            if COMMAND.match(after):
                listed.append(after)
    return listed


def documented() -> list[tuple[str, str]]:
    """Every page with every command on it."""
    return [(name(page), command) for page in [*PAGES, *RECIPES] for command in dict.fromkeys(commands(page))]


def check(command: str) -> None:
    """Refuse a command that could not be typed."""
    if command.startswith("make"):
        targets = [word for word in command.split()[1:] if "=" not in word]
        assert set(targets) <= TARGETS, f"targets are {', '.join(sorted(TARGETS))}"
        return
    words = shlex.split(re.sub(r"^(rlhf-ray|python -m rlhf_ray)", "", command).replace("\\|", "|"))
    if len(words) == 1 or SYNOPSIS.search(re.sub(r"'[^']*'", "", command)):
        assert words in (["--help"], ["--version"]) or words[0] in COMMANDS, f"commands are {', '.join(COMMANDS)}"
    elif words:
        check_call(words)


def check_call(words: Sequence[str]) -> None:
    """Parse a whole call, and load the config that it names with its overrides."""
    try:
        parsed = parser().parse_args(words)
    except SystemExit as refused:
        pytest.fail(f"the command line refuses it ({refused})")
    if parsed.command == "demo":
        for override in parsed.overrides:
            job, _, setting = override.partition(".")
            load_config(f"demo-{job}", [setting])
    elif parsed.command == "serve":
        flags = {"host": parsed.host, "port": parsed.port, "token_file": parsed.token_file}
        options = [f"{key}={value}" for key, value in flags.items() if value is not None]
        load_config("serve", [*options, *parsed.overrides])
    elif getattr(parsed, "config", None) is not None and getattr(parsed, "resume", None) is None:
        check_config(parsed.config, parsed.overrides, getattr(parsed, "kind", None))


def check_config(config: str, overrides: Sequence[str], kind: str | None) -> None:
    """Load the recipe, or where a placeholder stands some recipe of the kind, with the overrides."""
    if not PLACEHOLDER.fullmatch(config):
        assert config in recipes(), f"recipes are {', '.join(recipes())}"
        load_config(config, overrides, kind)
        return
    problems = []
    for recipe in recipes():
        try:
            load_config(recipe, overrides, kind)
            return
        except ConfigError as error:
            problems.append(str(error))
    pytest.fail("\n".join(problems))


@pytest.mark.parametrize(("page", "command"), documented())
def test_a_command_can_be_typed(page: str, command: str) -> None:
    check(command)


def test_every_page_was_read() -> None:
    """A guard on the reader above: it finds what is known to be there."""
    listed = set(documented())
    assert ("README.md", "make demo") in listed
    assert ("README.md", "rlhf-ray submit demo-ppo --address http://127.0.0.1:8265") in listed
    assert ("README.md", "python -m rlhf_ray train ppo demo-ppo run.root=/shared/runs") in listed
    assert ("configs/hh-rm.yaml", "rlhf-ray train rm hh-rm data.path=PAIRS.jsonl.gz") in listed
    used = {command.split()[1] for _, command in listed if command.startswith("rlhf-ray ")}
    assert set(COMMANDS) <= used, "every command is shown somewhere"
    assert all(commands(recipe) for recipe in RECIPES), "every recipe says how it is run"


@pytest.mark.parametrize(
    "command",
    [
        "make dmeo",
        "rlhf-ray trian ppo demo-ppo",
        "rlhf-ray train dpo demo-ppo",
        "rlhf-ray train rm demo-ppo",
        "rlhf-ray train ppo demo-pop",
        "rlhf-ray train ppo demo-ppo algorithm.kl.coeficient=1",
        "rlhf-ray check CONFIG batch.rows=1",
        "rlhf-ray submit demo-ppo --adress http://127.0.0.1:8265",
        "rlhf-ray serve MODEL --prot 5",
        "rlhf-ray serve MODEL --host 0.0.0.0",
        "rlhf-ray demo ppo.stesp=1",
        "rlhf-ray stauts {a,b} RUN_DIR",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, ConfigError, pytest.fail.Exception)):
        check(command)


# --------------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as they are linked to."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = INLINE.sub("", FENCED.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(linked), f"{target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    folders = ("rlhf_ray/", "configs/", "deploy/", "docs/", "tests/", "requirements/", "examples/")
    rooms = tuple(f"{path.name}/" for path in (ROOT / "rlhf_ray").iterdir() if path.is_dir())
    for code in INLINE.findall(FENCED.sub("", page.read_text())):
        if re.fullmatch(r"[\w/.-]+", code) and code.startswith(folders):
            assert (ROOT / code).exists(), f"{code} does not exist"
        elif re.fullmatch(r"[\w/]+\.py", code) and code.startswith(rooms):
            assert (ROOT / "rlhf_ray" / code).exists(), f"rlhf_ray/{code} does not exist"


# ------------------------------------------------------------------------------------------------------------ examples


def examples(language: str) -> list[tuple[str, str]]:
    """Every fenced example in a language, with its page."""
    return [
        (name(page), block) for page in PAGES for kind, block in FENCED.findall(page.read_text()) if kind == language
    ]


@pytest.mark.parametrize(("page", "code"), examples("python"))
def test_a_python_example_compiles_and_its_imports_resolve(page: str, code: str) -> None:
    tree = ast.parse(code)
    compile(tree, page, "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(importlib.util.find_spec(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), f"{node.module} lacks one of these names"


@pytest.mark.parametrize(("page", "text"), examples("yaml"))
def test_a_yaml_example_is_a_config(page: str, text: str) -> None:
    fields = yaml.safe_load(text)
    assert isinstance(fields, dict) and fields, "an example that says nothing"
    if "kind" in fields:
        assert parse_config(text, source=page).kind == fields["kind"]
