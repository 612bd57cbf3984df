"""The example of a reward model with step tokens: each step against the model asked about what stands before it alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.own_step_rewards import StepTokens
from rlhf_ray.errors import RequestError
from rlhf_ray.models import make_model, save_pretrained
from rlhf_ray.rewards.steps.placement import SteppedResult
from tests.rewards.answers import answer
from tests.serving.reward_models import make_tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    save_pretrained(make_model("llama-tiny", len(tokenizer), seed=3, pad_token_id=0), tokenizer, directory)
    return str(directory)


@pytest.mark.parametrize(
    ("separator", "steps"), [("\n", ["a = 1\n", "b = 2\n", "so 3"]), ("\n\n", ["a = 1\nb\n\n", "so\n\n"])]
)
def test_each_step_has_the_probability_that_the_model_gives_it_after_what_stands_before(
    path: str, separator: str, steps: list[str]
) -> None:
    source = StepTokens(path, step_token="@", separator=separator)
    (result,) = source.score([answer("1 + 2? ", "".join(steps))]).result()
    assert isinstance(result, SteppedResult)
    tokenizer, model = make_tokenizer(), AutoModelForCausalLM.from_pretrained(path)
    good, bad, mark = (tokenizer.convert_tokens_to_ids(token) for token in "+-@")
    ids, wanted, end = tokenizer.encode("1 + 2? "), [], 0
    for step in steps:
        ids += [*tokenizer.encode(step, add_special_tokens=False), mark]
        logits = model(torch.tensor([ids])).logits[0, -1]
        end += len(step)
        wanted.append((end, float(torch.sigmoid(logits[good] - logits[bad]))))
    assert [one for one, _ in result.steps] == [one for one, _ in wanted]
    assert [reward for _, reward in result.steps] == pytest.approx([reward for _, reward in wanted], abs=1e-5)


def test_a_step_token_that_the_tokenizer_does_not_know_and_an_answer_without_text_are_told(path: str) -> None:
    with pytest.raises(
        RequestError, match=r"'ки' is 4 tokens of .*, not one: name a token that the model was trained with"
    ):
        StepTokens(path)
    (result,) = StepTokens(path, step_token="@").score([answer("1 + 2? ", "")]).result()
    assert result.reward is None and "has no step" in str(result.error)
