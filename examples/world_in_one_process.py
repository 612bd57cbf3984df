"""All of RLHF in one process, without Ray, DeepSpeed and vLLM: SFT, a reward model, and policies trained against it.

    python examples/world_in_one_process.py --seed 0

It shows that the generated world (docs/world.md) teaches: the figures printed here are those that the distributed demo is
measured by, reached with plain torch and transformers in about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.data.tokenizers import make_word_tokenizer
from rlhf_ray.evaluation import accuracy, bag_of_words_baseline, win_rate
from rlhf_ray.rows.demonstrations import Demonstration
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.rows.prompts import Prompt
from rlhf_ray.world.generate import World
from rlhf_ray.world.gold import gold_score
from rlhf_ray.world.language import HABIT, MAX_NEW_TOKENS

Row = TypeVar("Row")
Ids = list[int]


@dataclass(frozen=True)
class Recipe:
    """All sizes and rates; the defaults meet the figures of docs/world.md."""

    sft_steps: int = 350
    sft_batch: int = 32
    sft_learning_rate: float = 2e-3
    pairs: int = 12000
    reward_steps: int = 650
    reward_batch: int = 16
    reward_learning_rate: float = 1e-3
    policy_steps: int = 40
    samples: int = 128
    evaluation_prompts: int = 300
    evaluate_every: int = 10


@dataclass(frozen=True)
class Method:
    """How a policy is trained against the reward model: leave-one-out where ``group`` > 1, else PPO with a critic."""

    name: str
    learning_rate: float
    kl_coefficient: float
    group: int
    steps_factor: float = 1.0


METHODS = (
    Method("leave-one-out", learning_rate=2e-4, kl_coefficient=0.15, group=4),
    Method("leave-one-out without KL", learning_rate=3e-4, kl_coefficient=0.0, group=4, steps_factor=1.5),
    Method("ppo", learning_rate=1e-4, kl_coefficient=0.15, group=1),
)
CRITIC_LEARNING_RATE = 3e-4
GAE_LAMBDA = 0.95
CLIP = 0.2
SEQUENCES_PER_UPDATE = 64


class Words:
    """The world's tokenizer, in the few ways in which it is used here."""

    def __init__(self) -> None:
        self.tokenizer = make_word_tokenizer()
        self.end: int = self.tokenizer.eos_token_id

    def prompt(self, text: str) -> Ids:
        return self.tokenizer(text)["input_ids"]

    def answer(self, text: str) -> Ids:
        return [*self.tokenizer(text)["input_ids"], self.end]

    def texts(self, answers: Sequence[Ids]) -> list[str]:
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)

    def gold(self, prompts: Sequence[Prompt], answers: Sequence[Ids]) -> list[float]:
        rows = zip(prompts, answers, self.texts(answers), strict=True)
        return [gold_score(prompt.text, text, answer[-1] == self.end) for prompt, answer, text in rows]


# ----------------------------------------------------------------------------------------------------------------- models


