"""Files that a job names are looked at before anything starts: each mistake with its path and line, nothing loaded."""

from __future__ import annotations

import contextlib
import gzip
import json
import sys

import pytest

from rlhf_ray.config.loading import load_config, parse_config
from rlhf_ray.config.preflight import check_files, hub_ids
from rlhf_ray.errors import ConfigError
from rlhf_ray.rows.read import WAY_OUT

SFT = """
kind: sft
run: {name: small}
policy: {model: {path: MODEL}, engine: {optimizer: {learning_rate: 1e-3}}}
data: {path: DATA}
batch: {sequences_per_update: 8}
"""
TOKENIZER = {"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": [], "normalizer": None}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_model(directory, **config):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (directory / "model.safetensors").write_bytes(b"")
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return directory


def sft_problems(model="org/name", rows="org/rows"):
    return check_files(parse_config(SFT.replace("MODEL", str(model)).replace("DATA", str(rows))))


def rows_problems(here, name, content, kind="sft"):
    path = here / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if kind == "sft":
        return sft_problems(rows=name)
    text = SFT.replace("MODEL", "org/name").replace("DATA", name).replace("kind: sft", "kind: rm")
    text = text.replace("policy:", "reward:").replace("sequences_per_update", "pairs_per_update")
    return check_files(parse_config(text, ["data.evaluation_fraction=0"]))


# -------------------------------------------------------------------------------------------------------------- models


def test_a_hub_id_is_no_problem_and_is_known_as_one():
    assert sft_problems() == []
    assert hub_ids(parse_config(SFT.replace("MODEL", "org/name").replace("DATA", "rows.jsonl"))) == ["org/name"]


def test_a_good_directory_is_no_problem(here):
    assert sft_problems(make_model(here / "model")) == []


def test_a_model_path_that_does_not_exist(here):
    reported = sft_problems("models/llama/8b")
    assert reported == [
        "policy.model.path: models/llama/8b does not exist: name a model directory, or a hub id as org/name"
    ]
    assert "would be the result of run demo-sft: train that first" in sft_problems("runs/demo-sft/final")[0]
    assert "does not exist" in sft_problems("gpt2")[0]


def test_a_slip_in_a_folder_that_is_here_is_not_taken_for_a_hub_id(here):
    make_model(here / "models" / "llama")
    assert sft_problems("models/llama") == []
    assert "models/lama does not exist" in sft_problems("models/lama")[0]


def test_a_file_is_not_a_model(here):
    (here / "model.bin").write_text("")
    assert "model.bin is a file, but a model is a directory" in sft_problems(here / "model.bin")[0]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "has no config.json: it is not a model directory"),
        ("config.json", "{", "config.json:1: not JSON"),
        ("config.json", "[]", "config.json: not a JSON object"),
        ("config.json", "{}", "names no model_type"),
        ("tokenizer.json", None, "has no tokenizer.json: save the tokenizer beside the model"),
        ("tokenizer.json", '{\n"model": ', "tokenizer.json:2: not JSON"),
        ("model.safetensors", None, "holds no weights (*.safetensors)"),
    ],
)
def test_a_directory_that_is_no_model_says_what_it_lacks(here, file, content, message):
    model = make_model(here / "model")
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_text(content)
    reported = sft_problems(model)
    assert len(reported) == 1
    assert message in reported[0]
    assert reported[0].startswith("policy.model.path: ")


