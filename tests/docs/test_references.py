"""The two reference pages say what the code says: every metric, and every key of a config with its default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from rlhf_ray.config import reward_training, roles, schema
from rlhf_ray.monitoring.ray_export import PHASE_GAUGE
from rlhf_ray.monitoring.registry import PHASES, REGISTRY

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS: dict[str, type[roles.Section]] = {
    "`run`": schema.RunConfig,
    "`cluster`": schema.ClusterConfig,
    "`batch` of ppo": schema.BatchConfig,
    "`batch` of sft": schema.SequenceBatchConfig,
    "`batch` of rm": schema.PairBatchConfig,
    "`data`": schema.DataConfig,
    "`data.world`": schema.WorldConfig,
    "`data.sources.NAME`": schema.SourceConfig,
    "A role: `policy`, `critic`, `reference`, `reward`": schema.RoleConfig,
    "`ROLE.model`": schema.ModelConfig,
    "`ROLE.model.make`": schema.MakeConfig,
    "`ROLE.model.lora`": schema.LoraConfig,
    "`ROLE.engine`": schema.EngineConfig,
    "`ROLE.engine.optimizer`": schema.OptimizerConfig,
    "`reward.engine.optimizer` of rm": reward_training.RewardOptimizerConfig,
    "`ROLE.resources`": schema.ResourcesConfig,
    "`reward` of ppo": schema.RewardConfig,
    "`reward.mixture.NAME`": schema.RewardTermConfig,
    "`reward` and `models.NAME` of serve": roles.ScoringRole,
    "`rollout`": schema.RolloutConfig,
    "`algorithm`": schema.AlgorithmConfig,
    "`algorithm.kl`": schema.KlConfig,
    "`algorithm.shaping`": schema.ShapingConfig,
    "`algorithm.shaping.overlong`": schema.OverlongConfig,
    "`algorithm.shaping.too_short`": schema.TooShortConfig,
    "`algorithm.shaping.missing_eos`": schema.MissingEosConfig,
    "`algorithm.importance`": schema.ImportanceConfig,
    "`loss` of rm": schema.RewardLossConfig,
    "`normalization` of rm": schema.NormalizationConfig,
    "`evaluation`": schema.EvaluationConfig,
    "`evaluation` of rm": schema.RewardEvaluationConfig,
    "`evaluation` of ppo": schema.PpoEvaluationConfig,
    "`checkpoint`": schema.CheckpointConfig,
    "`monitoring`": schema.MonitoringConfig,
    "`expose` of ppo, and part of serve": schema.ServiceConfig,
    "serve, beside `run`, `cluster` and the keys above": schema.ServeConfig,
}
ELSEWHERE = {
    schema.RewardEvaluationConfig: set(schema.EvaluationConfig.model_fields),
    schema.PpoEvaluationConfig: set(schema.EvaluationConfig.model_fields),
    reward_training.RewardOptimizerConfig: set(schema.OptimizerConfig.model_fields)
    - {"learning_rate", "schedule", "warmup_fraction", "final_fraction"},
    schema.SequenceBatchConfig: set(roles.TokenBudget.model_fields),
    schema.PairBatchConfig: set(roles.TokenBudget.model_fields),
    schema.RewardConfig: set(roles.RoleConfig.model_fields) - {"model"},
    roles.ScoringRole: set(roles.RoleConfig.model_fields),
    schema.RewardTermConfig: set(schema.RewardSourceConfig.model_fields),
    schema.ServeConfig: {"kind", "run", "cluster"} | set(schema.ServiceConfig.model_fields),
}
"""Keys that the page gives in another table."""


def rows_below(page: Path) -> dict[str, list[list[str]]]:
    """Cells of the table rows below each heading of third rank, without the table's head."""
    found: dict[str, list[list[str]]] = {}
    for part in re.split(r"^### ", page.read_text(), flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line[:1] == "|"]
        found[heading] = rows[2:]
    return found


def written(field: Any) -> str:
    """A default as the page writes it."""
    if field.default is PydanticUndefined:
        return "needed"
    if field.default is None:
        return "null"
    if isinstance(field.default, roles.Section):
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def test_every_metric_is_explained_and_every_explained_one_is_registered() -> None:
    told = {
        heading: [(row[0].replace(" (counter)", "").strip("`"), row[1], row[2]) for row in rows]
        for heading, rows in rows_below(DOCS / "monitoring.md").items()
    }
    registered = {
        group: [(metric.name, metric.unit, metric.help) for metric in metrics]
        for group, metrics in REGISTRY.groups().items()
    }
    assert told == registered


def test_metrics_named_in_the_text_are_registered() -> None:
    groups = "|".join(sorted({metric.name.partition("/")[0] for metric in REGISTRY if "/" in metric.name}))
    page = (DOCS / "monitoring.md").read_text()
    names = re.findall(rf"`((?:{groups})/[a-z0-9_/]+)`", page)
    assert len(names) > 40
    assert [metric for metric in names if metric not in REGISTRY] == []


def test_counters_and_phases_are_named() -> None:
    page = (DOCS / "monitoring.md").read_text()
    assert set(re.findall(r"^\| `(\S+)` \(counter\)", page, re.MULTILINE)) == {
        metric.name for metric in REGISTRY if metric.kind == "counter"
    }
    assert all(f"`{phase}`" in page for phase in PHASES)


def test_every_key_has_its_default() -> None:
    told = {
        heading: {row[0].strip("`"): row[1] for row in rows}
        for heading, rows in rows_below(DOCS / "configuration.md").items()
    }
    wanted = {
        heading: {
            key: written(field)
            for key, field in section.model_fields.items()
            if key not in ELSEWHERE.get(section, set())
        }
        for heading, section in SECTIONS.items()
    }
    assert told == wanted


def test_every_section_is_on_the_page() -> None:
    sections = {
        value for value in vars(schema).values() if isinstance(value, type) and issubclass(value, roles.Section)
    }
    jobs = set(schema.JOBS.values())
    abstract = {
        roles.Section,
        roles.TokenBudget,
        schema.RewardSourceConfig,
        schema.RewardTrainingRole,
        schema.ServiceConfig,
    }
    assert sections - jobs - abstract <= set(SECTIONS.values())


def test_recipes_are_listed() -> None:
    page = (DOCS / "configuration.md").read_text()
    for recipe in (DOCS.parent / "configs").glob("*.yaml"):
        assert f"`{recipe.stem}`" in page
        assert yaml.safe_load(recipe.read_text())["kind"] in schema.JOBS


def test_names_in_prometheus_are_those_that_are_exported() -> None:
    exported = {f"ray_{metric.exported_name}" for metric in REGISTRY} | {f"ray_{PHASE_GAUGE}"}
    pages = [DOCS / "monitoring.md", DOCS.parent / "deploy" / "monitoring" / "README.md"]
    named = {name.removesuffix("_total") for page in pages for name in re.findall(r"ray_rlhf_\w+", page.read_text())}
    assert named and named <= exported
