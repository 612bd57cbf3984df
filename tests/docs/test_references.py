"""The two reference pages say what the code says: every metric, and every key of a config with its default."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from rlhf_ray.config import sections
from rlhf_ray.config.jobs.generate import GenerateConfig, SampledModelConfig
from rlhf_ray.config.jobs.registry import KINDS
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.algorithm import (
    AlgorithmConfig,
    ImportanceConfig,
    KlConfig,
    MissingEosConfig,
    OverlongConfig,
    PartParameters,
    ShapingConfig,
    TooShortConfig,
)
from rlhf_ray.config.sections.base import Section
from rlhf_ray.config.sections.batch import BatchConfig, PairBatchConfig, PreferenceBatchConfig, SequenceBatchConfig
from rlhf_ray.config.sections.data import DataConfig, RowsConfig, SourceConfig, WorldConfig
from rlhf_ray.config.sections.distillation import DistillationConfig
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig, PlacementConfig, ResourcesConfig
from rlhf_ray.config.sections.evaluation import (
    EvaluationConfig,
    PpoEvaluationConfig,
    PreferenceEvaluationConfig,
    RewardEvaluationConfig,
)
from rlhf_ray.config.sections.guards import GuardsConfig
from rlhf_ray.config.sections.models import LoraConfig, MakeConfig, ModelConfig
from rlhf_ray.config.sections.policy_training import PolicyLossConfig
from rlhf_ray.config.sections.reward_training import (
    NormalizationConfig,
    RewardEngineConfig,
    RewardLossConfig,
    RewardOptimizerConfig,
    RewardTrainingRole,
)
from rlhf_ray.config.sections.rewards import (
    JudgeConfig,
    RewardConfig,
    RewardSourceConfig,
    RewardTermConfig,
    RubricPartConfig,
)
from rlhf_ray.config.sections.roles import RoleConfig, ScoringRole, TokenBudget
from rlhf_ray.config.sections.rollout import EnvironmentConfig, RolloutConfig
from rlhf_ray.config.sections.run import CheckpointConfig, ClusterConfig, MonitoringConfig, RunConfig
from rlhf_ray.config.sections.service import ServiceConfig
from rlhf_ray.monitoring.alarms.service import SERVICE_ALARMS
from rlhf_ray.monitoring.other_pages import SERVICE_METRICS
from rlhf_ray.monitoring.ray_export import PHASE_GAUGE
from rlhf_ray.monitoring.registry import PHASES, REGISTRY
from rlhf_ray.monitoring.useful_time import REASONS

Row = tuple[str, ...]
DOCS = Path(__file__).parents[2] / "docs"
SECTIONS: dict[str, type[Section]] = {
    "`run`": RunConfig,
    "`guards`": GuardsConfig,
    "`cluster`": ClusterConfig,
    "`batch` of ppo": BatchConfig,
    "`batch` of sft": SequenceBatchConfig,
    "`batch` of rm": PairBatchConfig,
    "`batch` of dpo": PreferenceBatchConfig,
    "`data`": DataConfig,
    "`data.world`": WorldConfig,
    "`data.sources.NAME`": SourceConfig,
    "A role: `policy`, `critic`, `reference`, `reward`": RoleConfig,
    "`ROLE.model`": ModelConfig,
    "`ROLE.model.make`": MakeConfig,
    "`ROLE.model.lora`": LoraConfig,
    "`ROLE.engine`": EngineConfig,
    "`ROLE.engine.optimizer`": OptimizerConfig,
    "`reward.engine.optimizer` of rm": RewardOptimizerConfig,
    "`ROLE.resources`": ResourcesConfig,
    "`ROLE.placement`": PlacementConfig,
    "`reward` of ppo": RewardConfig,
    "`reward.mixture.NAME`": RewardTermConfig,
    "`reward.judge`": JudgeConfig,
    "`reward.judge.parts.NAME`": RubricPartConfig,
    "`reward` and `models.NAME` of serve": ScoringRole,
    "`rollout`": RolloutConfig,
    "`rollout.environment`": EnvironmentConfig,
    "`algorithm`": AlgorithmConfig,
    "`algorithm.parameters`": PartParameters,
    "`algorithm.kl`": KlConfig,
    "`algorithm.shaping`": ShapingConfig,
    "`algorithm.shaping.overlong`": OverlongConfig,
    "`algorithm.shaping.too_short`": TooShortConfig,
    "`algorithm.shaping.missing_eos`": MissingEosConfig,
    "`algorithm.importance`": ImportanceConfig,
    "`loss` of rm": RewardLossConfig,
    "`loss` of distill": DistillationConfig,
    "`loss` of dpo": PolicyLossConfig,
    "`normalization` of rm": NormalizationConfig,
    "`evaluation`": EvaluationConfig,
    "`evaluation` of rm": RewardEvaluationConfig,
    "`evaluation` of dpo": PreferenceEvaluationConfig,
    "`evaluation` of ppo": PpoEvaluationConfig,
    "`checkpoint`": CheckpointConfig,
    "`monitoring`": MonitoringConfig,
    "`expose` of ppo, and part of serve": ServiceConfig,
    "generate, beside `run`, `cluster`, `data`, `rollout` and `reward`": GenerateConfig,
    "`model` of generate": SampledModelConfig,
    "serve, beside `run`, `cluster` and the keys above": ServeConfig,
}
ELSEWHERE = {
    RewardEvaluationConfig: set(EvaluationConfig.model_fields),
    PreferenceEvaluationConfig: set(EvaluationConfig.model_fields),
    PpoEvaluationConfig: set(EvaluationConfig.model_fields),
    RewardOptimizerConfig: set(OptimizerConfig.model_fields)
    - {"learning_rate", "schedule", "warmup_fraction", "final_fraction"},
    SequenceBatchConfig: set(TokenBudget.model_fields),
    PairBatchConfig: set(TokenBudget.model_fields),
    PreferenceBatchConfig: set(TokenBudget.model_fields),
    RewardConfig: set(RoleConfig.model_fields) - {"model"},
    ScoringRole: set(RoleConfig.model_fields),
    RewardTermConfig: set(RewardSourceConfig.model_fields),
    GenerateConfig: {"kind", "run", "cluster", "data", "rollout"},
    ServeConfig: {"kind", "run", "cluster"} | set(ServiceConfig.model_fields),
}
"""Keys that the page gives in another table."""


def rows_below(page: Path) -> dict[str, list[list[str]]]:
    """Cells of the table rows below each heading of third rank, without the table's head."""
    tables: dict[str, list[list[str]]] = {}
    for part in re.split(r"^### ", page.read_text(), flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line[:1] == "|"]
        tables[heading] = rows[2:]
    return tables