def test_pickled_weights_are_refused_by_name(here):
    model = make_model(here / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "only as pickle (pytorch_model.bin), which may run code: save them as safetensors" in sft_problems(model)[0]


def test_all_that_a_directory_lacks_comes_at_once(here):
    (here / "empty").mkdir()
    assert len(sft_problems(here / "empty")) == 3


def test_an_adapter_needs_its_base(here):
    adapter = here / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")

    def problems(base, **options):
        content = {"peft_type": "LORA", "base_model_name_or_path": base, **options}
        (adapter / "adapter_config.json").write_text(json.dumps(content))
        return sft_problems(adapter)

    assert "is an adapter of missing/base/model, which does not exist" in problems("missing/base/model")[0]
    assert (
        problems("org/base", bias="none", use_dora=False, init_lora_weights=True, megatron_core="megatron.core") == []
    )
    refused = problems("org/base", bias="all", use_dora=True, init_lora_weights="pissa_niter_4")
    assert len(refused) == 1 and "merge it into its base with PEFT" in refused[0]
    assert "uses use_dora (True), bias ('all'), init_lora_weights ('pissa_niter_4')" in refused[0]


def test_a_tokenizer_made_from_a_missing_file(texts, here):
    built = parse_config(texts["sft"].replace("tokenizer_from: world", "tokenizer_from: rows.jsonl"))
    assert check_files(built) == [
        "policy.model.make.tokenizer_from: rows.jsonl does not exist: "
        "name a data file, world, or data for the job's own data"
    ]


# ---------------------------------------------------------------------------------------------------------------- rows

GOOD = {"prompt": "p", "answer": "a"}
DEMONSTRATION = "'prompt' and 'answer' or 'messages' or 'conversations' or 'conversation'"
LINE = json.dumps(GOOD) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINE * 3),
        ("rows.jsonl", "\n" + LINE),
        ("rows.jsonl.gz", gzip.compress(LINE.encode(), mtime=0)),
        ("rows.json", json.dumps([GOOD])),
        ("rows.csv", "prompt,answer\np,a\n"),
    ],
)
def test_good_rows_are_no_problem(here, name, content):
    assert rows_problems(here, name, content) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "", "data.path: rows.jsonl: holds no rows"),
        ("rows.jsonl", "\n\n", "data.path: rows.jsonl: holds no rows"),
        ("rows.json", "[]", "data.path: rows.json: holds no rows"),
        ("rows.csv", "prompt,answer\n", "data.path: rows.csv: holds no rows"),
        (
            "rows.jsonl",
            LINE + '{"prompt": "p", "reply": "a"}\n' + LINE,
            f"data.path: rows.jsonl:2: no {DEMONSTRATION}; its keys are 'prompt', 'reply'",
        ),
        ("rows.jsonl", LINE + "{oops\n", "data.path: rows.jsonl:2: not JSON: "),
        ("rows.jsonl", LINE + "[1]\n", "rows.jsonl:2: a row is a mapping of keys to values, but this is a list"),
        ("rows.jsonl", LINE + '{"prompt": 3, "answer": "a"}\n', "rows.jsonl:2: 'prompt' must hold a text, this is of type int"),
        ("rows.jsonl", '{"prompt": [{"role": "u"}], "answer": "a"}', "rows.jsonl:1: 'prompt': message 1 has no role "),
        ("rows.jsonl", LINE + '{"prompt": "p", "answer": ""}\n', "rows.jsonl:2: 'answer' must hold a text"),
        ("rows.jsonl", '{"x": 1}\n' * 7, f"no {DEMONSTRATION}; its keys are 'x': {WAY_OUT} (7 of the first 7 rows "),
        ("rows.json", "[{\n]", "data.path: rows.json:2: not JSON: "),
        ("rows.json", '{"prompt": "p"}', "rows.json:1: a .json file is a list of rows"),
        ("rows.json", '[{"prompt": "p"}]', "rows.json:1: no 'prompt' and 'answer'"),
        ("rows.csv", "prompt,reply\np,a\n", "rows.csv:2: no 'prompt' and 'answer'"),
        ("rows.jsonl.gz", b"not gzip", "rows.jsonl.gz: cannot be read: "),
        ("rows.jsonl.gz", gzip.compress(LINE.encode() * 50, mtime=0)[:-12], "rows.jsonl.gz: cannot be read: "),
        ("rows.jsonl", b'{"prompt": "\xff"}', "rows.jsonl:1: not UTF-8: "),
        ("rows.parquet", b"PAR1 not", "rows.parquet: not a parquet file: "),
        ("rows.txt", "text", "rows.txt: not a format that is read here: .jsonl, .jsonl.gz, "),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_file_and_line(here, name, content, message):
    reported = rows_problems(here, name, content)
    assert len(reported) == 1
    assert message in reported[0]


