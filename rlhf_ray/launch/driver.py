"""The driver process of one run: reads the data, joins the cluster, runs the trainer of the config's kind.

Always true: all data is read and checked before Ray starts; every ending is an exit code, and a user's mistake is one
message without a stack trace; a run that was refused before its first step leaves no directory behind.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray import environment
from rlhf_ray.config.loading import dump_config, load_config, parse_config
from rlhf_ray.config.paths import run_directory
from rlhf_ray.config.schema import (
    JobConfig,
    RewardModelConfig,
    ServeConfig,
    SftConfig,
    TrainingConfig,
)
from rlhf_ray.console import get_logger
from rlhf_ray.errors import EXIT_DONE, EXIT_FAILED, CapacityError, RequestError, RlhfRayError
from rlhf_ray.imports import quick_imports
from rlhf_ray.runs.checkpoints import Checkpoint
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers import stopping

CONFIG_NAME = "config.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Drive a new run, whose resolved config comes on standard input, or go on with one; returns the exit code."""
    parser = argparse.ArgumentParser(prog="rlhf_ray.launch.driver")
    parser.add_argument("--resume", metavar="RUN_DIR")
    given = parser.parse_args(arguments)
    environment.prepare()
    return exit_code(lambda: new_run(sys.stdin.read()) if given.resume is None else resume_run(given.resume))


def exit_code(work: Callable[[], None]) -> int:
    """Do ``work``; every ending is a code, and only a failure of ours shows its trace."""
    stopping.listen()
    try:
        work()
    except RlhfRayError as error:
        get_logger().error("%s", error)
        return error.exit_code
    except Exception:
        get_logger().exception("the driver failed")
        return EXIT_FAILED
    return EXIT_DONE


def new_run(text: str) -> None:
    """Make the run directory of a config and drive it from the start."""
    config = training_config(parse_config(text))
    run = new_run_directory(config)
    try:
        drive(config, run, None)
    except (RequestError, CapacityError):
        if not run.metrics.read() and not run.checkpoints.steps():  # nothing was begun: the name is free again
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    finally:
        run.release()


def resume_run(path: str) -> None:
    """Go on with a run from its last valid checkpoint, or from its start where none was committed."""
    config = training_config(load_config(Path(path) / CONFIG_NAME))
    run, checkpoint = RunDirectory.resume(path, config.checkpoint.keep)
    drive(config, run, checkpoint)


def training_config(config: JobConfig) -> TrainingConfig:
    """``config``, if it is a job that trains."""
    if isinstance(config, ServeConfig):
        raise RequestError("a config of kind serve is not trained: run it with rlhf-ray serve MODEL")
    return config


def new_run_directory(config: TrainingConfig) -> RunDirectory:
    """The directory of a new run, ``run.root/run.name``."""
    return RunDirectory.create(run_directory(config), dump_config(config), config.checkpoint.keep)


def drive(config: TrainingConfig, run: RunDirectory, checkpoint: Checkpoint | None) -> None:
    """Run the trainer of ``config`` in this process, from ``checkpoint`` or from the start."""
    stopping.listen()
    _trainer(config)(config, run, checkpoint)


def _trainer(config: TrainingConfig) -> Callable[[Any, RunDirectory, Checkpoint | None], None]:
    """What trains a config of this kind."""
    with quick_imports():
        if isinstance(config, SftConfig):
            from rlhf_ray.trainers.supervised.sft import train_sft

            return train_sft
        if isinstance(config, RewardModelConfig):
            from rlhf_ray.trainers.supervised.reward_model import train_reward_model

            return train_reward_model
        from rlhf_ray.trainers.ppo.build import train_ppo

        return train_ppo


if __name__ == "__main__":
    sys.exit(main())