def make_policy(words: Words, seed: int) -> LlamaForCausalLM:
    """Half a million parameters, in the shape that the demo uses."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words.tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=False,
        pad_token_id=words.tokenizer.pad_token_id, eos_token_id=words.end, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Scorer(nn.Module):
    """A policy's trunk with one number at each token: a reward model (last token), or a critic (all tokens)."""

    def __init__(self, policy: LlamaForCausalLM) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(policy.model)
        self.score = nn.Linear(policy.config.hidden_size, 1, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, sequences: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        ids, mask = padded(sequences)
        hidden = self.trunk(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.score(hidden).squeeze(-1), mask

    def rewards(self, sequences: Sequence[Ids]) -> Tensor:
        scores, mask = self(sequences)
        return scores.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)


def padded(sequences: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask."""
    width = max(map(len, sequences))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in sequences])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences])


def log_probs(policy: LlamaForCausalLM, prompts: Sequence[Ids], answers: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """log p of every token after the first, and a mask of the tokens of the answers."""
    ids, mask = padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    logits = policy(input_ids=ids, attention_mask=mask).logits[:, :-1]
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    is_answer = (torch.arange(1, ids.shape[1]) >= starts) & mask[:, 1:].bool()
    return -cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"), is_answer.float()


@torch.no_grad()
def sample(policy: LlamaForCausalLM, words: Words, prompts: Sequence[Ids]) -> list[Ids]:
    """One answer to each prompt, at temperature 1."""
    width, pad = max(map(len, prompts)), policy.config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = policy.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    return [row[: row.index(words.end) + 1] if words.end in row else row for row in out[:, width:].tolist()]


class Trainer:
    """AdamW with clipped gradients; over ``steps`` steps warm-up and a cosine to a tenth, else a constant rate."""

    def __init__(self, module: nn.Module, learning_rate: float, steps: int | None = None) -> None:
        self.parameters = list(module.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

        def factor(step: int) -> float:
            return (
                1.0 if steps is None else min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            )

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def batches(rows: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Batches without end, epoch after epoch in shuffled order."""
    rng, order = random.Random(seed), list[Row]()
    while True:
        while len(order) < size:
            order += rng.sample(rows, len(rows))
        batch, order = order[:size], order[size:]
        yield batch


# ---------------------------------------------------------------------------------------------- supervised and preferences


def train_sft(words: Words, rows: Sequence[Demonstration], recipe: Recipe, seed: int) -> LlamaForCausalLM:
    policy = make_policy(words, seed)
    encoded = [(words.prompt(row.prompt), words.answer(row.answer)) for row in rows]
    trainer = Trainer(policy, recipe.sft_learning_rate, recipe.sft_steps)
    for _, batch in zip(range(recipe.sft_steps), batches(encoded, recipe.sft_batch, seed), strict=False):
        log_p, mask = log_probs(policy, *zip(*batch, strict=True))
        trainer.step(-(log_p * mask).sum() / mask.sum())
    return policy


def train_reward_model(
    words: Words, policy: LlamaForCausalLM, rows: Sequence[PreferencePair], recipe: Recipe, seed: int
) -> Scorer:
    torch.manual_seed(seed)
    model = Scorer(policy)
    trainer = Trainer(model, recipe.reward_learning_rate, recipe.reward_steps)
    for _, batch in zip(range(recipe.reward_steps), batches(rows, recipe.reward_batch, seed), strict=False):
        chosen, rejected = pair_rewards(words, model, batch)
        trainer.step(-logsigmoid(chosen - rejected).mean())
    return model


def pair_rewards(words: Words, model: Scorer, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
    sides = [words.prompt(pair.prompt) + words.answer(side) for pair in pairs for side in (pair.chosen, pair.rejected)]
    rewards = model.rewards(sides)
    return rewards[0::2], rewards[1::2]


# ------------------------------------------------------------------------------------------------------- policy gradients


@dataclass
class Samples:
    """Answers of the policy with all that is known about them; log-probs and masks are padded."""

    prompts: list[Ids]
    answers: list[Ids]
    scores: Tensor
    reference: Tensor
    mask: Tensor

    @property
    def sequences(self) -> list[Ids]:
        return [prompt + answer for prompt, answer in zip(self.prompts, self.answers, strict=True)]


class PolicyTraining:
    """A policy, the frozen policy that it started from, and the reward model that it is trained against."""

    def __init__(self, words: Words, start: LlamaForCausalLM, reward: Scorer, method: Method, seed: int) -> None:
        torch.manual_seed(seed)
        self.words, self.start, self.reward, self.method = words, start, reward, method
        self.policy = copy.deepcopy(start)
        self.trainer = Trainer(self.policy, method.learning_rate)
        self.critic = copy.deepcopy(reward)
        self.critic_trainer = Trainer(self.critic, CRITIC_LEARNING_RATE)

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt]) -> Samples:
        ids = [self.words.prompt(prompt.text) for prompt in prompts]
        answers = sample(self.policy, self.words, ids)
        scores = self.reward.rewards([prompt + answer for prompt, answer in zip(ids, answers, strict=True)])
        return Samples(ids, answers, scores, *log_probs(self.start, ids, answers))

    def step(self, prompts: Sequence[Prompt]) -> None:
        samples = self.sample([prompt for prompt in prompts for _ in range(self.method.group)])
        (self._leave_one_out if self.method.group > 1 else self._ppo)(samples)

    def _leave_one_out(self, samples: Samples) -> None:
        """REINFORCE; the baseline of an answer is the mean of the other answers to its prompt (Kool et al. 2019)."""
        log_p, mask = log_probs(self.policy, samples.prompts, samples.answers)
        kl = ((log_p - samples.reference) * mask).sum(1).detach()
        returns = (samples.scores - self.method.kl_coefficient * kl).view(-1, self.method.group)
        others = (returns.sum(1, keepdim=True) - returns) / (self.method.group - 1)
        self.trainer.step(-((returns - others).view(-1, 1) * log_p * mask).sum() / len(samples.answers))

    def _ppo(self, samples: Samples) -> None:
        """One pass of PPO over the samples, with whitened advantages and clipped policy and value losses."""
        with torch.no_grad():
            old, mask = log_probs(self.policy, samples.prompts, samples.answers)
            values = self.critic(samples.sequences)[0][:, :-1] * mask
            rewards = -self.method.kl_coefficient * (old - samples.reference) * mask
            rewards[torch.arange(len(old)), [len(row) - 2 for row in samples.sequences]] += samples.scores
            advantages = generalized_advantages(rewards, values, mask)
            returns, whitened = advantages + values, whiten(advantages, mask)
        for rows in torch.randperm(len(old)).split(SEQUENCES_PER_UPDATE):
            prompts, answers = ([part[row] for row in rows] for part in (samples.prompts, samples.answers))
            log_p, is_answer = log_probs(self.policy, prompts, answers)
            width = log_p.shape[1]
            ratio, advantage = (log_p - old[rows, :width]).exp(), whitened[rows, :width]
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            self.trainer.step(-(gain * is_answer).sum() / is_answer.sum())
            value = self.critic([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])[0][:, :-1]
            before, wanted = values[rows, :width], returns[rows, :width]
            near = before + (value - before).clamp(-CLIP, CLIP)
            error = torch.maximum((value - wanted) ** 2, (near - wanted) ** 2)
            self.critic_trainer.step(0.5 * (error * is_answer).sum() / is_answer.sum())


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """GAE with gamma 1; answers are contiguous, and nothing follows their end."""
    advantages, after, next_value = torch.zeros_like(rewards), torch.zeros(len(rewards)), torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        after = (rewards[:, t] + next_value - values[:, t] + GAE_LAMBDA * after) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = after
    return advantages


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean) ** 2 * mask).sum() / mask.sum()
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