def test_only_the_first_hundred_rows_are_looked_at(here):
    assert rows_problems(here, "rows.jsonl", LINE * 100 + "{oops\n") == []
    assert "rows.jsonl:100: not JSON" in rows_problems(here, "rows.jsonl", LINE * 99 + "{oops\n")[0]


def test_parquet_rows(here):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": ["p"] * 3, "answer": ["a", "b", None]}), here / "rows.parquet")
    assert "rows.parquet: row 3: 'answer' must hold a text" in sft_problems(rows="rows.parquet")[0]
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), here / "none.parquet")
    assert "none.parquet: holds no rows" in sft_problems(rows="none.parquet")[0]


def test_a_data_path_that_does_not_exist(here):
    message = "data.path: rows.jsonl does not exist: name a data file, as in data.path=pairs.jsonl.gz"
    assert sft_problems(rows="rows.jsonl") == [message]
    (here / "empty").mkdir()
    assert (
        "data.path: empty: holds no files: name a data file, or the folder of a data set"
        in sft_problems(rows="empty")[0]
    )


def test_each_kind_needs_its_own_keys(here, texts):
    pair = json.dumps({"chosen": "p c", "rejected": "p r"})
    assert rows_problems(here, "rows.jsonl", pair, kind="rm") == []
    assert "no 'chosen' and 'rejected'" in rows_problems(here, "rows.jsonl", LINE, kind="rm")[0]
    ppo = [*("data.world=null", "data.path=rows.jsonl"), "reward={function: rlhf_ray.rewards.verifiers:gsm8k}"]
    labelled = json.dumps({"chosen": "p c", "rejected": "p r", "label": "7"})
    for row, fine in ((labelled, True), ('{"prompt": "p", "label": 7}', True), ('{"question": "q"}', False)):
        (here / "rows.jsonl").write_text(row)
        assert (check_files(parse_config(texts["ppo"], ppo)) == []) == fine
    message = check_files(parse_config(texts["ppo"], ppo))
    assert message == [
        f"data.path: rows.jsonl:1: no 'prompt' or 'chosen' and 'rejected'; its keys are 'question': {WAY_OUT}"
    ]
    unlabelled = [*ppo, "data.prompt_key=question", "reward={url: http://127.0.0.1:1}"]
    assert check_files(parse_config(texts["ppo"], unlabelled)) == []