def rows_to_paste(page: str, documented: Mapping[str, Sequence[Row]], wanted: Mapping[str, Sequence[Row]]) -> str:
    """What to change on a page: the rows that it lacks, as Markdown, and those that it has too many."""
    lines = [f"docs/{page} is not what the code says; its rows stand in the order of the code."]
    for heading in sorted({*documented, *wanted}):
        there, here = documented.get(heading, ()), wanted.get(heading, ())
        lines += [
            f"add below '### {heading}': | `{row[0]}` | {' | '.join(row[1:])} |" for row in here if row not in there
        ]
        lines += [f"remove below '### {heading}': {row[0]}" for row in there if row not in here]
    return "\n".join(lines)


def written(field: Any) -> str:
    """A default as the page writes it."""
    if field.default is PydanticUndefined:
        return "needed"
    if field.default is None:
        return "null"
    if isinstance(field.default, Section):
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def test_every_metric_is_explained_and_every_explained_one_is_registered() -> None:
    documented = {
        heading: [(row[0].replace(" (counter)", "").strip("`"), row[1], row[2]) for row in rows]
        for heading, rows in rows_below(DOCS / "monitoring.md").items()
    }
    registered = {
        group: [(metric.name, metric.unit, metric.help) for metric in metrics]
        for group, metrics in REGISTRY.groups().items()
    }
    assert documented == registered, rows_to_paste("monitoring.md", documented, registered)


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
    documented = {
        heading: sorted((row[0].strip("`"), row[1]) for row in rows)
        for heading, rows in rows_below(DOCS / "configuration.md").items()
    }
    wanted = {
        heading: sorted(
            (key, written(field))
            for key, field in section.model_fields.items()
            if key not in ELSEWHERE.get(section, set())
        )
        for heading, section in SECTIONS.items()
    }
    assert documented == wanted, rows_to_paste("configuration.md", documented, wanted)


