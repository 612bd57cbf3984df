"""Supervised fine-tuning (SFT): train a policy to give the answers of demonstrations.

Invariants: the loss is over the tokens of answers alone. ``final/`` holds the weights of the last update.
"""

from __future__ import annotations

from rlhf_ray.actors.groups import PolicyGroup
from rlhf_ray.actors.place import Place
from rlhf_ray.algorithms.losses import NegativeLogLikelihood
from rlhf_ray.config.jobs.sft import SftConfig
from rlhf_ray.data.batches import DemonstrationExample, make_demonstration_batch
from rlhf_ray.data.load import load_demonstrations
from rlhf_ray.models import load_tokenizer
from rlhf_ray.runs.checkpoints import Checkpoint
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.incidents import START
from rlhf_ray.trainers.checkpointing import Checkpointer
from rlhf_ray.trainers.closing import closing
from rlhf_ray.trainers.journal import Journal
from rlhf_ray.trainers.recovery import Starting
from rlhf_ray.trainers.session import Session
from rlhf_ray.trainers.supervised.loop import SupervisedTrainer, Task, schedule_update
from rlhf_ray.trainers.watchdog import Watchdog


def train_sft(
    config: SftConfig, run: RunDirectory, checkpoint: Checkpoint | None, *, place: Place | None = None
) -> None:
    """Train, evaluate, write ``final/`` and the report; ``place`` is where the ranks live, by default a cluster."""
    tokenizer = load_tokenizer(config.policy.model)
    examples = load_demonstrations(config.data, tokenizer, config.run.seed)
    size = config.batch.sequences_per_update
    task = Task(examples.train, make_demonstration_batch, NegativeLogLikelihood(), size, examples.parts, config.epochs)
    updates = task.total_updates(checkpoint)
    with (
        Session(config, run, place=place) as session,
        Journal(run, config, session.memory_of_ranks) as journal,
        Watchdog(run, config, journal, session),
    ):
        starting = Starting(run, config, checkpoint)
        with journal.clock.part(START):
            policy = starting.group(session.policy(config.policy, total_updates=updates))
        checkpoints = Checkpointer(run, config.checkpoint, {"policy": policy}, checkpoint, updates)
        session.cleanup.callback(checkpoints.close)
        trainer = SupervisedTrainer(
            config,
            task,
            policy,
            checkpoints=checkpoints,
            journal=journal,
            evaluate=lambda: evaluate(policy, examples.held_out, config.policy.forward_tokens(config.batch)),
            write_final=lambda: checkpoints.save_final(updates, {"": (policy, {})}),
            max_tokens=config.policy.training_tokens(config.batch),
            losses=starting.losses,
        )
        trainer.run()
        with closing(run, updates, "the last evaluation"):
            trainer.surviving(trainer.evaluation)
        with closing(run, updates, "the report"):
            journal.finish()


def evaluate(policy: PolicyGroup, held_out: list[DemonstrationExample], max_tokens: int) -> dict[str, float]:
    """The mean negative log-likelihood of the tokens of held-out answers, in nats; empty where none are held out."""
    if not held_out:
        return {}
    batch = make_demonstration_batch(held_out)
    schedule = schedule_update(batch, ranks=policy.size, max_tokens=max_tokens)
    log_probs = policy.log_probs(policy.share(batch), schedule).result()
    answer = log_probs[batch["action_mask"]].double()
    return {"evaluation/loss": -float(answer.mean())}
