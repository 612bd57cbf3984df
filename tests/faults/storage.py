"""``python -m tests.faults.storage [--bits N] [--every N]``: a fault at every file operation of a save, and flipped bits.

A small PPO run is trained in this process, then one more checkpoint and one more ``final/`` are written again and again, by
DeepSpeed and transformers themselves. At each file operation, whoever makes it, the disk is full, cannot be written or fails;
and a kill or a power cut comes before it. Always true of a run that passes: what goes on finds a checkpoint that is whole, the
one before or the new one, and never fewer than two; ``final/`` is whole; what was acknowledged is there; a fault ends in an
error that names the disk's reason; nothing half-written stays; and the next save succeeds.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from rlhf_ray.config.sections.run import LEAST_KEPT, CheckpointConfig
from rlhf_ray.errors import IntegrityError, RlhfRayError, StorageError
from rlhf_ray.runs.checkpoints import BAD
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.storage.atomic import PENDING, REPLACED
from rlhf_ray.storage.manifest import verify
from rlhf_ray.trainers.checkpointing import Checkpointer
from tests.faults.power_cut import LOSSES, Loss, cut
from tests.faults.supervisor import POSSIBLE
from tests.faults.syscalls import FileOperations, Operation, Order
from tests.trainers.small_runs import config_of, signals_as_before, train

STEPS = 3
CRITIC = (
    "{engine: {zero: 0, optimizer: {learning_rate: 0.003}}, "
    "model: {make: {shape: llama-tiny, tokenizer_from: world, seed: 2}, head_init: zero, dtype: fp32}}"
)
JOB = {
    "ppo": [f"steps={STEPS}", "checkpoint.every_steps=1", "policy.engine.zero=1", "algorithm.name=ppo", f"critic={CRITIC}"],
    "sft": ["epochs=0.75", "checkpoint.every_steps=1", "policy.engine.zero=1"],
}  # fmt: skip
HIDDEN = ("no space is left", "No such file or directory: ")
"""Other words for a reason; safetensors 0.8 calls a file that cannot be opened for any reason missing, and names it."""
SHOWN = 20
"""Troubles that are printed."""
FAULTS = {errno.ENOSPC: True, errno.EIO: False, errno.EROFS: True}
"""The error of each fault, and whether it lasts: a full disk stays full."""


@dataclass
class Saved:
    """A trained run, copied to ``base``, whose groups live and can be saved again at ``path``."""

    path: Path
    base: Path
    groups: dict[str, Any]
    parts: dict[str, Any]
    state: dict[str, Any]

    @classmethod
    def train(cls, root: Path, kind: str) -> Saved:
        """Train the small run of a kind below ``root``."""
        kept: list[tuple[Checkpointer, Any]] = []
        save_final = Checkpointer.save_final

        def noted(checkpoints: Checkpointer, step: int, parts: Any) -> None:
            kept.append((checkpoints, parts))
            save_final(checkpoints, step, parts)

        with mock.patch.object(Checkpointer, "save_final", noted):
            run = train(config_of(kind, root, *JOB[kind]))
        (checkpoints, parts), newest = kept[-1], run.checkpoints.latest_valid()
        assert newest is not None and newest.step == STEPS
        base = root / "base"
        shutil.copytree(run.path, base, symlinks=True)
        ledger = RunDirectory.open(base).ledger
        if entries := ledger.entries():  # a step is there before its checkpoint
            ledger.append(STEPS + 1, [1 + max(max(entry.prompt_ids) for entry in entries)])
        return cls(run.path, base, checkpoints.groups, dict(parts), newest.manifest.about["state"])

    def put_back(self) -> None:
        """The run directory as it was after its last step."""
        shutil.rmtree(self.path)
        shutil.copytree(self.base, self.path, symlinks=True)

    def saving(self, step: int = STEPS + 1) -> Callable[[], None]:
        """What writes one more checkpoint, and ``final/`` once more."""
        run = RunDirectory.open(self.path)
        checkpoints = Checkpointer(run, CheckpointConfig(), self.groups, run.checkpoints.latest_valid(), step)

        def save() -> None:
            checkpoints.save(step, self.state)
            checkpoints.settle()
            checkpoints.save_final(step, self.parts)

        return save

    def load(self, checkpoint: Any) -> None:
        """Have DeepSpeed load it."""
        Checkpointer(RunDirectory.open(self.path), CheckpointConfig(), self.groups, checkpoint, 9).restore()


@dataclass
class Tally:
    """What was tried and what went wrong."""

    tried: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)

    def add(self, kind: str, where: str, found: Sequence[str]) -> None:
        self.tried[kind] += 1
        self.troubles += [f"{kind} at {where}: {one}" for one in found]


def troubles(saved: Saved, *, must_be: int | None = None, load: bool = True) -> list[str]:
    """What is wrong with the run directory for whoever goes on with it; ``must_be`` is the step that was acknowledged."""
    found = []
    try:
        run, checkpoint = RunDirectory.resume(saved.path)
    except RlhfRayError as error:
        return [f"cannot be resumed: {error}"]
    try:
        if checkpoint is None or checkpoint.step not in (STEPS, STEPS + 1):
            found.append(f"goes on from {checkpoint}")
        elif must_be not in (None, checkpoint.step):
            found.append(f"goes on from step {checkpoint.step}, though step {must_be} was committed")
        elif load:
            saved.load(checkpoint)
        whole = [step for step in run.checkpoints.steps() if is_whole(run.checkpoints.checkpoint_path(step))]
        if len(whole) < LEAST_KEPT:
            found.append(f"only {whole} are whole")
        if run.final_step(whole=True) not in ((STEPS, STEPS + 1) if must_be is None else (must_be,)):
            found.append(f"final/ is that of step {run.final_step(whole=True)}")
        left = [path for path in run.path.rglob("*") if path.name.startswith((PENDING, REPLACED)) or BAD in path.name]
        found += [f"{path} is left" for path in left]
    finally:
        run.release()
    return found


def is_whole(directory: Path) -> bool:
    """Whether each byte of a committed directory is as it was."""
    try:
        verify(directory)
    except IntegrityError:
        return False
    return True


def crashes(
    saved: Saved, operations: FileOperations, tally: Tally, losses: Sequence[Loss] = LOSSES, every: int = 1
) -> list[Operation]:
    """A kill and a power cut before each operation of a save that changes something; returns all operations.

    Of the states each ``every``-th is looked at, and the last.
    """
    saved.put_back()
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-states-") as states:
        made, error = operations.run(saved.saving(), Order(str(saved.path), states=states, every=every))
        if error is not None:
            raise error
        ordered = sorted(Path(states).iterdir())
        for state in ordered:
            before, paths, unsynced = pickle.loads((state / "about").read_bytes())
            for loss in losses:
                if loss != "nothing" and not (unsynced.content or unsynced.changes):
                    continue
                shutil.rmtree(saved.path)
                shutil.copytree(state / "files", saved.path, symlinks=True)
                cut(saved.path, paths, unsynced, loss)
                last = STEPS + 1 if state == ordered[-1] else None
                kind = "kill" if loss == "nothing" else f"power cut that takes {loss}"
                tally.add(kind, f"{state.name}, before {before}", troubles(saved, must_be=last, load=False))
    return made


def points(made: Sequence[Operation]) -> Iterator[tuple[int, int]]:
    """The operations at which a fault is tried, and its error: of the writes to a file in a row the first, second and last."""
    for number, one in enumerate(made):
        row = [later.kind == "write" and later.path == one.path for later in made[max(0, number - 2) : number + 2]]
        if one.kind == "write" and len(row) == 4 and all(row):
            continue
        yield from ((number, code) for code in FAULTS if one.kind in POSSIBLE[code])


def fault(saved: Saved, operations: FileOperations, tally: Tally, at: int, code: int, *, load: bool = True) -> None:
    """One save with a fault, and what follows."""
    saved.put_back()
    made, error = operations.run(saved.saving(), Order(str(saved.path), at, code, FAULTS[code]))
    where = f"{at}, {made[at].call} {made[at].path}" if at < len(made) else f"{at}, which was not reached"
    found = []
    if error is not None and not isinstance(error, StorageError | IntegrityError):
        found.append(f"ended with {error!r}")
    elif error is not None and not any(reason in str(error) for reason in (os.strerror(code), *HIDDEN)):
        found.append(f"does not say the disk's reason: {error}")
    found += troubles(saved, must_be=None if error is not None else STEPS + 1, load=load)
    _, again = operations.run(saved.saving(STEPS + 2), Order(str(saved.path)))
    if again is not None:
        found.append(f"the next save failed: {again!r}")
    tally.endings["the save ended as if nothing were" if error is None else type(error).__name__] += 1
    tally.add(errno.errorcode[code], where, found)


def flipped_bits(saved: Saved, count: int, rng: random.Random, tally: Tally) -> None:
    """Flip one bit after the other in the newest checkpoint and in ``final/``; each flip is found."""
    saved.put_back()
    run = RunDirectory.open(saved.path)
    newest = run.checkpoints.checkpoint_path(STEPS)
    files = sorted(path for folder in (newest, run.final) for path in folder.rglob("*") if path.is_file())
    for _ in range(count):
        file = rng.choice(files)
        content = file.read_bytes()
        bit = rng.randrange(8 * len(content)) if content else 0
        changed = bytearray(content or b"\0")
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        if file.is_relative_to(newest):
            checkpoint = run.checkpoints.latest_valid()
            found = [] if checkpoint is not None and checkpoint.step == STEPS - 1 else [f"goes on from {checkpoint}"]
            if newest.with_name(newest.name + BAD).exists():
                os.rename(newest.with_name(newest.name + BAD), newest)
        else:
            found = [] if run.final_step(whole=True) is None else ["final/ counts as whole"]
        file.write_bytes(content)
        tally.add("flipped bit", f"bit {bit} of {file.relative_to(saved.path)}", found)


def campaign(root: Path, kind: str, bits: int, every: int, seed: int) -> Tally:
    """Everything for one kind of job; of the faults each ``every``-th."""
    tally = Tally()
    say: Callable[[str], None] = lambda text: print(f"{kind}: {text}", flush=True)  # noqa: E731
    with signals_as_before(), quiet():
        saved = Saved.train(root, kind)
        with FileOperations() as operations:
            made = crashes(saved, operations, tally)
            say(f"{len(made)} operations: {dict(Counter(one.call for one in made))}")
            for at, code in list(points(made))[::every]:
                fault(saved, operations, tally, at, code)
        flipped_bits(saved, bits, random.Random(seed), tally)
    say(f"{sum(tally.tried.values())} tried: {dict(tally.tried)}; faults ended: {dict(tally.endings)}")
    for line in tally.troubles[:SHOWN]:
        say(line)
    return tally


@contextmanager
def quiet() -> Iterator[None]:
    """The project's log says nothing in the block: every fault has its line there."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try it all; the exit code is 0 if nothing went wrong."""
    parser = argparse.ArgumentParser(
        prog="tests.faults.storage", description="faults at every file operation of a save"
    )
    parser.add_argument("--kind", choices=list(JOB), default="ppo")
    parser.add_argument("--bits", type=int, default=1000, help="flipped bits (default 1000)")
    parser.add_argument("--every", type=int, default=1, help="try each N-th fault (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="draws the bits")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-storage-") as root:
        tally = campaign(Path(root), options.kind, options.bits, options.every, options.seed)
    print(f"{len(tally.troubles)} troubles, in {time.monotonic() - began:.0f} s")
    return min(len(tally.troubles), 1)


if __name__ == "__main__":
    sys.exit(main())
