"""A model built in shards gives the numbers of the whole one; ranks with other numbers of chunks do not wait for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.models import load_regression, save_adapter
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.regression import PackedRegression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression
from rlhf_ray.models.weights.adapters import remember_replaced
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import pack

from .conftest import run_ranks, save_random, shake_adapters, word_tokenizer

pytestmark = pytest.mark.early

PROGRAM = Path(__file__).with_name("sharded_program.py")
BROUGHT = ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight")
"""What the adapter brings besides LoRA."""
FAMILIES_IN_SHARDS = ("llama", "gemma2", "mixtral", "olmoe")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("sharded")
    for family in (*FAMILIES_IN_SHARDS, "minimax-m2"):
        save_random(family, directory / family)
    for broken in ("misshapen", "headless"):
        weights = load_file(save_random("llama", directory / broken) / "model.safetensors")
        if broken == "misshapen":
            weights["model.norm.weight"] = torch.ones(7)
        else:
            del weights["lm_head.weight"]
        save_file(weights, directory / broken / "model.safetensors", {"format": "pt"})
    save_random("llama", directory / "unpadded")
    word_tokenizer(pad=False, size=56).save_pretrained(directory / "unpadded")
    reward = get_llm_for_sequence_regression(
        str(directory / "llama"), "reward", param_dtype="fp32", init_value_head=True, lora_rank=3
    )
    shake_adapters(reward)
    for name in BROUGHT:
        reward.get_parameter(name).data += 0.1
    remember_replaced(reward.backbone, BROUGHT)
    save_adapter(reward, None, directory / "adapter")
    return directory, run_ranks(PROGRAM, directory)


def test_numbers_are_those_of_the_whole_model(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    """The head included, which is drawn from its seed."""
    directory, ranks = measured
    for family in FAMILIES_IN_SHARDS:
        actor = Actor(str(directory / family), param_dtype="fp32")
        reward = get_llm_for_sequence_regression(
            str(directory / family), "reward", param_dtype="fp32", init_value_head=True, seed=3
        ).eval()
        for rank in ranks:
            log_probs = PackedPolicy(actor)(pack(batch_of(rank))).log_probs
            torch.testing.assert_close(torch.tensor(rank[family]["log_probs"]), log_probs, atol=1e-5, rtol=1e-5)
            scores = PackedRegression(reward)(pack(batch_of(rank)), "scores")
            torch.testing.assert_close(torch.tensor(rank[family]["scores"]), scores, atol=1e-5, rtol=1e-5)


def batch_of(rank: dict[str, Any]) -> TrajectoryBatch:
    ids, offsets = (torch.tensor(numbers) for numbers in rank["tokens"])
    return TrajectoryBatch(offsets, {"token_ids": ids})


@pytest.mark.parametrize("family", FAMILIES_IN_SHARDS)
def test_no_rank_holds_the_whole(family: str, measured: tuple[Path, list[dict[str, Any]]]) -> None:
    whole = Actor(str(measured[0] / family), param_dtype="fp32")
    count = sum(parameter.numel() for parameter in whole.parameters())
    for rank in measured[1]:
        assert rank[family]["share"] == pytest.approx(0.5, abs=0.01)
        assert f"{count / 1000:.3g}k parameters" in rank[family]["report"]


@pytest.mark.parametrize("family", (*FAMILIES_IN_SHARDS, "minimax-m2"))
def test_what_is_written_from_shards_is_the_checkpoint(
    family: str, measured: tuple[Path, list[dict[str, Any]]]
) -> None:
    """Gathered layer by layer, under the names on disk: experts one by one, tied embeddings once, buffers as well."""
    written, original = (load_file(measured[0] / name / "model.safetensors") for name in (f"{family} saved", family))
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)


@pytest.mark.parametrize("family", (*FAMILIES_IN_SHARDS, "minimax-m2"))
def test_one_rank_reads_the_checkpoint_once_and_the_others_get_their_shares(
    family: str, measured: tuple[Path, list[dict[str, Any]]]
) -> None:
    """That the shares are right, the weights written from them show. Buffers are small, and each rank has all of them."""
    directory, (first, second) = measured
    stored = load_file(directory / family / "model.safetensors")
    buffers = sum(tensor.nbytes for name, tensor in stored.items() if name.endswith("e_score_correction_bias"))
    assert first[family]["read"] == sum(tensor.nbytes for tensor in stored.values())
    assert second[family]["read"] == buffers and (buffers > 0) == (family == "minimax-m2")


def test_one_rank_reads_the_base_of_an_adapter_and_what_the_adapter_trained_whole(
    measured: tuple[Path, list[dict[str, Any]]],
) -> None:
    directory, (first, second) = measured
    stored = load_file(directory / "adapter" / "adapter_model.safetensors")
    brought = sum(tensor.nbytes for name, tensor in stored.items() if name.endswith(BROUGHT))
    head = sum(tensor.nbytes for name, tensor in stored.items() if "score" in name)
    assert brought > 0 and (first["adapted"]["copied"], second["adapted"]["copied"]) == (brought, 0)
    base = load_file(directory / "llama" / "model.safetensors")
    backbone = sum(tensor.nbytes for name, tensor in base.items() if name != "lm_head.weight")
    assert (first["adapted"]["read"], second["adapted"]["read"]) == (backbone + head, head)


def test_embeddings_grow_in_shards_as_they_grow_whole(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    config = ModelConfig(path=str(measured[0] / "unpadded"), dtype="fp32", head_init="inv")
    whole = load_regression(config, "reward", seed=5)
    for rank in measured[1]:
        grown = rank["grown"]
        assert grown["rows"] == list(whole.get_input_embeddings().weight.shape) == [64, 32]
        assert grown["share"] == pytest.approx(0.5, abs=0.01)
        torch.testing.assert_close(torch.tensor(grown["scores"]), whole.eval()(torch.tensor([grown["ids"]])))


def test_an_adapter_loads_on_its_base_in_shards(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, ranks = measured
    reward = get_llm_for_sequence_regression(str(directory / "adapter"), "reward", param_dtype="fp32").eval()
    for rank in ranks:
        scores = PackedRegression(reward)(pack(batch_of(rank)), "scores")
        torch.testing.assert_close(torch.tensor(rank["adapted"]["scores"]), scores, atol=1e-5, rtol=1e-5)
    written, original = (
        load_file(directory / name / "adapter_model.safetensors") for name in ("adapter saved", "adapter")
    )
    assert written.keys() == original.keys() and all(torch.equal(written[name], original[name]) for name in original)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_mixtures_train_on_ragged_ranks_as_they_do_whole(
    family: str, measured: tuple[Path, list[dict[str, Any]]]
) -> None:
    """In ten chunks of log-probs on one rank and one on the other; a rank that waits for ever fails at the deadline."""
    whole, sharded = (measured[1][0][f"{family} trained at {zero}"] for zero in (0, 3))
    assert sharded["norms"] == pytest.approx(whole["norms"], rel=1e-5) and min(whole["norms"]) > 1e-3
    assert whole["state"].keys() == sharded["state"].keys()
    for name, numbers in whole["state"].items():
        torch.testing.assert_close(torch.tensor(sharded["state"][name]), torch.tensor(numbers), atol=1e-5, rtol=1e-5)


def test_ranks_that_call_other_experts_do_not_wait_for_each_other(
    measured: tuple[Path, list[dict[str, Any]]],
) -> None:
    for rank in measured[1]:
        assert rank["listed"]["equal"] and rank["listed"]["norm"] == pytest.approx(rank["listed"]["whole"], rel=1e-5)


def test_what_cannot_be_built_in_shards_is_refused(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in measured[1]:
        misshapen, headless, four_bit = rank["refused"]
        assert "model.norm.weight" in misshapen and "(7,)" in misshapen
        assert "LlamaForCausalLM" in headless and "no lm_head.weight" in headless
        assert "cannot be sharded (ZeRO-3)" in four_bit
