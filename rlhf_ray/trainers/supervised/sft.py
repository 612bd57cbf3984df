"""Supervised fine-tuning: train a policy to give the answers of demonstrations, or to find in them what a teacher does.

Invariants: the loss is over the tokens of answers alone. ``final/`` holds the weights of the last update.
"""

from __future__ import annotations

from rlhf_ray.actors.groups import PolicyGroup
from rlhf_ray.actors.place import Place
from rlhf_ray.algorithms.losses import Distillation, Divergence, NegativeLogLikelihood
from rlhf_ray.config.jobs.distill import DistillConfig
from rlhf_ray.config.jobs.sft import SftConfig
from rlhf_ray.config.sections.models import ModelConfig
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
    _train(config, run, checkpoint, place, NegativeLogLikelihood())


def train_distill(
    config: DistillConfig, run: RunDirectory, checkpoint: Checkpoint | None, *, place: Place | None = None
) -> None:
    """The same with a teacher, to whose distribution of each token of the answers the policy is drawn."""
    loss = config.loss
    divergence = Divergence(loss.name, loss.beta, loss.temperature)
    _train(config, run, checkpoint, place, Distillation(divergence, loss.likelihood), config.teacher)


def _train(
    config: SftConfig,
    run: RunDirectory,
    checkpoint: Checkpoint | None,
    place: Place | None,
    loss: NegativeLogLikelihood | Distillation,
    teacher: ModelConfig | None = None,
) -> None:
    tokenizer = load_tokenizer(config.policy.model)
    examples = load_demonstrations(config.data, tokenizer, config.run.seed)
    size = config.batch.sequences_per_update
    task = Task(examples.train, make_demonstration_batch, loss, size, examples.parts, config.epochs)
    updates = task.total_updates(checkpoint)
    with (
        Session(config, run, place=place) as session,
        Journal(run, config, session.memory_of_ranks) as journal,
        Watchdog(run, config, journal, session),
    ):
        starting = Starting(run, config, checkpoint)
        with journal.clock.part(START):
            policy = starting.group(session.policy(config.policy, total_updates=updates, teacher=teacher))
        checkpoints = Checkpointer(run, config.checkpoint, {"policy": policy}, checkpoint, updates)
        session.cleanup.callback(checkpoints.close)
        trainer = SupervisedTrainer(
            config,
            task,
            policy,
            checkpoints=checkpoints,
            journal=journal,
            evaluate=lambda: evaluate(policy, examples.held_out, config.policy.forward_tokens(config.batch), loss),
            write_final=lambda: checkpoints.save_final(updates, {"": (policy, {})}),
            max_tokens=config.policy.training_tokens(config.batch),
            losses=starting.losses,
        )
        trainer.run()
        with closing(run, updates, "the last evaluation"):
            trainer.surviving(trainer.evaluation)
        with closing(run, updates, "the report"):
            journal.finish()


def evaluate(
    policy: PolicyGroup,
    held_out: list[DemonstrationExample],
    max_tokens: int,
    loss: NegativeLogLikelihood | Distillation,
) -> dict[str, float]:
    """Means over the tokens of held-out answers, in nats: their negative log-likelihood, and the divergence from a teacher.

    Empty where no answers are held out.
    """
    if not held_out:
        return {}
    batch = make_demonstration_batch(held_out)
    schedule = schedule_update(batch, ranks=policy.size, max_tokens=max_tokens)
    shared, answer = policy.share(batch), batch["action_mask"]
    figures = {"evaluation/loss": -float(policy.log_probs(shared, schedule).result()[answer].double().mean())}
    if isinstance(loss, Distillation):
        divergences = policy.divergences(shared, schedule, loss.divergence).result()
        figures["evaluation/divergence"] = float(divergences[answer].double().mean())
    return figures
