"""No secret of the environment or of a config is in what a tracker or a reader of a report is handed."""

from __future__ import annotations

from typing import Any, get_args, get_origin

import pytest

from rlhf_ray.config.jobs.registry import job_classes
from rlhf_ray.config.keys import choices_of, entries_of, section_of
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.recipes import recipes
from rlhf_ray.config.sections.base import Section
from rlhf_ray.config.shown import FREE, WITHHELD, shown_config, without_secrets

CANARY = "canary-5f2c19"
CONFIGS: list[dict[str, Any]] = [
    {"reward": {"token_file": f"/home/{CANARY}/key"}},
    {"reward": {"parameters": {"note": CANARY}}},
    {"reward": {"parameters": {"headers": [{"x": CANARY}]}}},
    {"data": {"template_variables": {"system": f"You are {CANARY}"}}},
    {"data": {"rename_columns": {"a": CANARY}}},
    {"reward": {"url": f"http://user:{CANARY}@host:5000/get_reward"}},
    {"reward": {"url": f"http://{CANARY}@host/get_reward"}},
    {"reward": {"url": f"http://host/get_reward?key={CANARY}"}},
    {"reward": {"url": f"http://host/get_reward#{CANARY}"}},
    {"expose": {"api-key": CANARY}},
    {"any": {"API_KEY": CANARY, "my_secret": [CANARY], "Authorization": {"bearer": CANARY}}},
    {"run": {"name": f"of-{CANARY}"}},  # a secret of the environment, whatever the key
]
VARIABLES = {"WANDB_API_KEY": CANARY, "HOME": "/root", "OTHER_TOKEN": "short", "EMPTY_SECRET": ""}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_canary_is_handed_over(config: dict[str, Any]) -> None:
    shown = shown_config(config, VARIABLES)
    assert shown, "the key is shown"
    assert CANARY not in repr(shown)


@pytest.mark.parametrize("config", CONFIGS[:-1], ids=str)
def test_a_config_keeps_its_secrets_also_where_the_environment_has_none(config: dict[str, Any]) -> None:
    assert CANARY not in repr(shown_config(config, {}))


def test_everything_else_is_handed_over_flat() -> None:
    config = {
        "run": {"name": "a", "seed": 3, "deterministic": False},
        "reward": {
            "url": "http://host:5000/score",
            "scored_token": "last",
            "parameters": {"k": 2, "deep": {"on": True}},
        },
        "evaluation": {"pass_at": [1, 8]},
        "data": {"max_tokens": 64, "prompt_key": "question", "path": "/data/pairs.jsonl"},
        "rollout": {"stop_tokens": ["<end>"], "top_p": 0.5},
        "critic": None,
    }
    assert shown_config(config, VARIABLES) == {
        "run.name": "a", "run.seed": 3, "run.deterministic": False,
        "reward.url": "http://host:5000/score", "reward.scored_token": "last",
        "reward.parameters.k": 2, "reward.parameters.deep.on": True,
        "evaluation.pass_at.0": 1, "evaluation.pass_at.1": 8,
        "data.max_tokens": 64, "data.prompt_key": "question", "data.path": "/data/pairs.jsonl",
        "rollout.stop_tokens.0": "<end>", "rollout.top_p": 0.5, "critic": None,
    }  # fmt: skip


def free_keys(section: type[Section]) -> set[str]:
    """The keys in a section, and in those below it, whose values are mappings that no schema knows."""
    found: set[str] = set()
    for name, info in section.model_fields.items():
        inner = section_of(info.annotation) or entries_of(info.annotation)
        if inner is not None:
            found |= {name} if name == "parameters" and free_keys(inner) else free_keys(inner)
        elif any(get_origin(choice) is dict or choice is dict for choice in choices_of(info.annotation)):
            assert get_args(info.annotation)
            found.add(name)
    return found


def test_every_mapping_that_no_schema_knows_is_free() -> None:
    found = set().union(*(free_keys(job) for job in job_classes().values()))
    assert found == FREE


@pytest.mark.parametrize("recipe", recipes())
def test_nothing_of_a_recipe_is_withheld_but_paths_of_tokens(recipe: str) -> None:
    shown = shown_config(load_config(recipe).model_dump(mode="json"), {})
    withheld = {key for key, value in shown.items() if value == WITHHELD}
    assert all(key.endswith("token_file") or ".parameters." in key for key in withheld), withheld
    assert len(shown) > 30


def test_errors_are_told_without_secrets() -> None:
    error = f"ConnectionError: https://me:{CANARY}@host:5000/api?token={CANARY} refused the key {CANARY}"
    told = without_secrets(error, VARIABLES)
    assert CANARY not in told and "https://host:5000/api" in told and "refused the key" in told
