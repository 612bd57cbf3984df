"""The pad token is the tokenizer's own or a dedicated one; embeddings hold every token and never shrink."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.embeddings import check_vocabulary, grow_embeddings
from rlhf_ray.models.weights.tokenizer import (
    add_pad_token,
    load_tokenizer,
    prepare_padding,
)

Make = Callable[..., PreTrainedModel]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def test_the_tokenizers_own_pad_token_is_kept(causal: Make, make_tokenizer: MakeTokenizer) -> None:
    model, tokenizer = causal(pad_token_id=7), make_tokenizer()
    prepare_padding(model, tokenizer)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert model.get_input_embeddings().num_embeddings == 48


def test_a_missing_pad_token_is_added_and_the_embedding_grows(causal: Make, make_tokenizer: MakeTokenizer) -> None:
    model, tokenizer = causal(), make_tokenizer(pad=False)
    before = model.get_input_embeddings().weight.clone()
    prepare_padding(model, tokenizer)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 48 != tokenizer.eos_token_id
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == model.get_output_embeddings().weight.shape[0] == model.config.vocab_size == 56
    assert torch.equal(rows[:48], before)


def test_padding_with_the_end_of_sequence_only_on_request(
    causal: Make, make_tokenizer: MakeTokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_ray.console import get_logger

    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level("INFO", logger=get_logger().name)
    model, tokenizer = causal(), make_tokenizer(pad=False)
    prepare_padding(model, tokenizer, pad_with_eos=True)
    assert tokenizer.pad_token_id == model.config.pad_token_id == tokenizer.eos_token_id == 2
    assert model.get_input_embeddings().num_embeddings == 48 and "padding with </s>" in caplog.text
    bare = make_tokenizer(pad=False)
    bare.eos_token = None
    with pytest.raises(ModelLoadError, match="tokenizer has none"):
        add_pad_token(bare, pad_with_eos=True)


def test_embeddings_never_shrink_and_new_rows_follow_the_seed(causal: Make, make_tokenizer: MakeTokenizer) -> None:
    assert grow_embeddings(causal(), make_tokenizer(20)) == 48
    state = torch.get_rng_state()
    rows = []
    for seed in (1, 1, 2):
        model = causal()
        assert grow_embeddings(model, make_tokenizer(60), seed=seed) == 64
        rows.append(model.get_input_embeddings().weight)
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_new_rows_lie_near_the_mean_of_the_old_in_the_output_layer_too(
    causal: Make, make_tokenizer: MakeTokenizer
) -> None:
    """So that a token that was never trained is not the most probable one."""
    model = causal()
    grow_embeddings(model, make_tokenizer(60))
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        old, new = layer.weight[:48], layer.weight[48:]
        assert float(((new - old.mean(0)) / old.std(0)).abs().max()) < 0.05 and len(new) == 16


def test_a_tokenizer_larger_than_a_policy_is_refused(causal: Make, make_tokenizer: MakeTokenizer) -> None:
    check_vocabulary(causal(), make_tokenizer(48))
    with pytest.raises(ModelLoadError, match=r"49 tokens, but the model's embedding has 48 rows"):
        check_vocabulary(causal(), make_tokenizer(49))


def test_tokenizers_come_from_the_models_directory(tmp_path: Path, make_tokenizer: MakeTokenizer) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert tokenizer("w7 w9")["input_ids"] == [7, 9] and tokenizer.pad_token_id == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match="no tokenizer that can be read"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "empty")))
