"""How often a policy beats its start by gold, over how often best-of-n does at the policy's own KL.

    python -m benchmarks.equal_kl POLICY --start SFT --reward RM --seed N [--prompts 2000] [--pool 80] [--kept FILE.npz]

Invariants: both are judged on the same held-out prompts, against the same answers of the start to each, which are in no pool; a
tie counts one half. Best-of-n picks by the reward that the policy trained on: the normalised score, and -1 for an answer that
was cut off. Its win rate at each n is the exact mean over all subsets of a pool of answers of the start, read between two n by
its KL, ``log n - (n - 1) / n`` nats, an upper bound. The policy's KL is the mean of the log-ratio of policy and start (k1) over
its answers. Models are sampled and scored here with transformers alone, which shares no code with the runs that it judges.
Intervals of 95 % draw whole prompts again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_ray.console import progress
from rlhf_ray.evaluation import best_of_n_kl
from rlhf_ray.evaluation.intervals import draw_prompts
from rlhf_ray.world.gold import gold_score

CUT_OFF = -1.0
"""The reward of an answer that was cut off: ``algorithm.shaping.missing_eos`` in the recipes of ``learning_runs``."""
NEW_TOKENS, ROWS, BLOCK = 32, 1024, 256
OPPONENTS, ANSWERS = 16, 8
"""Answers of the start and of the policy to each prompt; an answer's win rate is against all of these opponents."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class AtEqualKl:
    """What is known of one policy."""

    win_rate: float
    kl: float
    n: float
    """The n whose KL is the policy's."""
    best_of_n: float
    """The win rate of best-of-n there."""
    ratio: float
    interval: tuple[float, float]
    """Of the ratio, 95 %."""


def subset_weights(pool: int, n: int) -> Array:
    """The probability that each rank of ``pool`` samples, from the worst, is the best of a random subset of n; (pool,)."""
    total = math.comb(pool, n)
    return np.array([math.comb(rank, n - 1) / total for rank in range(pool)])


def best_of_curve(rewards: Array, wins: Array, sizes: Sequence[int]) -> Array:
    """The win rate of best-of-n at every prompt, for every n of ``sizes``: (sizes, prompts).

    ``rewards`` and ``wins`` are (prompts, pool). Samples of equal reward share their places equally.
    """
    order = np.argsort(rewards, axis=1, kind="stable")
    ranked = np.take_along_axis(rewards, order, axis=1)
    won = np.take_along_axis(wins, order, axis=1)
    for row, (values, mine) in enumerate(zip(ranked, won, strict=True)):
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        won[row] = (np.bincount(group, weights=mine) / counts)[group]
    return np.stack([won @ subset_weights(rewards.shape[1], n) for n in sizes])


def read_at(kl: float, sizes: Sequence[int], curve: Array) -> tuple[float, float]:
    """The n and the win rate at ``kl`` nats, between the two sizes around it; ``curve`` has a mean for each size.

    Raises ``ValueError`` where the largest size costs less than ``kl``.
    """
    costs = [best_of_n_kl(n) for n in sizes]
    if kl > costs[-1]:
        raise ValueError(f"best of {sizes[-1]} costs {costs[-1]:.2f} nats, and the policy {kl:.2f}: raise the pool")
    return float(np.interp(kl, costs, sizes)), float(np.interp(kl, costs, curve))


def at_equal_kl(policy_wins: Array, kl: Array, rewards: Array, wins: Array, seed: int = 0) -> AtEqualKl:
    """Compare; ``policy_wins`` and ``kl`` are (prompts,), ``rewards`` and ``wins`` of the pool (prompts, pool)."""
    pool = rewards.shape[1]
    sizes = sorted(
        {1, *(round(2 ** (power / 4)) for power in range(1, 4 * pool.bit_length())), pool} & {*range(1, pool + 1)}
    )
    curve = best_of_curve(rewards, wins, sizes)
    n, at = read_at(float(kl.mean()), sizes, curve.mean(axis=1))
    ratios = []
    for counts in draw_prompts(len(kl), resamples=1000, seed=seed):
        for drawn in counts / len(kl):
            _, other = read_at(min(float(drawn @ kl), best_of_n_kl(pool)), sizes, curve @ drawn)
            ratios.append(float(drawn @ policy_wins) / other)
    low, high = np.quantile(ratios, (0.025, 0.975))
    rate = float(policy_wins.mean())
    return AtEqualKl(rate, float(kl.mean()), n, at, rate / at, (float(low), float(high)))


