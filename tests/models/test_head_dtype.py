"""Logits are fp32 unless the head is told to multiply in the model's dtype: then they are those of the model's output layer.

On a CPU that is half of the work. What must hold in both: log-probs and gradients are those of the logits, and a pass without
gradients gives the bits of one with them, so that the first ratio is exactly 1.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.actors.workers.policy import LanguageSetup, PolicyWorker, ReferenceWorker
from rlhf_ray.config.sections.models import MakeConfig, ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.models.forward import log_prob_blocks, log_probs
from rlhf_ray.models.forward.log_probs import LogProbHead

HIDDEN, VOCABULARY, TOKENS = 16, 50, 23


@pytest.fixture(params=["blocks, probabilities kept", "blocks, computed again", "chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(log_prob_blocks, "BLOCK_BYTES", 10 * VOCABULARY * 2)
    monkeypatch.setattr(log_prob_blocks, "FEWEST_ROWS", 1)
    monkeypatch.setattr(log_prob_blocks, "NUMBERS_AT_ONCE", 3 * VOCABULARY)
    monkeypatch.setattr(log_prob_blocks, "COLUMNS_AT_ONCE", 7)
    monkeypatch.setattr(log_prob_blocks, "KEPT_BYTES", 0 if "again" in request.param else 1 << 27)
    monkeypatch.setattr(log_probs, "LOGITS_AT_ONCE", 6 * VOCABULARY)
    monkeypatch.setattr(log_probs, "FEWEST_TOKENS_AT_ONCE", 1)
    if request.param == "chunks":
        monkeypatch.setattr(log_probs, "blocks_suit", lambda *_: False)
    return str(request.param)


def case() -> tuple[LogProbHead, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN).mul(3).bfloat16().requires_grad_()
    return LogProbHead.around(nn.Linear(HIDDEN, VOCABULARY, bias=False).bfloat16(), None), hidden, torch.arange(TOKENS)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_logits_of_its_dtype(fp32: bool, temperature: float) -> None:
    head, hidden, targets = case()
    head.fp32 = fp32
    mine, entropy = head(hidden, targets, temperature, True)
    wide = hidden.double() @ head.weight.double().t()
    logits = wide if fp32 else head(hidden).double()
    assert fp32 or 1e-3 < (wide - logits).abs().max() < 0.02, "logits in bf16 are rounded"
    log_p = (logits / temperature).log_softmax(-1)
    chosen = log_p.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(mine.double(), chosen, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), atol=2e-6, rtol=1e-6)
    weights = torch.randn(TOKENS)
    gradients = torch.autograd.grad((mine * weights).sum(), (hidden, head.weight))
    expected = torch.autograd.grad((chosen * weights).sum(), (hidden, head.weight))
    for a, b in zip(gradients, expected, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 5e-3


@pytest.mark.usefixtures("way")
def test_a_pass_without_gradients_gives_the_bits_of_one_with_them() -> None:
    head, hidden, targets = case()
    head.fp32 = False
    with torch.no_grad():
        before, _ = head(hidden, targets, 0.7)
    assert torch.equal(head(hidden, targets, 0.7, True)[0], before)


@pytest.mark.parametrize("worker", [PolicyWorker, ReferenceWorker])
@pytest.mark.parametrize(("head_dtype", "said"), [("fp32", "fp32"), ("model", "bf16")])
def test_a_role_computes_as_its_config_says_and_says_so(
    worker: type[ReferenceWorker], head_dtype: str, said: str
) -> None:
    torch.set_num_threads(1)
    make = MakeConfig(shape="llama-tiny", tokenizer_from="world", seed=3)
    model = ModelConfig(make=make, dtype="bf16", head_dtype=head_dtype)
    loaded = worker()
    line = loaded.setup(LanguageSetup(RoleConfig(model=model), seed=0))
    assert loaded.actor.log_prob_head.fp32 == (head_dtype == "fp32")
    assert ("log-probs fp32 in" in line) == (head_dtype == "fp32")
    if isinstance(loaded, PolicyWorker):
        assert loaded.execution().head == said
