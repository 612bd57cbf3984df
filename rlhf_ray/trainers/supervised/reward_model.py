"""Train a reward model, which gives an answer one number, on pairs of answers of which one was preferred.

Invariants: ``final/`` holds the weights of the last update, was read back before it was committed, and is there before the
last evaluation begins. ``best/`` exists only if an earlier evaluation was better than the last.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_ray.actors.place import Place
from rlhf_ray.config.jobs.reward_model import RewardModelConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.batches import make_pair_batch
from rlhf_ray.data.load import load_pairs
from rlhf_ray.models import load_tokenizer
from rlhf_ray.models.reward_reading import make_reward_record
from rlhf_ray.runs.checkpoints import Checkpoint
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.incidents import START
from rlhf_ray.trainers.checkpointing import Checkpointer
from rlhf_ray.trainers.closing import closing
from rlhf_ray.trainers.journal import Journal
from rlhf_ray.trainers.recovery import Starting
from rlhf_ray.trainers.session import Session
from rlhf_ray.trainers.supervised.best import Best
from rlhf_ray.trainers.supervised.loop import SupervisedTrainer, Task
from rlhf_ray.trainers.supervised.preference_loss import make_loss
from rlhf_ray.trainers.supervised.probes import measure_probes
from rlhf_ray.trainers.supervised.reward_evaluation import HeldOutPairs
from rlhf_ray.trainers.supervised.reward_saving import RewardSaver
from rlhf_ray.trainers.watchdog import Watchdog


def train_reward_model(
    config: RewardModelConfig, run: RunDirectory, checkpoint: Checkpoint | None, *, place: Place | None = None
) -> None:
    """Train, evaluate, keep the best model, write ``final/`` and the report; ``place`` is where the ranks live."""
    tokenizer = load_tokenizer(config.reward.model)
    examples = load_pairs(config.data, tokenizer, config.run.seed, graded=config.loss.name == "ordinal")
    record = make_reward_record(tokenizer, {pair.form for pair in examples.train}, config.data.template_variables)
    loss = make_loss(config.loss, [*examples.train, *examples.held_out])
    per_update = config.batch.pairs_per_update
    task = Task(examples.train, make_pair_batch, loss, per_update, examples.parts, config.epochs, unit=2)
    updates = task.total_updates(checkpoint)
    max_tokens = config.reward.forward_tokens(config.batch)
    with (
        Session(config, run, place=place) as session,
        Journal(run, config, session.memory_of_ranks) as journal,
        Watchdog(run, config, journal, session),
    ):
        starting = Starting(run, config, checkpoint)
        with journal.clock.part(START):
            placed = session.trained_reward(config.reward, total_updates=updates, routers=loss.router_balance > 0.0)
            reward = starting.group(placed)
            journal.measure_against(
                *starting.surviving(lambda: (reward.compute_shape().result(), reward.matmul_rate().result()))
            )
        held_out = HeldOutPairs(reward, examples.held_out, loss, max_tokens) if examples.held_out else None
        saver = RewardSaver(config, reward, examples.held_out or examples.train, tokenizer, record)
        best = Best(run, "evaluation/accuracy", saver.save) if config.evaluation.keep_best and held_out else None
        checkpoints = Checkpointer(run, config.checkpoint, {"reward": reward}, checkpoint, updates)
        session.cleanup.callback(checkpoints.close)
        trainer = SupervisedTrainer(
            config,
            task,
            reward,
            checkpoints=checkpoints,
            journal=journal,
            evaluate=held_out.figures if held_out else dict,
            write_final=lambda: saver.final(run, updates),
            max_tokens=config.reward.training_tokens(config.batch),
            best=best,
            losses=starting.losses,
        )
        trainer.run()
        with closing(run, updates, "the last evaluation, from which final/config.json gets its mean and std,"):
            figures = trainer.surviving(trainer.evaluation)
            saver.normalize_final(run, figures)
            journal.add_facts(settle_best(best, updates, figures))
            if held_out is not None:
                probes = trainer.surviving(lambda: measure_probes(config.data, reward, tokenizer, max_tokens))
                if probes is not None:
                    journal.log_evaluation(updates, probes.figures, headline=False)
                table = None if probes is None else probes.table
                journal.keep_preferences(held_out.page(tokenizer, config.evaluation.worst_pairs, table))
        with closing(run, updates, "the report"):
            journal.finish()


def settle_best(best: Best | None, updates: int, figures: Mapping[str, float]) -> dict[str, str]:
    """Remove ``best/`` if the last evaluation was the best one; returns what the report says about the best evaluation.

    A run is over-fitted if an earlier evaluation had both a higher accuracy and a lower loss than the last.
    """
    if best is None or best.so_far is None or not figures:
        return {}
    earlier = best.so_far
    accuracy, loss = (f"evaluation/{name}" for name in ("accuracy", "loss"))
    if best.improves(updates, figures):
        best.remove()
        return {"best": "the last update: final/ is also the best"}
    text = (
        f"update {earlier.update} had accuracy {earlier.figures[accuracy]:.4f} and loss {earlier.figures[loss]:.4f}, the last "
        f"one {figures[accuracy]:.4f} and {figures[loss]:.4f}"
    )
    over_fitted = earlier.figures[accuracy] > figures[accuracy] and earlier.figures[loss] < figures[loss]
    if over_fitted:
        get_logger("rm").warning("over-fitting: %s; best/ holds it", text)
    return {"best": f"best/: {text}", "over-fitting": "yes" if over_fitted else "no"}