AT = "data.path: rows.jsonl:1: "
LABELS = [
    ({"prompt": "p"}, "{function: gsm8k}", AT + "no label, but the reward function gsm8k compares"),
    ({"prompt": "p", "label": "x"}, "{function: gsm8k}", AT + "the label under 'label' holds no number"),
    ({"prompt": "p", "label": "x"}, "{function: exact_match}", ""),
    ({"prompt": "p", "label": ["7"]}, "{function: exact_match}", AT + "the label under 'label' must be one"),
    ({"prompt": "p", "label": ["7"]}, "{function: 'own.py:takes'}", ""),
    ({"prompt": "p"}, "{function: rlhf_ray.rewards.verifiers:gsm8k}", AT + "no label"),
    ({"prompt": "p"}, "{mixture: {a: {function: 'own.py:other'}, b: {function: exact_match}}}", AT + "no label"),
    ({"prompt": "p"}, "{function: 'own.py:takes'}", "reward.function: own.py:takes asks for labels, but no row"),
    ({"prompt": "p"}, "{function: 'own.py:can_do_without'}", ""),
    ({"prompt": "p"}, "{function: 'own.py:other'}", ""),
    ({"prompt": "p", "label": "a", "answer": "b"}, "{url: 'http://127.0.0.1:1'}", ""),
    ({"prompt": "p", "label": "a", "answer": "b"}, "{function: 'own.py:takes'}", AT + "'label' and 'answer'"),
    ({"prompt": "p", "solution": "7"}, "{function: gsm8k}", ""),
    ({"prompt": "p", "reward_model": {"ground_truth": "7"}}, "{function: gsm8k}", ""),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reward", "problem"), LABELS)
def test_a_reward_function_finds_the_labels_that_it_compares_with(here, texts, row, reward, problem):
    (here / "own.py").write_text(
        "def takes(responses, labels): ...\ndef other(responses): ...\n"
        "async def can_do_without(responses, *, labels=None): ...\n"
    )
    (here / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = parse_config(texts["ppo"], ["data.world=null", "data.path=rows.jsonl", f"reward={reward}"])
    problems = check_files(config)
    assert [text.startswith(problem) for text in problems] == ([True] if problem else [])


def test_labels_are_looked_for_in_the_columns_that_the_config_leaves(here, texts):
    (here / "own.py").write_text("def takes(responses, labels): ...\n")
    (here / "rows.jsonl").write_text('{"prompt": "p", "label": "7", "winner": "8"}\n')
    ppo = ["data.world=null", "data.path=rows.jsonl", "reward={function: 'own.py:takes'}"]
    assert check_files(parse_config(texts["ppo"], ppo)) == []
    (problem,) = check_files(parse_config(texts["ppo"], [*ppo, "data.ignore_columns=[label]"]))
    assert problem.startswith("reward.function: own.py:takes asks for labels, but no row")
    renamed = [*ppo, "data.ignore_columns=[label]", "data.rename_columns={winner: answer}"]
    assert check_files(parse_config(texts["ppo"], renamed)) == []


def test_a_row_without_a_label_is_left_out_where_bad_rows_are(here, texts):
    (here / "rows.jsonl").write_text('{"prompt": "p"}\n{"prompt": "q", "label": "7"}\n')
    ppo = ["data.world=null", "data.path=rows.jsonl", "reward={function: gsm8k}"]
    assert len(check_files(parse_config(texts["ppo"], ppo))) == 1
    assert check_files(parse_config(texts["ppo"], [*ppo, "data.bad_rows=drop"])) == []
    (here / "rows.jsonl").write_text('{"prompt": "p"}\n')
    (problem,) = check_files(parse_config(texts["ppo"], [*ppo, "data.bad_rows=drop"]))
    assert "no label, but the reward function gsm8k" in problem


def test_a_label_far_down_the_file_is_enough_for_a_function_that_takes_none_too(here, texts):
    (here / "own.py").write_text("def takes(responses, labels): ...\n")
    rows = [{"prompt": "p"}] * 150 + [{"prompt": "p", "label": "7"}]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = parse_config(
        texts["ppo"], ["data.world=null", "data.path=rows.jsonl", "reward={function: 'own.py:takes'}"]
    )
    assert check_files(config) == []


def test_the_gold_score_needs_labels_in_the_rows_that_it_judges(here, texts):
    for name, row in (("rows", {"prompt": "p"}), ("held", {"prompt": "p", "label": "7"})):
        (here / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    ppo = ["data.world=null", "data.path=rows.jsonl", "reward={url: http://127.0.0.1:1}", "evaluation.gold=gsm8k"]
    assert check_files(parse_config(texts["ppo"], [*ppo, "data.evaluation_path=held.jsonl"])) == []
    (problem,) = check_files(parse_config(texts["ppo"], [*ppo, "data.evaluation_fraction=0.5"]))
    assert problem.startswith(AT + "no label, but the reward function gsm8k")


PAIR = json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [], "chosen": "c", "rejected": "r"}, "rows.jsonl:2: 'prompt': holds no message"),
        (
            {"chosen": [{"role": "user", "content": "q"}], "rejected": "r"},
            "rows.jsonl:2: 'chosen' is a conversation and",
        ),
        ({"chosen": "c", "rejected": "r", "margin": "high"}, "rows.jsonl:2: 'margin' must hold a finite number"),
        (
            {"prompt": "p", "chosen": "c", "rejected": ""},
            "rows.jsonl:2: 'rejected' must hold a text or a list of messages",
        ),
        (
            {"chosen": [{"role": "assistant", "content": "c"}], "rejected": [{"role": "assistant", "content": "r"}]},
            "rows.jsonl:2: message 1 of 'chosen' is of 'assistant', but 'system' or 'developer' or 'user' was expected",
        ),
    ],
)
def test_a_bad_pair_is_named_with_file_and_line(here, row, message):
    (reported,) = rows_problems(here, "rows.jsonl", PAIR + json.dumps(row) + "\n", kind="rm")
    assert message in reported


