"""Who comes from OpenRLHF is told where each flag stands, under whatever form it is written; every key that is named exists."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.config.jobs.registry import job_classes
from rlhf_ray.config.keys import keys_of, roles_of
from rlhf_ray.config.openrlhf.flags import FLAGS
from rlhf_ray.config.openrlhf.older import GONE, RENAMED
from tests.config.openrlhf_flags import FURTHER_FLAGS, TRAIN_PPO_RAY, read_table

ALL_KEYS = {key for job in job_classes().values() for key in keys_of(job)}
ALL_ROLES = {role for job in job_classes().values() for role in roles_of(job)}
PPO_KEYS = keys_of(job_classes()["ppo"])
OF_PPO = read_table(TRAIN_PPO_RAY)
TABLE = OF_PPO | read_table(FURTHER_FLAGS)
OURS_TOO = {
    "rollout.max_new_tokens",
    "rollout.temperature",
    "rollout.top_p",
    "data.apply_chat_template",
    "data.label_key",
}
"""Flags of ``train_ppo_ray`` that are keys of a ppo job under the same name."""


def names_in(keys: Collection[str], key: str) -> list[str]:
    """The keys of a job that stand for a key of the table."""
    if key.startswith("ROLE."):
        roles = [key.replace("ROLE", role) for role in ("policy", "critic", "reference", "reward")]
        return [name for name in roles if name in keys]
    return [name for name in key.split("|") if name in keys][:1]


def test_the_table_holds_all_flags_of_train_ppo_ray_and_no_other_than_the_product_knows():
    assert len(OF_PPO) == 167
    assert set(TABLE) == set(FLAGS)


def test_every_key_that_an_answer_names_exists():
    answers = [*FLAGS.values(), *GONE.values()]
    assert set(RENAMED.values()) <= set(FLAGS)
    for key in {key for answer in answers for target in answer.keys for key in target.split("|")}:
        assert any(key.replace("ROLE", role) in ALL_KEYS for role in ALL_ROLES), key


@pytest.mark.parametrize("form", ["{}=1", "--{}=1", "--{} 1"])
def test_each_of_the_167_flags_given_to_check_names_our_key_or_has_no_counterpart(texts, tmp_path, capsys, form):
    config = tmp_path / "small.yaml"
    config.write_text(texts["ppo"])
    flags = [flag for flag in OF_PPO if flag not in OURS_TOO]
    assert main(["check", str(config), *" ".join(form.format(flag) for flag in flags).split()]) == 2
    lines = capsys.readouterr().err.splitlines()[1:]
    assert len(lines) == len(flags)
    for flag in flags:
        (line,) = [line for line in lines if line.startswith(f"  - {flag}: ")]
        expected = [name for key in OF_PPO[flag] for name in names_in(PPO_KEYS, key)]
        assert all(name in line for name in expected), line
        assert ("no counterpart" in line) == (not expected), line
        assert f"OpenRLHF's {flag} " in line and "(command line)" in line


def test_every_kind_of_job_answers_every_flag_with_its_own_key_or_that_it_has_none(problems, kind):
    keys = keys_of(job_classes()[kind])
    flags = [flag for flag in TABLE if flag not in keys]
    lines = dict(line.split(": ", 1) for line in problems(kind, *(f"{flag}=1" for flag in flags)))
    assert set(lines) == set(flags)
    for flag, line in lines.items():
        expected = [name for key in TABLE[flag] for name in names_in(keys, key)]
        assert all(f"{name} " in line for name in expected), line
        assert ("no counterpart" in line) == (not expected), line


def test_each_flag_in_a_yaml_file_is_answered_with_its_line(problems, texts):
    flags = [flag for flag in TABLE if flag not in PPO_KEYS]
    for written in (lambda flag: flag, lambda flag: f"--{flag}"):
        lines = [f"'{written(flag)}': 1" for flag in flags]
        reported = problems(text="\n".join([*texts["ppo"].strip().splitlines(), *lines]))
        own = len(texts["ppo"].strip().splitlines())
        expected = {f"{written(flag)}: OpenRLHF's {flag} ": f"(line {own + row})" for row, flag in enumerate(flags, 1)}
        assert len(reported) == len(expected)
        for start, end in expected.items():
            assert [line for line in reported if line.startswith(start) and line.endswith(end)], start


def test_flags_in_sections_of_a_yaml_file_are_looked_up_whole(problems, texts):
    foreign = "algo: {kl: {init_coef: 0.1}, advantage: {gamma: 1.0}}\nds: {lora: {rank: 8}}\nuse_ms: true\n"
    reported = problems(text=texts["rm"] + foreign)
    assert [line.partition(": ")[0] for line in reported] == [
        "algo.kl.init_coef", "algo.advantage.gamma", "ds.lora.rank", "use_ms",
    ]  # fmt: skip
    assert "is algorithm.kl.coefficient, for which this kind of job has no counterpart; remove it" in reported[0]
    assert "is reward.model.lora.rank here" in reported[2]


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        ("ppo", "n_samples_per_prompt=4", "OpenRLHF's n_samples_per_prompt is batch.samples_per_prompt here"),
        ("ppo", "rollout.rollout_batch_size=4", "OpenRLHF's rollout_batch_size is batch.prompts_per_step here"),
        ("ppo", "batch.micro_train_batch_size=4", "is batch.max_tokens_per_micro_batch here (counted in tokens)"),
        ("ppo", "critic.zero_stage=2", "OpenRLHF's zero_stage is critic.engine.zero here"),
        ("ppo", "reference.model_name_or_path=x", "OpenRLHF's model_name_or_path is reference.model.path here"),
        ("rm", "reward.model.lora_rank=4", "OpenRLHF's lora_rank is reward.model.lora.rank here (0 is no lora section)"),
        ("ppo", "zero_stage=2", "is policy.engine.zero or critic.engine.zero or reference.engine.zero or reward.engine.zero"),
        ("ppo", "init_kl_coef=0.1", "OpenRLHF's init_kl_coef is algorithm.kl.coefficient here"),
        ("ppo", "--init_kl_coef=0.1", "OpenRLHF's init_kl_coef is algorithm.kl.coefficient here"),
        ("ppo", "algorithm.kl.init_coef=0.1", "OpenRLHF's init_coef is algorithm.kl.coefficient here"),
        ("ppo", "pretrain=x", "OpenRLHF's pretrain is policy.model.path here"),
        ("rm", "pretrain=x", "OpenRLHF's pretrain is reward.model.path here"),
        ("rm", "seed=1", "OpenRLHF's seed is run.seed here"),
        ("ppo", "reward_pretrain=x", "OpenRLHF's reward_pretrain is reward.model.path here"),
        ("ppo", "actor_num_gpus_per_node=8", "is policy.ranks here (ranks counts nodes x GPUs)"),
        ("ppo", "eps_clip=0.2", "is algorithm.clip_low and algorithm.clip_high here"),
        ("ppo", "actor.loss_agg_mode=token-mean", "is algorithm.aggregation here (token-mean is tokens, "),
        ("ppo", "is_correction_gating=tv", "OpenRLHF's is_correction_gating is algorithm.importance.gating here"),
        ("ppo", "critic.value_clip=0.5", "OpenRLHF's critic.value_clip is algorithm.value_clip here"),
        ("sft", "rollout.temperature=1", "rollout.temperature is a key of other kinds of job"),
        ("rm", "train_batch_size=8", "OpenRLHF's train_batch_size is batch.pairs_per_update here"),
        ("sft", "train_batch_size=8", "OpenRLHF's train_batch_size is batch.sequences_per_update here"),
        ("rm", "packing_samples=true", "has no counterpart here: sequences are always packed; remove it"),
        ("ppo", "ds.packing_samples", "has no counterpart here: sequences are always packed; remove it"),
        ("ppo", "actor.num_nodes=1", "OpenRLHF's actor.num_nodes is policy.ranks here"),
        ("ppo", "actor.lr=1", "did you mean actor.adam.lr? OpenRLHF's actor.adam.lr is policy.engine.optimizer.learning_rate"),
        ("ppo", "algo.kl.init_coeff=1", "did you mean algo.kl.init_coef? OpenRLHF's algo.kl.init_coef is algorithm.kl.coef"),
        ("ppo", "actor.foo=1", "no flag of OpenRLHF 0.11.2 is called so, and its section actor is policy here"),
        ("ppo", "vllm.wrong=1", "no flag of OpenRLHF 0.11.2 is called so, and its section vllm is rollout here"),
        ("rm", "n_samples_per_prompt=4", "is batch.samples_per_prompt, for which this kind of job has no counterpart"),
    ],
)  # fmt: skip
def test_a_flag_is_named_where_it_stands_here(problems, kind, override, message):
    reported = problems(kind, override)
    assert len(reported) == 1
    assert message in reported[0]


def test_a_key_of_the_job_is_never_taken_for_a_flag(problems):
    assert problems("ppo", "rollout.temperature=0.5", "rollout.max_new_tokens=8", "data.prompt_key=question") == []
    assert problems("serve", "port=1", "host=localhost") == []
    (message,) = problems("ppo", "--rollout.temperature=0.5")
    assert "written key=value, without dashes, such as rollout.temperature=0.5" in message


def test_a_flag_behind_a_section_of_ours_is_no_hint_where_the_job_has_no_counterpart(problems):
    assert "OpenRLHF" not in problems("rm", "batch.n_samples_per_prompt=4")[0]
    assert "OpenRLHF" not in problems("ppo", "algorithm.beta=0.1")[0]


def test_a_section_that_held_flags_alone_is_not_checked_as_a_section(problems, texts):
    reported = problems("ppo", "critic.value_clip=0.5", text=texts["ppo"].replace("critic: {", "unused: {"))
    assert [line.partition(": ")[0] for line in reported] == ["critic.value_clip", "unused", "critic"]


def test_a_word_that_is_no_flag_stays_unrecognized(texts, tmp_path, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(texts["ppo"])
    with pytest.raises(SystemExit) as ended:
        main(["check", str(config), "--algo.kl.init_coef", "0.1", "--no-such-option", "run.seed=1"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --no-such-option\n" in capsys.readouterr().err


def test_values_of_a_flag_end_where_a_key_begins(texts, tmp_path, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(texts["ppo"])
    words = [
        "--reward.clip_range",
        "-10",
        "10",
        "run.sed=1",
        "--actor.adam.betas",
        "0.9",
        "0.95",
        "--ds.packing_samples",
    ]
    assert main(["check", str(config), *words]) == 2
    lines = [line.strip(" -").partition(":")[0] for line in capsys.readouterr().err.splitlines()[1:]]
    assert sorted(lines) == ["actor.adam.betas", "ds.packing_samples", "reward.clip_range", "run.sed"]


def test_a_key_of_ours_written_with_dots_in_a_file_is_told_its_section(problems, texts):
    (message,) = problems(text=texts["ppo"] + "\n'algorithm.kl.coefficient': 0.1\n")
    assert "write coefficient inside of the section algorithm.kl, not with dots" in message