def test_every_section_is_on_the_page() -> None:
    modules = [
        importlib.import_module(f"{sections.__name__}.{module.name}")
        for module in pkgutil.iter_modules(sections.__path__)
    ]
    classes = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Section)
    }
    abstract = {
        Section,
        RowsConfig,
        TokenBudget,
        RewardSourceConfig,
        RewardTrainingRole,
        RewardEngineConfig,
        ServiceConfig,
    }
    assert len(classes) > 30
    assert classes - abstract <= set(SECTIONS.values())


def test_every_reason_of_lost_time_is_on_the_page() -> None:
    page = (DOCS / "monitoring.md").read_text()
    assert "\n".join(f"| {reason} | {meaning} |" for reason, meaning in REASONS.items()) in page


def test_every_alarm_is_on_the_page() -> None:
    page = (DOCS / "monitoring.md").read_text()
    rows = [
        f"| {alarm.name} | {alarm.severity} | {words[0].upper() if words[0] != '`' else '`'}{words[1:]}"
        f"{f', from step {alarm.from_step} on' if alarm.from_step > 2 else ''} | {alarm.meaning}. {alarm.way_out} |"
        for alarm in REGISTRY.alarms
        for words in [alarm.condition.words()]
    ]
    assert "\n".join(rows) in page, "docs/monitoring.md: paste the rows of alarms\n" + "\n".join(rows)


def test_every_alarm_and_metric_of_a_service_is_on_its_page() -> None:
    alarms = [
        f"| {alarm.name} | {alarm.severity} | {words[0].upper() if words[0] != '`' else '`'}{words[1:]} | {alarm.meaning}. "
        f"{alarm.way_out} |"
        for alarm in SERVICE_ALARMS
        for words in [alarm.condition.words()]
    ]
    metrics = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} | {metric.help} |"
        for group in SERVICE_METRICS.values()
        for metric in group.values()
    ]
    for page, rows in (("monitoring.md", alarms), ("serving.md", metrics)):
        assert "\n".join(rows) in (DOCS / page).read_text(), f"docs/{page}: paste these rows\n" + "\n".join(rows)


def test_the_keys_that_alarms_name_exist() -> None:
    """A way out that names a key which is not there is none."""
    texts = " ".join(alarm.way_out for alarm in REGISTRY.alarms)
    named = set(
        re.findall(r"\b((?:run|rollout|algorithm|batch|reward|checkpoint|policy|critic|guards)(?:\.[a-z_]+)+)", texts)
    )
    assert len(named) > 15
    page = rows_below(DOCS / "configuration.md")
    known = {row[0].strip("`") for rows in page.values() for row in rows}
    assert {name for name in named if name.rpartition(".")[2] not in known} == set()


def test_recipes_are_listed() -> None:
    page = (DOCS / "configuration.md").read_text()
    for recipe in (DOCS.parent / "configs").glob("*.yaml"):
        assert f"`{recipe.stem}`" in page
        assert yaml.safe_load(recipe.read_text())["kind"] in KINDS


def test_names_in_prometheus_are_those_that_are_exported() -> None:
    exported = {f"ray_{metric.exported_name}" for metric in REGISTRY} | {f"ray_{PHASE_GAUGE}"}
    pages = [DOCS / "monitoring.md", DOCS.parent / "deploy" / "monitoring" / "README.md"]
    named = {name.removesuffix("_total") for page in pages for name in re.findall(r"ray_rlhf_\w+", page.read_text())}
    assert named and named <= exported
