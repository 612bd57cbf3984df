"""Train a policy on preferences directly (DPO and its relatives), without a reward model and without sampling.

Invariants: the reference is the policy as the config names it, before its first update, also in a run that goes on. ``final/``
holds the weights of the last update.
"""

from __future__ import annotations

from rlhf_ray.actors.place import Place
from rlhf_ray.config.jobs.dpo import DpoConfig
from rlhf_ray.models import load_tokenizer
from rlhf_ray.runs.checkpoints import Checkpoint
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.incidents import START
from rlhf_ray.trainers.checkpointing import Checkpointer
from rlhf_ray.trainers.closing import closing
from rlhf_ray.trainers.journal import Journal
from rlhf_ray.trainers.recovery import Starting
from rlhf_ray.trainers.session import Session
from rlhf_ray.trainers.supervised.loop import SupervisedTrainer
from rlhf_ray.trainers.supervised.preferences import JudgedAnswers, Pairs, Preferences
from rlhf_ray.trainers.watchdog import Watchdog


def train_dpo(
    config: DpoConfig, run: RunDirectory, checkpoint: Checkpoint | None, *, place: Place | None = None
) -> None:
    """Train, evaluate, write ``final/`` and the report; ``place`` is where the ranks live, by default a cluster."""
    tokenizer = load_tokenizer(config.policy.model)
    preferences: Preferences = (Pairs if config.loss.reads_pairs else JudgedAnswers)(config, tokenizer)
    updates = preferences.task().total_updates(checkpoint)
    with (
        Session(config, run, place=place) as session,
        Journal(run, config, session.memory_of_ranks) as journal,
        Watchdog(run, config, journal, session),
    ):
        starting = Starting(run, config, checkpoint)
        with journal.clock.part(START):
            policy = starting.group(session.policy(config.policy, total_updates=updates))
        with journal.phase("log_probs"):
            starting.surviving(lambda: preferences.begin(policy))
        checkpoints = Checkpointer(run, config.checkpoint, {"policy": policy}, checkpoint, updates)
        session.cleanup.callback(checkpoints.close)
        trainer = SupervisedTrainer(
            config,
            preferences.task(),
            policy,
            checkpoints=checkpoints,
            journal=journal,
            evaluate=preferences.figures,
            write_final=lambda: checkpoints.save_final(updates, {"": (policy, {})}),
            max_tokens=config.policy.training_tokens(config.batch),
            losses=starting.losses,
        )
        trainer.run()
        with closing(run, updates, "the last evaluation"):
            trainer.surviving(trainer.evaluation)
            page = preferences.page(tokenizer)
            if page is not None:
                journal.keep_preferences(page)
        with closing(run, updates, "the report"):
            journal.finish()
