"""What check says of an architecture before anything starts: the reason, and what serves it instead.

``tests/architectures`` holds the table against what transformers and this project really do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.files.architectures import NOT_RUN, SERVED_BY_VLLM, reason_not_run
from rlhf_ray.config.loading import parse_config
from rlhf_ray.config.preflight import check_files

SERVE = "kind: serve\nrun: {name: small}\nreward: {model: {path: model, dtype: fp32}}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(here: Path, **config: Any) -> None:
    (here / "model").mkdir(exist_ok=True)
    (here / "model" / "config.json").write_text(json.dumps(config))
    (here / "model" / "model.safetensors").write_bytes(b"")
    (here / "model" / "tokenizer.json").write_text("{}")


GPU = ["rollout.resources.gpus_per_rank=1"]
TRAIN = ["reward.model={path: model, dtype: fp32, head_init: zero}"]


@pytest.mark.parametrize(
    ("config", "served", "trained"),
    [
        ({"model_type": "llama"}, None, None),
        ({"model_type": "llama", "layer_types": ["full_attention", "sliding_attention"]}, None, None),
        ({"model_type": "granitemoehybrid", "layer_types": ["attention"]}, None, None),
        (
            {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]},
            "it has layers of type mamba, and packs support attention, full_attention, sliding_attention. Choose another",
            "it has layers of type mamba",
        ),
        (
            {"model_type": "gpt_oss"},
            "a gpt_oss model does not run packed: its attention uses sinks. Set scorer to vllm, which scores it",
            "a gpt_oss model does not run packed: its attention uses sinks. Choose another model",
        ),
        ({"model_type": "falcon"}, "Set scorer to vllm", "attention interface. Choose another model"),
        ({"model_type": "mamba"}, "keep a state or convolve", "keep a state or convolve"),
        ({"model_type": "x", "text_config": {"model_type": "llama4_text"}}, "chunks of the text", "chunks of the text"),
        ({"model_type": "t5"}, "it has an encoder and a decoder", "it has an encoder and a decoder"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "awq"}},
            "it holds weights that are quantised already (awq), which is not supported: give the model in bf16",
            "quantised already (awq)",
        ),
    ],
)
def test_what_check_says(
    here: Path, texts: dict[str, str], config: dict[str, Any], served: str | None, trained: str | None
) -> None:
    make(here, **config)
    for problems, expected in (
        (check_files(parse_config(SERVE)), served),
        (check_files(parse_config(texts["rm"], TRAIN)), trained),
    ):
        assert len(problems) == (expected is not None), problems
        if expected is not None:
            assert problems[0].startswith("reward.model.path: model: ") and expected in problems[0]


def test_what_vllm_cannot_serve_is_said_under_its_key(here: Path) -> None:
    longrope = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    phi3 = {"model_type": "phi3", "original_max_position_embeddings": 64, "rope_scaling": longrope}
    vllm = ["reward.scorer=vllm"]
    make(here, **phi3)
    assert check_files(parse_config(SERVE)) == [], "packed rotates each item by its own length"
    assert check_files(parse_config(SERVE, [*vllm, "max_tokens=64"])) == []
    assert check_files(parse_config(SERVE, [*vllm, "max_tokens=65"])) == [
        "reward.scorer: model: vLLM rotates all items alike, but RoPE of this model depends on the length beyond 64 tokens: "
        "lower max_tokens (now 65) to that, or set scorer to packed"
    ]
    make(here, model_type="gemma3_text")
    assert check_files(parse_config(SERVE, vllm)) == [
        "reward.scorer: model: vLLM's pooling runner does not score a gemma3_text reward model as transformers does: set "
        "scorer to packed"
    ]
    make(here, model_type="bloom")
    assert check_files(parse_config(SERVE, vllm))[0].endswith("as transformers does: choose another model")
    make(here, model_type="llama", architectures=["LlamaForCausalLM"])
    assert check_files(parse_config(SERVE, vllm))[0].startswith(
        "reward.scorer: model: it holds LlamaForCausalLM: vLLM's"
    )
    make(here, model_type="gpt_oss", architectures=["GptOssForSequenceClassification"])
    assert check_files(parse_config(SERVE, vllm)) == []


def test_engines_of_vllm_rotate_a_policy_as_the_trainer_does(here: Path, texts: dict[str, str]) -> None:
    rope = {"rope_type": "dynamic", "factor": 8.0}
    make(here, model_type="llama", max_position_embeddings=300, rope_parameters=rope)
    policy = ["policy.model={path: model, dtype: fp32}", "critic.model={path: model, dtype: fp32, head_init: zero}"]
    policy.append("reference.model={path: model, dtype: fp32}")
    problem = (
        "rollout.max_model_tokens: vLLM rotates all sequences alike, but RoPE of model depends on the length beyond 300"
    )
    found = check_files(parse_config(texts["ppo"], [*policy, "rollout.max_model_tokens=301"]))
    assert [text for text in found if text.startswith(problem)]
    for more in (["rollout.max_model_tokens=300"], ["rollout.max_model_tokens=301", "rollout.backend=transformers"]):
        assert not [text for text in check_files(parse_config(texts["ppo"], [*policy, *more])) if "rotates" in text]


MIXTURE = {"model_type": "mixtral", "num_local_experts": 4}


@pytest.mark.parametrize(
    ("config", "more", "expected"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 4, "hidden_size": 64, "moe_intermediate_size": 48}, [], None),
        (
            {"model_type": "deepseek_v3"},
            [],
            "does not sample from policies of type deepseek_v3: it gives other log-probs",
        ),
        ({"model_type": "ernie4_5_moe"}, [], "type ernie4_5_moe: its router for CPU knows no bias and no sigmoid"),
        ({"model_type": "phimoe"}, [], "type phimoe: it does not read what transformers writes"),
        ({"model_type": "x", "text_config": {"model_type": "phimoe"}}, [], "of type phimoe"),
        ({"model_type": "phimoe"}, GPU, "it does not read what transformers writes"),
        ({"model_type": "deepseek_v3"}, GPU, None),
        ({"model_type": "deepseek_v3"}, ["rollout.backend=transformers"], None),
        (
            {"model_type": "olmoe", "tie_word_embeddings": True},
            [],
            "ties no output layer of type olmoe to its embedding",
        ),
        ({"model_type": "olmoe", "tie_word_embeddings": False}, [], None),
        ({"model_type": "mixtral", "tie_word_embeddings": True}, [], None),
        ({**MIXTURE, "hidden_size": 80}, [], "need a hidden size that is a multiple of 32, and this model has 80"),
        ({**MIXTURE, "hidden_size": 80}, GPU, None),
        ({"model_type": "llama", "hidden_size": 80}, [], None),
    ],
)
def test_policies_that_vllm_does_not_sample_from(
    here: Path, texts: dict[str, str], config: dict[str, Any], more: list[str], expected: str | None
) -> None:
    make(here, **config)
    problems = check_files(parse_config(texts["ppo"], ["policy.model={path: model, dtype: fp32}", *more]))
    found = [text for text in problems if text.startswith("rollout.backend: model: vLLM")]
    assert len(found) == (expected is not None), problems
    for text in found:
        assert str(expected) in text
        assert text.endswith("Set rollout.backend to transformers, which samples with the trainer's own model")


@pytest.mark.parametrize(
    ("config", "more", "expected"),
    [
        (MIXTURE, [], None),
        (
            {"model_type": "jetmoe", "num_local_experts": 4},
            [],
            "the experts of a jetmoe (model) cannot be replayed, only",
        ),
        ({"model_type": "llama"}, [], "model is no mixture of experts: set it to false"),
        ({"model_type": "llama"}, ["rollout.routing_replay=false"], None),
        ({**MIXTURE, "sliding_window": 8}, [], "in model every layer slides its window"),
        ({**MIXTURE, "sliding_window": 8}, ["rollout.backend=transformers"], None),
        ({**MIXTURE, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, [], None),
        ({**MIXTURE, "sliding_window": 8, "use_sliding_window": False}, [], None),
    ],
)
def test_policies_whose_routing_is_not_replayed(
    here: Path, texts: dict[str, str], config: dict[str, Any], more: list[str], expected: str | None
) -> None:
    make(here, **config)
    settings = ["policy.model={path: model, dtype: fp32}", "rollout.routing_replay=true", *more]
    problems = check_files(parse_config(texts["ppo"], settings))
    found = [text for text in problems if text.startswith("rollout.routing_replay: true, but ")]
    assert len(found) == (expected is not None), problems
    for text in found:
        assert str(expected) in text and "set it to false" in text


ADAPTED = {"lora": {"rank": 8}}


@pytest.mark.parametrize(
    ("config", "model", "expected"),
    [
        ({"model_type": "llama"}, ADAPTED, None),
        (
            {"model_type": "llama"},
            {},
            "the policy trains all its weights: set policy.model.lora, or rollout.lora to merged",
        ),
        (
            {"model_type": "llama"},
            {"lora": {"rank": 513}},
            "takes adapters up to rank 512, and this one has 513: lower it",
        ),
        (MIXTURE, ADAPTED, "adapters beside the experts of a mixture are not supported: set rollout.lora to merged"),
        (
            {"model_type": "x", "text_config": {"model_type": "llama"}},
            ADAPTED,
            "with other parts than text are not supported",
        ),
    ],
    ids=["fits", "no-lora", "rank", "experts", "images"],
)
def test_adapters_that_engines_do_not_take(
    here: Path, texts: dict[str, str], config: dict[str, Any], model: dict[str, Any], expected: str | None
) -> None:
    make(here, **config)
    policy = json.dumps({"path": "model", "dtype": "fp32", **model})
    problems = check_files(parse_config(texts["ppo"], [f"policy.model={policy}", "rollout.lora=adapter"]))
    found = [text for text in problems if text.startswith("rollout.lora: adapter, but ")]
    assert len(found) == (expected is not None) and all(str(expected) in text for text in found), problems


@pytest.mark.parametrize(("rank", "count"), [(8, 0), (600, 1)])
def test_an_adapter_that_is_trained_further_has_the_rank_of_its_file(
    here: Path, texts: dict[str, str], rank: int, count: int
) -> None:
    make(here, model_type="llama")
    (here / "adapter").mkdir()
    content = {"peft_type": "LORA", "r": rank, "base_model_name_or_path": "model", "target_modules": ["q_proj"]}
    (here / "adapter" / "adapter_config.json").write_text(json.dumps(content))
    problems = check_files(
        parse_config(texts["ppo"], ["policy.model={path: adapter, dtype: fp32}", "rollout.lora=adapter"])
    )
    assert len([text for text in problems if f"up to rank 512, and this one has {rank}" in text]) == count, problems
    assert not [text for text in problems if "trains all its weights" in text]


def test_checkpointing_that_transformers_lacks(here: Path, texts: dict[str, str]) -> None:
    make(here, model_type="jetmoe")
    assert check_files(parse_config(texts["rm"], TRAIN)) == []
    assert check_files(parse_config(texts["rm"], [*TRAIN, "reward.model.gradient_checkpointing=true"])) == [
        "reward.model.gradient_checkpointing: transformers has none for jetmoe models: set it to false"
    ]


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"model_type": "granite", "logits_scaling": 8.0}, "logits_scaling 8.0"),
        ({"model_type": "cohere2", "logit_scale": 0.25}, "logit_scale 0.25"),
        ({"model_type": "cohere"}, "logit_scale 0.0625"),
        ({"model_type": "granite", "logits_scaling": 1.0}, None),
        ({"model_type": "cohere2", "logit_scale": 1.0}, None),
    ],
)
def test_a_policy_whose_logits_are_scaled_is_refused(
    here: Path, texts: dict[str, str], config: dict[str, Any], scale: str | None
) -> None:
    """A reward model of the same kind is not: it has no logits."""
    make(here, **config)
    found = check_files(parse_config(texts["sft"], ["policy.model={path: model, dtype: fp32}"]))
    scaled = [text for text in found if "scales its logits behind the output layer" in text]
    assert len(scaled) == (scale is not None)
    assert all(text.startswith("policy.model.path: model: ") and f"({scale})" in text for text in scaled)
    assert not [text for text in check_files(parse_config(texts["rm"], TRAIN)) if "logits" in text]


def test_every_type_has_one_reason() -> None:
    everything = [kind for kinds in NOT_RUN.values() for kind in kinds]
    assert len(everything) == len(set(everything)) and set(everything) >= SERVED_BY_VLLM
    for kind in everything:
        assert f"a {kind} model does not run packed: " in str(reason_not_run({"model_type": kind}))


@pytest.mark.parametrize(
    ("architecture", "refused"),
    [
        ("LlamaForCausalLM", False),
        ("LlamaForSequenceClassification", True),
        ("Qwen2ForRewardModel", True),
        ("InternLM2ForRewardModel", True),
        ("LlamaForTokenClassification", True),
    ],
)
@pytest.mark.parametrize(("kind", "key"), [("sft", "policy.model"), ("ppo", "policy.model"), ("generate", "model")])
def test_a_model_that_scores_is_refused_where_a_text_is_to_be_written(
    here: Path, texts: dict[str, str], architecture: str, refused: bool, kind: str, key: str
) -> None:
    """Its output layer is missing, and transformers would draw one at random."""
    make(here, model_type="llama", architectures=[architecture])
    found = check_files(parse_config(texts[kind], [f"{key}={{path: model}}"]))
    named = f"{key}.path: model: it holds {architecture}, which scores texts and writes none: name a language model"
    assert any(one.startswith(named) for one in found) is refused
    assert refused or not any("scores texts" in one for one in found)