# ---------------------------------------------------------------------------------------------------------------- figures


@torch.no_grad()
def evaluate(training: PolicyTraining, prompts: Sequence[Prompt], start_gold: Sequence[float]) -> dict[str, float]:
    """One answer to each held-out prompt: gold, learned reward, win rate over the start, KL (k1, summed over answers)."""
    samples = training.sample(prompts)
    log_p, mask = log_probs(training.policy, samples.prompts, samples.answers)
    gold = training.words.gold(prompts, samples.answers)
    return {
        "gold": fmean(gold),
        "win_rate": win_rate(gold, start_gold),
        "reward": samples.scores.mean().item(),
        "kl": ((log_p - samples.reference) * mask).sum(1).mean().item(),
        "tokens": fmean(map(len, samples.answers)),
        "habit": fmean(text.count(HABIT) for text in training.words.texts(samples.answers)),
        "cut_off": fmean(answer[-1] != training.words.end for answer in samples.answers),
    }


class Report:
    """Prints each figure as it is known, with the seconds since the last one, and keeps it."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.last = time.monotonic()

    def add(self, stage: str, **figures: float) -> None:
        seconds, self.last = time.monotonic() - self.last, time.monotonic()
        line = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"{stage:<34} {line}  ({seconds:.0f} s)", flush=True)
        self.figures |= {f"{stage}/{name}": round(value, 4) for name, value in figures.items()}


def run(seed: int, recipe: Recipe, methods: Sequence[Method]) -> dict[str, float]:
    """The whole of it; returns every figure that it prints, and with ``passed`` whether all bars are met."""
    words, world, report = Words(), World(seed), Report()
    held_out = world.prompts("evaluation", recipe.evaluation_prompts)
    policy = train_sft(words, world.demonstrations(12000), recipe, seed)
    start_gold = words.gold(held_out, sample(policy, words, [words.prompt(prompt.text) for prompt in held_out]))
    report.add("sft", gold=fmean(start_gold), loss=sft_loss(words, policy, world.demonstrations(500, "evaluation")))

    pairs, clean = world.preferences(recipe.pairs), world.preferences(1000, "evaluation", flipped=0.0)
    reward = train_reward_model(words, policy, pairs, recipe, seed)
    with torch.no_grad():
        chosen, rejected = pair_rewards(words, reward, clean)
    baseline = bag_of_words_baseline(*[[(pair.chosen, pair.rejected) for pair in rows] for rows in (pairs, clean)])
    report.add("reward model", accuracy=accuracy(chosen, rejected), bag_of_words=baseline)

    for method in methods:
        training = PolicyTraining(words, policy, reward, method, seed)
        prompts = batches(world.prompts("ppo", 4000), recipe.samples // method.group, seed)
        for step in range(1, round(recipe.policy_steps * method.steps_factor) + 1):
            training.step(next(prompts))
            if step % recipe.evaluate_every == 0:
                report.add(f"{method.name}, step {step}", **evaluate(training, held_out, start_gold))
    return report.figures


@torch.no_grad()
def sft_loss(words: Words, policy: LlamaForCausalLM, rows: Sequence[Demonstration]) -> float:
    """Mean negative log-likelihood of a held-out answer token."""
    log_p, mask = log_probs(
        policy, [words.prompt(row.prompt) for row in rows], [words.answer(row.answer) for row in rows]
    )
    return -((log_p * mask).sum() / mask.sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--method", action="append", choices=[method.name for method in METHODS], help="default: all")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    methods = [method for method in METHODS if arguments.method is None or method.name in arguments.method]
    figures = run(arguments.seed, Recipe(), methods)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
