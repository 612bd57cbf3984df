"""Reward-model training: one number an answer, learned from which of two was preferred."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.config.schema import RewardModelConfig
from rlhf_ray.evaluation import accuracy, calibration_error, tie_rate
from rlhf_ray.models import load_tokenizer
from rlhf_ray.runs.checkpoints import Checkpoint
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.commits import Commits
from rlhf_ray.trainers.datasets import PairExample, pair_batch, pair_examples
from rlhf_ray.trainers.journal import Journal
from rlhf_ray.trainers.preference_loss import make_loss
from rlhf_ray.trainers.session import Place, Session
from rlhf_ray.trainers.supervised import SupervisedTrainer, Task, cut, total_updates


def train_reward_model(
    config: RewardModelConfig, run: RunDirectory, checkpoint: Checkpoint | None, *, place: Place | None = None
) -> None:
    """Train, evaluate, and write ``final/`` with the normalisation of the held-out scores."""
    tokenizer = load_tokenizer(config.reward.model)
    examples = pair_examples(config.data, tokenizer, config.run.seed)
    loss = make_loss(config.loss, [*examples.train, *examples.held_out])
    task = Task(examples.train, pair_batch, loss, config.batch.pairs_per_update, examples.parts, unit=2)
    updates = total_updates(config.epochs, task)
    with Session(config, place=place) as session:
        reward = session.reward(config.reward, total_updates=updates).load().result()
        commits = Commits(run, config.checkpoint, {"reward": reward}, checkpoint)
        with Journal(run, config) as journal:
            trainer = SupervisedTrainer(
                config,
                task,
                reward,
                commits=commits,
                journal=journal,
                evaluate=lambda: evaluate(reward, examples.held_out, config.reward.forward_tokens(config.batch)),
                max_tokens=config.reward.training_tokens(config.batch),
            )
            figures = trainer.run()
            commits.final({"": (reward, normalization(figures))})
            journal.finish()


def evaluate(reward: RewardGroup, held_out: Sequence[PairExample], max_tokens: int) -> dict[str, float]:
    """Accuracy, margin, calibration and the scores' mean and deviation on held-out pairs."""
    if not held_out:
        return {}
    batch = pair_batch(held_out)
    schedule = cut(batch, ranks=reward.size, max_tokens=max_tokens, unit=2)
    scores = reward.scores(reward.share(batch), schedule).result().double()
    chosen, rejected = scores[0::2].numpy(), scores[1::2].numpy()
    return {
        "evaluation/accuracy": accuracy(chosen, rejected),
        "evaluation/margin": float((chosen - rejected).mean()),
        "evaluation/tie_rate": tie_rate(chosen, rejected),
        "evaluation/calibration_error": calibration_error(chosen, rejected),
        "evaluation/score_mean": float(scores.mean()),
        "evaluation/score_std": float(torch.std(scores, unbiased=False)),
    }


def normalization(figures: dict[str, float]) -> dict[str, float]:
    """The mean and deviation that ``config.json`` of the reward model carries."""
    if not figures:
        return {}
    return {"mean": figures["evaluation/score_mean"], "std": figures["evaluation/score_std"]}
