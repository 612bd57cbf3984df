"""One architecture through the product, cell by cell, each held against transformers: unpadded, eager, fp32, in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.encoder import EncoderRewardWorker
from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker
from rlhf_ray.config.files.architectures import NO_CHECKPOINTING
from rlhf_ray.config.files.encoders import ENCODERS
from rlhf_ray.config.files.sampled import is_mixture
from rlhf_ray.config.loading import parse_config
from rlhf_ray.config.preflight import check_files
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.models.regression import PackedRegression, SequenceRegression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression
from rlhf_ray.models.save import save_pretrained
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import pack
from tests.architectures.configs import POSITIONS, VOCABULARY, small_model
from tests.models.conftest import shake_adapters, word_tokenizer

LENGTHS = (5, 21, 9, 34)
WEIGHTS = (1.0, -1.0, 0.5, -0.5)
"""What the loss of the training cell multiplies the scores with."""


def items() -> list[Tensor]:
    """Sequences shorter and longer than the sliding windows, of which two begin alike."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    return [*drawn[:-1], torch.cat([drawn[1][:18], drawn[-1][18:]])]


class Architecture:
    """A small random model of one architecture on disk, and what transformers makes of it."""

    def __init__(self, model_type: str, directory: Path) -> None:
        self.model_type, self.directory = model_type, directory
        model, self.classifies = small_model(model_type)
        model.save_pretrained(directory)
        word_tokenizer(VOCABULARY).save_pretrained(directory)
        self.theirs: PreTrainedModel = model

    @cached_property
    def policy(self) -> Path:
        """The directory of a causal model of the architecture, made when it is first asked for."""
        directory = self.directory.with_name(f"{self.directory.name}-policy")
        small_model(self.model_type, policy=True)[0].save_pretrained(directory)
        word_tokenizer(VOCABULARY).save_pretrained(directory)
        return directory

    def has(self, cell: str) -> bool:
        """Whether there is such a cell: vLLM is given models with a head, and mixtures of experts; encoders are not written."""
        if cell == "rollout":  # of a mixture of experts that transformers has a policy of
            return self.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and is_mixture(self.theirs.config.to_dict())
        return self.classifies if cell == "vLLM" else cell != "export" or self.model_type not in ENCODERS

    def load(self, **options: Any) -> SequenceRegression:
        """The model as a reward model of this project; one without a head gets a fresh one."""
        model = get_llm_for_sequence_regression(
            str(self.directory),
            "reward",
            param_dtype="fp32",
            init_value_head=not self.classifies,
            head_init="hf",
            **options,
        )
        return model.eval()

    def score(self, ids: Tensor, head: Tensor | None) -> Tensor:
        """The score that transformers gives to one sequence; ``head`` (1, hidden) is that of a model without one."""
        inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        if self.classifies:
            return self.theirs(**inputs).logits[0, 0]
        return self.theirs.base_model(**inputs, use_cache=False).last_hidden_state[0, -1] @ head[0]


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, over the largest number."""
    return float((actual - expected).abs().max() / expected.abs().max())


def served(one: Architecture) -> float:
    """The scores of a reward group, as ``score`` and the service ask for them."""
    encoder = one.model_type in ENCODERS
    group = RewardGroup(InProcessRanks("reward", EncoderRewardWorker() if encoder else RewardWorker()))
    model = ModelConfig(path=str(one.directory), dtype="fp32", head_init=None if one.classifies else "hf")
    group.setup(RewardSetup(ScoringRole(model=model), seed=0), timeout_s=60.0).result()
    results = group.score([ScoreRequest(token_ids=tuple(ids.tolist())) for ids in items()]).result()
    assert all(result.error is None for result in results), results[0].error
    head = None if one.classifies else group.ranks.worker.model.head.weight
    with torch.no_grad():
        expected = torch.stack([one.score(ids, head) for ids in items()])
    return relative(torch.tensor([result.raw for result in results]), expected)


def scoring(one: Architecture) -> float:
    """Served, packed with a shared prefix, and padded on both sides."""
    worst = served(one)
    if one.model_type in ENCODERS:
        return worst
    model, sequences = one.load(), items()
    with torch.no_grad():
        expected = torch.stack([one.score(ids, model.head.weight) for ids in sequences])
        packed = pack(TrajectoryBatch.from_sequences([*sequences[:2], sequences[3], sequences[2]]))
        assert packed.parent is not None
        worst = max(worst, relative(PackedRegression(model)(packed, "scores")[[0, 1, 3, 2]], expected))
        for side in ("left", "right"):
            ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=1, padding_side=side)
            ones = [torch.ones_like(sequence) for sequence in sequences]
            mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)
            worst = max(worst, relative(model(ids, mask), expected))
    return worst


def training(one: Architecture) -> float:
    """Gradients of all weights, without and with checkpointing, over the largest of each weight."""
    model = one.load().train()
    one.theirs.zero_grad(set_to_none=True)
    head = model.head.weight.detach().clone().requires_grad_()
    sum(weight * one.score(ids, head) for ids, weight in zip(items(), WEIGHTS, strict=True)).backward()
    theirs = {name.split(".", 1)[-1]: p.grad for name, p in one.theirs.named_parameters() if p.grad is not None}
    worst = 0.0
    for checkpointing in (False, one.model_type not in NO_CHECKPOINTING):
        model.zero_grad(set_to_none=True)
        if checkpointing:
            model.gradient_checkpointing_enable()
        scores = PackedRegression(model)(pack(TrajectoryBatch.from_sequences(items())), "scores")
        (scores * torch.tensor(WEIGHTS)).sum().backward()
        largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
        compared = 0
        for name, parameter in model.backbone.named_parameters():
            if parameter.grad is None:
                continue
            expected = theirs.get(name)
            assert expected is not None, f"transformers has no gradient of {name}"
            worst = max(worst, float((parameter.grad - expected).abs().max()) / largest)
            compared += 1
        assert compared > 3
    return worst


def lora(one: Architecture) -> float:
    """Adapters that change the scores: each is trained, and the merged weights give the same scores."""
    model = one.load(lora_rank=4)
    shake_adapters(model.backbone)
    packed = pack(TrajectoryBatch.from_sequences(items()))
    one.theirs.zero_grad(set_to_none=True)
    one.score(items()[0], model.head.weight.detach()).backward()
    used = {name.split(".", 1)[-1] for name, p in one.theirs.named_parameters() if p.grad is not None}
    scores = PackedRegression(model.train())(packed, "scores")
    scores.sum().backward()
    for name, parameter in model.backbone.named_parameters():
        base = name.split(".lora_")[0] + ".weight"
        assert parameter.grad is not None or not parameter.requires_grad or base not in used, f"{name} does not train"
    with torch.no_grad():
        bare = one.load()
        assert relative(PackedRegression(bare)(packed, "scores"), scores) > 1e-3, "the adapters change nothing"
        out = one.directory.with_name(one.directory.name + "-lora")
        save_pretrained(model.eval(), word_tokenizer(VOCABULARY), out)
        merged = get_llm_for_sequence_regression(str(out), "reward", param_dtype="fp32").eval()
        return relative(PackedRegression(merged)(packed, "scores"), scores)


def export(one: Architecture) -> float | str:
    """Written by the product, read by transformers, and by the product."""
    model = one.load()
    out = one.directory.with_name(one.directory.name + "-out")
    save_pretrained(model, word_tokenizer(VOCABULARY), out)
    with torch.no_grad():
        expected = torch.stack([one.score(ids, model.head.weight) for ids in items()])
        again = get_llm_for_sequence_regression(str(out), "reward", param_dtype="fp32").eval()
        own = relative(PackedRegression(again)(pack(TrajectoryBatch.from_sequences(items())), "scores"), expected)
        assert own < 1e-5, f"read again by the product: {own:.1e}"
        try:
            theirs = AutoModelForSequenceClassification.from_pretrained(
                out, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        except ValueError as error:
            if "Unrecognized configuration class" in str(error):
                return "by this project alone"
            raise
        return max(relative(torch.stack([theirs(input_ids=ids[None]).logits[0, 0] for ids in items()]), expected), own)


def in_vllm(one: Architecture) -> float:
    """The scores of vLLM's pooling runner, as the service starts it."""
    from rlhf_ray.rollout.vllm_scorer import VllmScorer

    scorer = VllmScorer(ModelConfig(path=str(one.directory), dtype="fp32"), max_item_tokens=POSITIONS // 2)
    scores = torch.tensor(scorer.scores([ids.tolist() for ids in items()]))
    with torch.no_grad():
        return relative(scores, torch.stack([one.score(ids, None) for ids in items()]))


def rollout(one: Architecture) -> float:
    """Log-probs of a policy in nats, vLLM's and the trainer's, at start and after two updates of every weight."""
    from tests.architectures.rollout import over_updates

    return max(over_updates(one.policy))


CELLS: dict[str, Callable[[Architecture], float | str]] = {
    "scoring": scoring, "training": training, "LoRA": lora, "export": export, "vLLM": in_vllm,
    "rollout": rollout,
}  # fmt: skip
SERVE = (
    "kind: serve\nrun: {{name: a}}\nmax_tokens: 128\n"
    "reward: {{model: {{path: {path}, dtype: fp32{more}}}, scorer: {scorer}}}\n"
)
TRAIN = (
    "kind: rm\nrun: {{name: a}}\ndata: {{world: {{}}, max_tokens: 128}}\nbatch: {{pairs_per_update: 8}}\nreward: "
    "{{model: {{path: {path}, dtype: fp32, head_init: hf{more}}}, engine: {{optimizer: {{learning_rate: 1e-3}}}}}}\n"
)
SAMPLE = (
    "kind: ppo\nrun: {{name: a}}\nsteps: 1\ndata: {{world: {{}}, max_prompt_tokens: 48}}\nrollout: {{dtype: fp32, "
    "max_model_tokens: 128}}\nbatch: {{prompts_per_step: 8, samples_per_prompt: 4, sequences_per_update: 32}}\n"
    "algorithm: {{name: grpo}}\npolicy: {{model: {{path: {path}, dtype: fp32{more}}}, engine: {{optimizer: {{learning_rate: "
    "1e-3}}}}}}\nreward: {{model: {{make: {{shape: llama-tiny, tokenizer_from: world}}, head_init: zero, dtype: fp32}}}}\n"
)
JOBS = {
    "scoring": (SERVE, ""), "training": (TRAIN, ""), "LoRA": (TRAIN, ", lora: {rank: 4}"), "export": (SERVE, ""),
    "vLLM": (SERVE, ""), "rollout": (SAMPLE, ""),
}  # fmt: skip


def said_by_check(one: Architecture, cell: str) -> list[str]:
    """What ``rlhf-ray check`` says against the job of a cell."""
    job, more = JOBS[cell]
    if job == SERVE and not one.classifies:
        more += ", head_init: hf"
    scorer = "vllm" if cell == "vLLM" else "packed"
    path = one.policy if cell == "rollout" else one.directory
    return check_files(parse_config(job.format(path=path, more=more, scorer=scorer)))


def outcome(one: Architecture, cell: str) -> float | str:
    """A figure; ``refused``, where check says so before anything starts; or what went wrong."""
    try:
        if said_by_check(one, cell):
            return "refused"
        return CELLS[cell](one)
    except Exception as error:
        return f"error: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
