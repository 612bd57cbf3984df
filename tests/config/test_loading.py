"""All that is wrong with a config comes at once, with key, value and way out; a dumped job loads as the same job."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from rlhf_ray.config.jobs.registry import KINDS, job_class
from rlhf_ray.config.keys import keys_of, section_of
from rlhf_ray.config.loading import dump_config, load_config, parse_config
from rlhf_ray.config.sections.base import Section
from rlhf_ray.config.sections.batch import BatchConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.config.sections.run import RunConfig
from rlhf_ray.errors import EXIT_WRONG_REQUEST, ConfigError


def leaves(section: type[Section], at: str = ""):
    for name, info in section.model_fields.items():
        inner = section_of(info.annotation)
        if inner is None:
            yield at + name
        else:
            yield from leaves(inner, f"{at}{name}.")


def test_the_small_configs_are_valid(problems, kind):
    assert problems(kind) == []


def test_a_misspelt_key_names_its_nearest_neighbour(problems, texts):
    text = texts["ppo"].replace("policy: {model:", "policy: {modle:")
    assert problems(text=text) == ["policy.modle: unknown key; did you mean policy.model? (line 5)"]


@pytest.mark.parametrize(
    ("kind", "other", "own"), [("sft", "steps", "epochs"), ("rm", "steps", "epochs"), ("ppo", "epochs", "steps")]
)
def test_the_key_of_another_job_for_how_long_it_is_names_that_of_this_one(problems, kind, other, own):
    (problem,) = problems(kind, f"{other}=9")
    assert problem.startswith(f"{other}: unknown key; ") and f"did you mean {own}?" in problem


def test_a_misspelt_section_is_checked_inside_and_not_called_missing(problems, texts):
    text = texts["ppo"].replace("critic: {", "critc: {").replace("head_init: zero", "head_init: zeros")
    assert problems(text=text) == [
        "critc: unknown key; did you mean critic? (line 6)",
        "critic.model.head_init: 'zeros' is not hf, inv_sqrt, inv or zero or null (line 6)",
    ]


@pytest.mark.parametrize("job", KINDS)
def test_every_key_with_two_letters_swapped_is_found_again(problems, job):
    """Over all keys of all jobs: the slip is named, and what it should have been."""
    slips = {}
    for key in keys_of(job_class(job)):
        section, dot, name = key.rpartition(".")
        swapped = name[:2] + name[3:1:-1] + name[4:]
        if len(name) > 4 and swapped != name:
            slips[f"{section}{dot}{swapped}"] = key
    messages = {problem.partition(":")[0]: problem for problem in problems(job, *(f"{slip}=null" for slip in slips))}
    assert len(slips) > 40
    for slip, key in slips.items():
        assert messages[slip] == f"{slip}: unknown key; did you mean {key}? (command line)"


@pytest.mark.parametrize("key", ["batch.sizee", "run.dir", "policy.lrr"])
def test_a_key_that_resembles_none_is_answered_with_the_keys_of_its_section(problems, key):
    """What all keys of a section begin with makes none of them likelier, and the section itself is no suggestion."""
    (problem,) = problems("ppo", f"{key}=3")
    section = {"batch": BatchConfig, "run": RunConfig, "policy": RoleConfig}[key.partition(".")[0]]
    assert problem == f"{key}: unknown key; keys here are {', '.join(section.model_fields)} (command line)"


def test_a_misspelt_key_is_found_in_the_sections_below(problems):
    (problem,) = problems("ppo", "policy.learning_rat=1e-4")
    assert problem.startswith("policy.learning_rat: unknown key; did you mean policy.engine.optimizer.learning_rate?")


MAPPINGS = {"reward.mixture", "reward.judge.parts", "data.sources", "models"}
"""Keys whose values are sections by names that the user gives."""
PARTS = ("objective", "advantages", "collector")
FREE = {
    "data.template_variables",
    "reward.parameters",
    "reward.judge.parameters",
    "rollout.environment.parameters",
    *(f"algorithm.parameters.{part}" for part in PARTS),
}
"""Keys whose values may be any mapping: the part that takes them checks them."""


@pytest.mark.parametrize("job", KINDS)
def test_every_wrong_value_is_listed_at_once_with_its_key(job):
    """All settings of a job hold something that none of them accepts: each is named with value and what is wanted."""
    keys = list(leaves(job_class(job)))
    overrides = [f"{key}={'wrong' if key in FREE else '{wrong: 1}'}" for key in keys if key != "kind"]
    with pytest.raises(ConfigError) as error:
        parse_config(f"kind: {job}", overrides)
    messages = {problem.partition(":")[0]: problem for problem in error.value.problems}
    for key in keys:
        if key in MAPPINGS:
            assert "1 is not a section with keys " in messages[f"{key}.wrong"]
        elif key in FREE:
            assert "'wrong' is not a mapping of names to values" in messages[key], key
        elif key != "kind":
            assert "a section (wrong) is not " in messages[key], key
    assert error.value.exit_code == EXIT_WRONG_REQUEST


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps='60'", "steps: '60' is not a whole number above 0; remove the quotes"),
        ("steps=sixty", "steps: 'sixty' is not a whole number above 0"),
        ("steps=60.0", "steps: 60.0 is not a whole number above 0; write 60"),
        ("steps=1.5", "steps: 1.5 is not a whole number above 0"),
        ("steps=true", "steps: true is not a whole number above 0"),
        ("steps=0", "steps: 0 is not a whole number above 0"),
        ("steps=", "steps: null is not a whole number above 0"),
        ("steps=[1]", "steps: [1] is not a whole number above 0"),
        ("run.name=2024", "run.name: 2024 is not a name of letters"),
        ("run.root=3", "run.root: 3 is not a text; write it in quotes: '3'"),
        ("run.root=true", "run.root: true is not a text; write it in quotes: 'true'"),
        ("run.deterministic=yes", "run.deterministic: 'yes' is not true or false"),
        ("run.deterministic=1", "run.deterministic: 1 is not true or false"),
        ("policy.model.dtype=float32", "policy.model.dtype: 'float32' is not bf16, fp16 or fp32"),
        ("policy.engine.zero=4", "policy.engine.zero: 4 is not a whole number from 0 to 3"),
        ("policy.engine.zero=true", "policy.engine.zero: true is not a whole number from 0 to 3"),
        ("policy.engine.zero='2'", "policy.engine.zero: '2' is not a whole number from 0 to 3; remove the quotes"),
        (
            "policy.engine.optimizer.learning_rate='1e-5'",
            "policy.engine.optimizer.learning_rate: '1e-5' is not a number above 0; remove the quotes",
        ),
        (
            "policy.engine.optimizer.learning_rate=.nan",
            "policy.engine.optimizer.learning_rate: .nan is not a number above 0",
        ),
        (
            "policy.engine.optimizer.betas=[0.9, '0.95']",
            "policy.engine.optimizer.betas: [0.9, '0.95'] is not a list of 2, each a number from 0 to below 1",
        ),
        ("algorithm.shaping.clip=.inf", "algorithm.shaping.clip: .inf is not a number above 0 or null"),
        ("algorithm.gamma=1.01", "algorithm.gamma: 1.01 is not a number from 0 to 1"),
        ("policy=5", "policy: 5 is not a section with keys model, engine, ranks, resources"),
        ("policy=null", "policy: null is not a section with keys model, engine, ranks, resources"),
    ],
)
def test_a_type_error_names_key_value_and_what_was_wanted(problems, override, message):
    reported = problems("ppo", override)
    assert len(reported) == 1, reported
    assert reported[0].startswith(message)
    assert reported[0].endswith("(command line)")


def test_whole_numbers_stand_for_numbers_and_1e_5_is_one():
    config = load_config("demo-sft", ["policy.engine.optimizer.learning_rate=1e-5", "epochs=2"])
    assert config.policy.engine.optimizer.learning_rate == 1e-5
    assert config.epochs == 2.0


def test_all_sorts_of_errors_come_together(problems):
    """A slip, a wrong type, a missing key, values that exclude each other, across sections, and a file."""
    reported = problems(
        "ppo",
        "rollout.temprature=1",
        "steps=many",
        "batch.prompts_per_step=48",
        "batch.sequences_per_update=5",
        "run.deterministic=true",
        "rollout.dtype=bf16",
        "rollout.top_p=1.9",
        "data.path=nowhere.jsonl",
        "not an override",
        files=True,
    )
    starts = [
        "not an override:",
        "rollout.temprature:",
        "steps:",
        "batch.sequences_per_update: 5 does not divide",
        "rollout.dtype: bf16, but",
        "rollout.top_p: ",
        "data: world and path (nowhere.jsonl)",
        "data.path: nowhere.jsonl does not",
    ]
    for start in starts:
        assert any(problem.startswith(start) for problem in reported), start
    assert len(reported) == len(starts), reported


def test_a_value_that_is_wrong_is_never_replaced_by_its_default_in_other_checks(problems):
    """``zero: oops`` must not lead to complaints about zero 0, nor hide those that need no zero."""
    reported = problems("ppo", "policy.engine.zero=oops", "policy.engine.offload=all", "policy.ranks=99")
    assert [problem.partition(":")[0] for problem in reported] == ["policy.engine.zero", "policy.ranks"]


def test_missing_keys_say_what_they_must_be(problems):
    reported = problems(text="kind: ppo")
    assert "steps: missing: it must be a whole number above 0" in reported
    assert any(problem.startswith("policy: missing: it must be a section with keys model,") for problem in reported)
    assert {problem.partition(":")[0] for problem in reported} == {
        "run", "batch", "policy", "critic", "reward", "data", "steps",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "wanted", "message"),
    [
        ("rollout: {}\nsteps: 1", None, "kind: missing: it must be one of sft, rm, distill, dpo, ppo, generate, serve; this "
         "looks like ppo"),
        ("kind: pp0", None, "kind: 'pp0' is not one of sft, rm, distill, dpo, ppo, generate, serve; did you mean ppo?"),
        ("kind: [ppo]", None, "kind: [ppo] is not one of sft, rm, distill, dpo, ppo, generate, serve"),
        ("kind: orpo", None, "kind: 'orpo' is not one of"),
        ("kind: sft", "rm", "kind: sft, but rm was asked for"),
        ("", "rm", "kind: missing"),
    ],
)  # fmt: skip
def test_the_kind_must_be_there_and_agree(problems, text, wanted, message):
    reported = problems(text=text, wanted=wanted)
    assert sum(problem.startswith("kind:") for problem in reported) == 1
    assert reported[0].startswith(message)
    assert len(reported) > 1, "the rest is checked all the same"


def test_an_unreadable_text_is_the_only_problem(problems):
    assert problems(text="kind: ppo\nrun: {name: x") == [
        "line 2, column 14: not YAML: while parsing a flow mapping, expected ',' or '}', but got '<stream end>'"
    ]


def test_a_dumped_job_loads_as_the_same_job(texts, kind):
    config = parse_config(texts[kind])
    again = parse_config(dump_config(config))
    assert again == config
    assert dump_config(again) == dump_config(config)
    written = yaml.safe_load(dump_config(config))
    assert set(written) == set(job_class(kind).model_fields)


OLD_ORDER = {
    "sft": "kind run cluster batch policy data epochs evaluation checkpoint monitoring",
    "rm": "kind run cluster batch reward data loss normalization epochs save evaluation checkpoint monitoring",
    "ppo": "kind run cluster batch policy critic reference reward rollout algorithm data steps evaluation checkpoint "
    "monitoring expose",
}


@pytest.mark.parametrize("recipe", ["demo-sft", "demo-rm", "demo-ppo", "gsm8k-grpo"])
def test_the_config_of_a_run_of_version_0_1_still_loads(recipe):
    """Another library wrote it, its sections in another order, without keys that came later."""
    config = load_config(recipe)
    values = config.model_dump(mode="json")
    old = {key: values[key] for key in OLD_ORDER[config.kind].split()}
    assert old.keys() == values.keys() - {"guards"}, "a section that came later"
    for later in ("split", "config", "evaluation_split"):
        del old["data"][later]
    assert parse_config(yaml.safe_dump(old, sort_keys=False, allow_unicode=True, width=120)) == config


def test_a_list_comes_back_as_what_it_was(texts):
    overrides = ["policy.model.lora={rank: 4, targets: [q_proj, v_proj]}", "policy.engine.optimizer.betas=[0.8, 0.9]"]
    config = parse_config(texts["sft"], overrides)
    assert config.policy.engine.optimizer.betas == (0.8, 0.9)
    assert parse_config(dump_config(config)) == config


def test_tokenizer_from_data_is_written_out(texts):
    text = texts["sft"].replace("tokenizer_from: world", "tokenizer_from: data")
    assert parse_config(text).policy.model.make.tokenizer_from == "world"
    from_file = parse_config(text, ["data.world=null", "data.path=rows.jsonl"])
    assert from_file.policy.model.make.tokenizer_from == "rows.jsonl"


def test_a_source_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean demo-ppo\? recipes are .*hh-rm"):
        load_config("demo-pppo")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "config.yaml").write_text("kind: sft")
    with pytest.raises(ConfigError, match=r"is a directory: name a file in it, such as .*config\.yaml"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xe9}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "latin.yaml")


def test_recipes_are_those_of_the_package_alone_where_it_has_some(tmp_path, monkeypatch):
    from rlhf_ray.config import recipes

    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.yaml").write_text("")
    monkeypatch.setattr(recipes, "DIRECTORIES", (tmp_path / "ours", tmp_path / "theirs"))
    assert set(recipes.recipes()) == {"ours"}
    monkeypatch.setattr(recipes, "DIRECTORIES", (tmp_path / "missing", tmp_path / "theirs"))
    assert set(recipes.recipes()) == {"theirs"}


def test_checking_a_recipe_needs_neither_torch_nor_long():
    code = (
        "import sys, time\n"
        "from rlhf_ray.config.loading import load_config\n"
        "load_config('demo-sft', files=True)\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'vllm', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(time.process_time())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0