# ------------------------------------------------------------------------------------------------- sampling, with transformers


@dataclass(frozen=True)
class Sampled:
    """Answers to some prompts."""

    ids: list[list[int]]
    """Of each answer, its end included."""
    log_probs: Array
    """Of each answer by the model that gave it; (answers,)."""


@torch.inference_mode()
def sample(model: Any, prompts: Sequence[Sequence[int]], end: int, generator: torch.Generator) -> Sampled:
    """One answer to each prompt, at temperature 1, of at most :data:`NEW_TOKENS` tokens; prompts are padded on the left."""
    ids, mask = left_padded(prompts)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    answers: list[list[int]] = [[] for _ in prompts]
    total, rows = torch.zeros(len(prompts), dtype=torch.float64), torch.arange(len(prompts))
    cache, fed = None, ids
    for _ in range(NEW_TOKENS):
        out = model(
            input_ids=fed, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache, log_probs = out.past_key_values, out.logits[:, -1].float().log_softmax(-1)
        token = torch.multinomial(log_probs.exp(), 1, generator=generator)
        total[rows] += log_probs.gather(1, token)[:, 0]
        for row, chosen in zip(rows.tolist(), token[:, 0].tolist(), strict=True):
            answers[row].append(chosen)
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
        fed, at = token, at[:, -1:] + 1
        left = (token[:, 0] != end).nonzero()[:, 0]  # answers that have ended are computed no further
        if len(left) == 0:
            break
        if len(left) < len(rows):
            rows, mask, fed, at = rows[left], mask[left], fed[left], at[left]
            cache.batch_select_indices(left)
    return Sampled(answers, total.numpy())


@torch.inference_mode()
def log_prob(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Array:
    """The log-probability of each answer; (answers,)."""
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = left_padded(whole)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    each = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    lengths = torch.tensor([len(answer) for answer in answers])
    inside = torch.arange(each.shape[1]) >= (each.shape[1] - lengths)[:, None]
    return np.asarray((each.double() * inside).sum(1).numpy())


@torch.inference_mode()
def score(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Array:
    """The raw score of each answer, read at its last token; (answers,)."""
    ids, mask = left_padded([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
    hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    return np.asarray(model.score(hidden.last_hidden_state[:, -1])[:, 0].double().numpy())


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (rows, longest), with every row at the right."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, longest - len(row) :] = torch.tensor(row)
        mask[place, longest - len(row) :] = 1
    return ids, mask


class World:
    """The start, the reward model and the held-out prompts of a seed, with opponents and a pool of the start's answers to each.

    ``kept`` is a file that holds opponents and pool, and gets them where it is not there.
    """

    def __init__(self, start: Path, reward: Path, seed: int, prompts: int, pool: int, kept: Path | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        from rlhf_ray.config.loading import load_config
        from rlhf_ray.data.load import load_prompts

        self.tokenizer = AutoTokenizer.from_pretrained(start)
        self.start = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).eval()
        self.reward = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32).eval()
        record = json.loads((reward / "config.json").read_text())
        self.mean, self.std = float(record["mean"]), float(record["std"])
        keys = [f"data.world.seed={seed}", f"data.world.evaluation_prompts={prompts}", "evaluation.prompts=1"]
        config = load_config("demo-ppo", keys).to_train()
        held_out = load_prompts(config.data, self.tokenizer, seed).held_out
        self.texts, self.prompts = [one.text for one in held_out], [[*one.token_ids] for one in held_out]
        self.parts = [slice(first, first + ROWS) for first in range(0, len(self.prompts), ROWS)]
        self.end = int(self.tokenizer.eos_token_id)
        self.opponents = self.pool_rewards = self.pool_wins = np.zeros((0, 0))
        if kept and kept.is_file():
            self._read(kept, pool)
            return
        generator = torch.Generator().manual_seed(seed)
        self.opponents = np.stack([self.gold(self.answer(self.start, generator).ids) for _ in range(OPPONENTS)], 1)
        answers = [self.answer(self.start, generator).ids for _ in progress(range(pool), "answers of the start")]
        self.pool_rewards = np.stack([self.rewards(ids) for ids in answers], 1)
        self.pool_wins = np.stack([self.wins(self.gold(ids)) for ids in answers], 1)
        if kept:
            np.savez_compressed(
                kept, opponents=self.opponents, pool_rewards=self.pool_rewards, pool_wins=self.pool_wins
            )

    def _read(self, kept: Path, pool: int) -> None:
        with np.load(kept) as found:
            self.opponents, self.pool_rewards, self.pool_wins = (
                found[name] for name in ("opponents", "pool_rewards", "pool_wins")
            )
        if self.pool_rewards.shape != (len(self.prompts), pool):
            shape = " prompts and a pool of ".join(map(str, self.pool_rewards.shape))
            raise SystemExit(
                f"{kept} holds {shape}, not {len(self.prompts)} and {pool}: name another file, or delete it"
            )

    def answer(self, model: Any, generator: torch.Generator) -> Sampled:
        """An answer of a model to every prompt."""
        parts = [sample(model, self.prompts[part], self.end, generator) for part in self.parts]
        return Sampled([ids for part in parts for ids in part.ids], np.concatenate([part.log_probs for part in parts]))

    def by_length(
        self,
        work: Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Array],
        answers: Sequence[Sequence[int]],
    ) -> Array:
        """A number for the answer to each prompt; those of similar length are computed together, with little padding."""
        order = np.argsort([len(prompt) + len(ids) for prompt, ids in zip(self.prompts, answers, strict=True)])
        found = np.empty(len(order))
        for block in np.array_split(order, -(-len(order) // BLOCK)):
            found[block] = work([self.prompts[row] for row in block], [answers[row] for row in block])
        return found

    def gold(self, answers: Sequence[Sequence[int]]) -> Array:
        """The gold score of an answer to each prompt."""
        return np.array(
            [
                gold_score(text, self.tokenizer.decode(ids, skip_special_tokens=True), ids[-1] == self.end)
                for text, ids in zip(self.texts, answers, strict=True)
            ]
        )

    def wins(self, gold: Array) -> Array:
        """The share of the opponents that it beats; a tie counts one half."""
        return np.asarray(((gold[:, None] > self.opponents) + 0.5 * (gold[:, None] == self.opponents)).mean(axis=1))

    def rewards(self, answers: Sequence[Sequence[int]]) -> Array:
        """The reward that training gives to an answer to each prompt."""
        scores = self.by_length(partial(score, self.reward), answers)
        ended = np.array([ids[-1] == self.end for ids in answers])
        return np.where(ended, (scores - self.mean) / self.std, CUT_OFF)

    def judge(self, policy: Path, seed: int = 0) -> AtEqualKl:
        """Compare a policy with best-of-n of the start."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(seed + 1)
        wins, kl = [], []
        for _ in range(ANSWERS):
            answered = self.answer(model, generator)
            reference = self.by_length(partial(log_prob, self.start), answered.ids)
            wins.append(self.wins(self.gold(answered.ids)))
            kl.append(answered.log_probs - reference)
        return at_equal_kl(np.mean(wins, axis=0), np.mean(kl, axis=0), self.pool_rewards, self.pool_wins)


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge policies and print what was found, a line of JSON each."""
    parser = argparse.ArgumentParser(prog="benchmarks.equal_kl", description="a policy against best-of-n at its own KL")
    parser.add_argument("policies", nargs="+", type=Path, metavar="POLICY")
    parser.add_argument("--start", type=Path, required=True, help="the policy that they began with")
    parser.add_argument("--reward", type=Path, required=True, help="the reward model that they learned from")
    parser.add_argument("--seed", type=int, required=True, help="of the world and the run")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--pool", type=int, default=80, help="answers of the start to each prompt")
    parser.add_argument("--kept", type=Path, help="a file for the answers of the start, to judge other policies later")
    options = parser.parse_args(arguments)
    world = World(options.start, options.reward, options.seed, options.prompts, options.pool, options.kept)
    for policy in options.policies:
        print(json.dumps({"policy": str(policy), **asdict(world.judge(policy))}), flush=True)


if __name__ == "__main__":
    main()