def test_every_source_has_labels_under_its_own_key(here, texts):
    (here / "a.jsonl").write_text('{"prompt": "p", "label": "7", "x": "8"}\n')
    (here / "b.jsonl").write_text('{"prompt": "p", "result": {"number": 7}}\n')
    sources = "a: {path: a.jsonl}, b: {path: b.jsonl, label_key: result.number}"
    ppo = [f"data={{sources: {{{sources}}}, evaluation_fraction: 0.1}}", "reward={function: gsm8k}"]
    config = parse_config(texts["ppo"], ppo)
    assert check_files(config) == []
    keys = {name: config.row_reader(source).labels.key for name, source in config.data.files.items()}
    assert keys == {"a": None, "b": "result.number"}
    (problem,) = check_files(parse_config(texts["ppo"], [*ppo, "data.sources.b.label_key=null"]))
    assert problem.startswith("data.sources.b.path: b.jsonl:1: no label")


def test_every_source_is_looked_at_with_its_own_keys(here, texts):
    (here / "a.jsonl").write_text(PAIR)
    (here / "b.jsonl").write_text('{"better": "p c", "worse": "p r"}\n')
    sources = "a: {path: a.jsonl}, b: {path: b.jsonl}, c: {path: nowhere.jsonl}, d: {path: Org/set}"
    data = f"data={{sources: {{{sources}}}, evaluation_fraction: 0.1}}"
    config = parse_config(texts["rm"], [data])
    assert check_files(config) == [
        f"data.sources.b.path: b.jsonl:1: no 'chosen' and 'rejected'; its keys are 'better', 'worse': {WAY_OUT}",
        "data.sources.c.path: nowhere.jsonl does not exist: name a data file, as in data.sources.c.path=pairs.jsonl.gz",
    ]
    assert hub_ids(config) == ["Org/set"]
    good = ["data.sources.b.chosen_key=better", "data.sources.b.rejected_key=worse", "data.sources.c.path=a.jsonl"]
    assert check_files(parse_config(texts["rm"], [data, *good])) == []


def test_what_is_longer_than_the_models_context(here, texts):
    make_model(here / "model", max_position_embeddings=256)
    message = "data.max_tokens: 512 is more than model ({}.model) reads: lower it to 256"
    for kind, role in (("rm", "reward"), ("sft", "policy")):
        config = [f"{role}.model={{path: model, dtype: fp32{', head_init: zero' if kind == 'rm' else ''}}}"]
        assert check_files(parse_config(texts[kind], config)) == [message.format(role)]
        assert check_files(parse_config(texts[kind], [*config, "data.max_tokens=256"])) == []


def test_the_splits_of_a_folder_are_looked_at_and_a_file_has_none(here, texts):
    (here / "set").mkdir()
    (here / "set" / "train.jsonl").write_text(PAIR)
    (here / "set" / "test.jsonl").write_text('{"prompt": "p"}\n')
    keys = "data={{path: {}, split: train, evaluation_split: test}}"
    assert check_files(parse_config(texts["rm"], [keys.format("set")])) == [
        f"data.evaluation_split: set (test): row 1: 'chosen' must hold a text or a list of messages, this is empty: {WAY_OUT}"
    ]
    (here / "rows.jsonl").write_text(PAIR)
    problem = check_files(parse_config(texts["rm"], ["data={path: rows.jsonl, split: train, evaluation_fraction: 0}"]))
    assert problem == [
        "data.path: rows.jsonl: one file has neither splits nor configurations: remove split, or name the folder of a data set"
    ]


def test_the_evaluation_file_is_looked_at_too(here):
    (here / "rows.jsonl").write_text(LINE)
    config = parse_config(
        SFT.replace("MODEL", "org/name").replace("DATA", "rows.jsonl"), ["data.evaluation_path=held.jsonl"]
    )
    assert check_files(config) == [
        "data.evaluation_path: held.jsonl does not exist: name a data file, as in data.evaluation_path=pairs.jsonl.gz"
    ]


def test_a_file_that_is_wrong_hides_no_problem_of_another(problems, texts):
    text = texts["rm"].replace("data: {world: {}}", "data: {sources: {a: {path: a.jsonl}, b: 3, c: {path: c.jsonl, weight: x}, "
                               "'d d': {path: d.jsonl}}, evaluation_path: held.jsonl, split: 3}")  # fmt: skip
    keys = [line.partition(": ")[0] for line in problems(text=text, files=True)]
    assert {"data.sources.a.path", "data.sources.c.path", "data.evaluation_path"} <= set(keys)
    assert {"data.sources.b", "data.sources.c.weight", "data.sources", "data.split"} <= set(keys)


def test_a_wrong_term_or_place_of_the_reward_hides_no_problem_of_another(problems):
    reward = "reward={model: {path: gone}, mixture: 3}"
    keys = [line.partition(": ")[0] for line in problems("ppo", reward, files=True)]
    assert "reward.model.path" in keys and "reward.mixture" in keys
    reward = (
        "reward={mixture: {a: {model: {path: gone}, function: 3}, b: {function: 'gone.py:f'}, c: 3, "
        "d: {model: 3, token_file: gone, url: 'http://x'}}, model: {path: gone_too}}"
    )
    keys = [line.partition(": ")[0] for line in problems("ppo", reward, files=True)]
    for key in ("a.model.path", "a.function", "b.function", "c", "d.model", "d.token_file"):
        assert f"reward.mixture.{key}" in keys
    assert "reward.model.path" in keys


# ----------------------------------------------------------------------------------------------------------------- ppo


def ppo(here, texts, *overrides, **policy_config):
    if not (here / "policy").exists():
        make_model(here / "policy", **policy_config)
    models = [f"{role}.model={{path: policy, dtype: fp32}}" for role in ("policy", "critic", "reference", "reward")]
    return check_files(parse_config(texts["ppo"], [*models, *overrides]))


def test_critic_and_reference_read_the_policys_tokens(here, texts):
    assert ppo(here, texts) == []
    other = make_model(here / "other")
    assert ppo(here, texts, "critic.model.path=other") == []
    same = {**TOKENIZER, "post_processor": {"type": "ByteLevel"}, "padding": {"strategy": "BatchLongest"}}
    (other / "tokenizer.json").write_text(json.dumps(same))
    assert ppo(here, texts, "critic.model.path=other") == [], "neither adds a token to a text"
    (other / "tokenizer.json").write_text(json.dumps({**TOKENIZER, "added_tokens": [{"id": 1, "content": "<x>"}]}))
    for role in ("critic", "reference"):
        reported = ppo(here, texts, f"{role}.model.path=other")
        assert len(reported) == 1
        assert reported[0].startswith(
            f"{role}.model: its tokenizer (other) is not the policy's (policy), whose token ids"
        )
    assert ppo(here, texts, "reward.model.path=other") == [], "the reward owns its tokenizer"


def test_made_tokenizers_are_compared_by_how_they_are_made(here, texts):
    make = "{shape: llama-tiny, tokenizer_from: rows.jsonl, vocabulary: 300}"
    (here / "rows.jsonl").write_text(LINE)
    reported = check_files(parse_config(texts["ppo"], [f"policy.model.make={make}"]))
    assert [problem.partition(":")[0] for problem in reported] == ["critic.model", "reference.model"]
    both = [f"{role}.model.make={make}" for role in ("policy", "critic", "reference")]
    assert check_files(parse_config(texts["ppo"], both)) == []
    assert len(check_files(parse_config(texts["ppo"], [*both, "critic.model.make.vocabulary=301"]))) == 1


def test_the_rollout_must_be_able_to_serve_the_policy(here, texts):
    parallel = ["rollout.tensor_parallel=4", "rollout.resources.gpus_per_rank=4"]
    reported = ppo(here, texts, *parallel, num_attention_heads=6, max_position_embeddings=256)
    assert reported == [
        "rollout.tensor_parallel: 4 does not divide the 6 attention heads of policy",
        "rollout.max_model_tokens: 512 is more than policy (policy.model) reads: lower it to 256",
    ]


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 6}, "6 heads of keys and values"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, "3 heads of keys and values"),
        ({"num_attention_heads": 8, "intermediate_size": 1026}, "1026 inner units of a feed-forward layer"),
        (
            {"num_attention_heads": 8, "intermediate_size": 1026, "moe_intermediate_size": 66},
            "66 inner units of an expert",
        ),
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1024, "vocab_size": 1001}, None),
        (
            {
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
                "intermediate_size": 1026,
                "moe_intermediate_size": 64,
            },
            None,
        ),
    ],
)
def test_a_model_that_cannot_be_cut_for_tensor_parallelism_is_refused_with_its_number(here, texts, sizes, problem):
    parallel = ["rollout.tensor_parallel=4", "rollout.resources.gpus_per_rank=4"]
    said = [f"rollout.tensor_parallel: 4 does not divide the {problem} of policy"] if problem else []
    assert ppo(here, texts, *parallel, **sizes) == said


def test_a_made_model_that_cannot_be_cut_is_refused_too(texts):
    parallel = ["rollout.tensor_parallel=3", "rollout.resources.cpus_per_rank=3.0"]
    assert check_files(parse_config(texts["ppo"], parallel)) == [
        "rollout.tensor_parallel: 3 does not divide the 2 attention heads of llama-tiny",
        "rollout.tensor_parallel: 3 does not divide the 64 inner units of a feed-forward layer of llama-tiny",
    ]


def test_a_cache_on_cpu_that_does_not_hold_the_longest_sequence_is_refused_with_what_it_must_be(here, texts):
    """A token of llama-tiny takes 2 (keys and values) x 2 layers x 1 head x 32 x 4 bytes = 512; 4096 of them 2 MiB."""
    long = [
        "rollout.max_model_tokens=4096",
        *(f"{role}.max_tokens_per_micro_batch=4096" for role in ("policy", "critic")),
    ]
    just = 2 * 2**20 / 2**30
    assert check_files(parse_config(texts["ppo"], [*long, f"rollout.kv_cache_gib={just}"])) == []
    short = f"rollout.kv_cache_gib={just * 0.999}"
    assert [problem[:75] for problem in check_files(parse_config(texts["ppo"], [*long, short]))] == [
        "rollout.kv_cache_gib: 0.00195117, but one sequence of rollout.max_model_tokens"[:75]
    ]
    assert (
        "takes 0.001953 GiB of it in llama-tiny: raise it above 0.002"
        in check_files(parse_config(texts["ppo"], [*long, short]))[0]
    )
    for other in ("rollout.backend=transformers", "rollout.dtype=bf16"):
        assert check_files(parse_config(texts["ppo"], [*long, short, other])) == []


@pytest.mark.parametrize(
    ("other", "refused"),
    [
        ({}, 1),
        ({"sliding_window": 64}, 0),
        ({"kv_lora_rank": 64}, 0),
        ({"multi_query": True}, 0),
        ({"num_kv_heads": 1}, 0),
    ],
)
def test_a_cache_whose_size_is_not_known_is_left_to_vllm(here, texts, other, refused):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
    assert len(ppo(here, texts, "rollout.kv_cache_gib=0.0001", **sizes, **other)) == refused


@pytest.mark.parametrize(
    ("function", "content", "message"),
    [
        ("rewards.py:score", None, "reward.function: rewards.py does not exist: name a Python file, as path.py:name"),
        (
            "rewards.py:score",
            "def other(): ...",
            "reward.function: rewards.py defines no 'score'; it defines other",
        ),
        ("rewards.py:score", "x = (", "reward.function: rewards.py:1: not Python: "),
    ],
)
def test_a_reward_function_is_looked_for_and_never_run(here, texts, function, content, message):
    if content is not None:
        (here / "rewards.py").write_text(f"import nothing_of_the_kind\n{content}" if "def" in content else content)
    reported = check_files(parse_config(texts["ppo"], [f"reward={{function: {function}}}"]))
    assert len(reported) == 1
    assert reported[0].startswith(message)


@pytest.mark.parametrize(
    "line", ["def score(x): ...", "async def score(x): ...", "from elsewhere import score", "score = print"]
)
def test_a_reward_function_that_is_there(here, texts, line):
    (here / "rewards.py").write_text(f"import nothing_of_the_kind\n{line}\n")
    assert check_files(parse_config(texts["ppo"], ["reward={function: rewards.py:score}"])) == []
    assert "nothing_of_the_kind" not in sys.modules


# ------------------------------------------------------------------------------------------------------------- the rest


def test_a_token_file_must_hold_a_token(here, texts):
    config = parse_config(texts["serve"], ["token_file=token"])
    assert "token_file: token does not exist" in check_files(config)[0]
    (here / "token").write_text("\n")
    assert "token_file: token is empty" in check_files(config)[0]
    (here / "token").write_text("secret\n")
    assert "shorter than 16 characters" in check_files(config)[0]
    (here / "token").write_text(f"{'secret' * 4}\n")
    assert check_files(config) == []


def test_runs_are_written_under_a_directory(here, texts):
    (here / "runs").write_text("")
    assert "run.root: runs is a file" in check_files(parse_config(texts["sft"]))[0]


@pytest.mark.parametrize("name", ["lr[1]", "best?", "a*"])
def test_a_root_that_deepspeed_takes_for_a_pattern_is_refused_before_anything_is_saved_there(name, here, texts):
    """``findings/deepspeed_loads_a_neighbour_of_the_folder.sh``; also where only the folder that the command runs in is one."""
    mark = next(mark for mark in "*?[" if mark in name)
    named = check_files(parse_config(texts["sft"], [f"run.root='{name}/runs'"]))
    (here / name).mkdir()
    with contextlib.chdir(here / name):
        inside = check_files(parse_config(texts["sft"]))
    for problems in (named, inside):
        (problem,) = [problem for problem in problems if problem.startswith("run.root")]
        assert f"{here / name}/runs holds {mark}, which DeepSpeed takes for a pattern" in problem


def test_files_come_with_the_other_problems(here):
    with pytest.raises(ConfigError) as error:
        load_config("demo-ppo", ["stepps=3", "policy.engine.zero=9"], files=True)
    starts = [problem.partition(":")[0] for problem in error.value.problems]
    assert starts == [
        "stepps", "policy.engine.zero", "policy.model.path", "critic.model.path", "reference.model.path",
        "reward.model.path",
    ]  # fmt: skip


def test_the_recipes_for_gpus_are_accepted_where_their_models_are_not():
    for name in ("qwen3-0.6b-1gpu", "llama-3-8b-8gpu", "llama-3-70b-4nodes"):
        assert hub_ids(load_config(name, files=True))


def test_the_recipes_for_pairs_take_a_file(here):
    (here / "pairs.jsonl").write_text(
        json.dumps({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"})
    )
    make_model(here / "runs" / "hh-rm" / "final")
    for name in ("hh-rm", "hh-ppo"):
        config = load_config(name, ["data.path=pairs.jsonl"], files=True)
        role = config.reward if name == "hh-rm" else config.policy
        assert role.model.make.tokenizer_from == "pairs.jsonl"
