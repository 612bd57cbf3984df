"""The directory of a run, which holds everything that the run writes and needs to be resumed.

Invariants: a run that exists is never overwritten, only continued, and it begins in a directory that holds nothing of others.
One process at a time owns it. What :meth:`RunDirectory.discard` removes the run has made. After :meth:`RunDirectory.go_on`,
metrics, ledger and samples end exactly at the step of the checkpoint that it goes on from, and ``config.yaml`` and
``inputs.json`` are those of the run from there on; what changed stands in ``attempts.jsonl``.

The directory holds ``config.yaml`` (with every default), ``inputs.json`` (its last config, and fingerprints of data and
models), ``execution.json`` (PPO: how policy and engines compute log-probs), ``metrics.jsonl``, ``ledger.jsonl``,
``attempts.jsonl`` (one line each time the run was started), ``incidents.jsonl`` (what cost it time), ``alarms.jsonl`` (when
alarms began and ended), ``heartbeat.json`` (how it is now), ``stacks/`` (of what hung), ``judges/`` (their cost),
``averages/`` (of the weights of reward models),
``trackers/`` (what they were sent), ``spans/`` (what each process did when; ``otlp/``: the same for OpenTelemetry),
``samples/``, ``checkpoints/``, ``final/``, ``best/`` (if an earlier evaluation was better than the last), ``summary.json``
and ``report.html``. Lines past the checkpoint of a resume move to ``*.void.jsonl``, and the summary of a run that is trained
further to ``summary.void.json``. ``summary.json`` is the last file of a run, by which a finished one is known; until the
report is written it is called ``closing.json``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray import storage
from rlhf_ray.config.recipes import CONFIG_NAME
from rlhf_ray.console import get_logger
from rlhf_ray.errors import IntegrityError, RequestError
from rlhf_ray.monitoring.report.summary import Summary
from rlhf_ray.runs.alarms.heartbeat import HeartbeatFile
from rlhf_ray.runs.alarms.record import AlarmRecord
from rlhf_ray.runs.checkpoints import SKIPPED_SINCE, Checkpoint, CheckpointStore
from rlhf_ray.runs.engines import EngineStates
from rlhf_ray.runs.incidents import Incidents
from rlhf_ray.runs.ledger import Ledger
from rlhf_ray.runs.lines import attempt_problem, metrics_problem, sample_problem
from rlhf_ray.runs.set_aside import SetAsidePrompts
from rlhf_ray.runs.trust import refuse_untrusted
from rlhf_ray.storage.atomic import PENDING
from rlhf_ray.storage.jsonl import JsonLines
from rlhf_ray.storage.locks import is_at, is_taken, take, this_process
from rlhf_ray.storage.made import target_of
from rlhf_ray.storage.reading import read_text

LOCK = ".lock"
MODE = 0o750
"""Of a new run directory: its shards are read by pickle, so nobody else may write there."""
_MADE = re.compile(
    r"config\.yaml|inputs\.json|(metrics|ledger|attempts)(\.void)?\.jsonl|(incidents|alarms)\.jsonl|heartbeat\.json|stacks|judges|averages|spans|otlp|samples|checkpoints|final|best|(summary|closing)\.json"
    r"|summary\.void\.json|set_aside\.jsonl|engines\.json|report\.html|tensorboard|trackers|wandb|rollout-start|evaluation"
)
"""What a run has in its directory, besides files whose writing was interrupted."""
_SAMPLES = re.compile(r"step-(\d{6,12})\.jsonl")
_OWNER = re.compile(rb"(process \d+ on .*)?", re.DOTALL)
"""What stands in the file that is locked."""


class RunDirectory:
    """The paths and files of one run. ``create``, ``take`` and ``resume`` own it until ``release``; ``open`` only reads it."""

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        self.path = Path(path)
        self.config_path = self.path / CONFIG_NAME
        self.inputs_path = self.path / "inputs.json"
        self.execution_path = self.path / "execution.json"
        self.final = self.path / "final"
        self.best = self.path / "best"
        self.samples = self.path / "samples"
        self.report_path = self.path / "report.html"
        self.summary_path = self.path / "summary.json"
        self.closing_path = self.path / "closing.json"
        self.void_summary_path = self.path / "summary.void.json"
        self.checkpoints = CheckpointStore(self.path / "checkpoints", keep)
        self.metrics = JsonLines(self.path / "metrics.jsonl", metrics_problem)
        self.void_metrics = JsonLines(self.path / "metrics.void.jsonl")
        self.attempts = JsonLines(self.path / "attempts.jsonl", attempt_problem)
        self.attempt = len(self.attempts.read())
        self.ledger = Ledger(self.path / "ledger.jsonl", self.attempt)
        self.set_aside = SetAsidePrompts(self.path / "set_aside.jsonl")
        self.engines = EngineStates(self.path / "engines.json")
        self.stacks = self.path / "stacks"
        self.spans = self.path / "spans"
        self.judges = self.path / "judges"
        self.averages = self.path / "averages"
        self.open_telemetry = self.path / "otlp"
        self.incidents = Incidents(self.path / "incidents.jsonl")
        self.heartbeat = HeartbeatFile(self.path / "heartbeat.json")
        self.alarms = AlarmRecord(self.path / "alarms.jsonl")
        self._lock: int | None = None
        self._is_new = False

    @classmethod
    def create(cls, path: str | Path, config: str, keep: int = 2) -> RunDirectory:
        """Begin a new run. ``config`` is its resolved config as YAML; raises :class:`RequestError` where anything is there."""
        path = Path(path)
        with storage.storage_errors(path):
            made = storage.make_directories(path, MODE)
        run = cls(path, keep)
        run._is_new = bool(made)
        try:
            run._require_empty()
            run._own()
            run._require_empty()  # another process may have begun it meanwhile
            storage.sweep(path)
            storage.write_file(run.config_path, config)
            run._begin_attempt(0)
        except BaseException:
            run.release()
            storage.remove_empty(made[:1])
            raise
        return run

    def discard(self) -> None:
        """Remove what :meth:`create` and a trainer after it have made, and give the run back; what others put there stays."""
        with storage.storage_errors(self.path):
            for name in os.listdir(self.path):
                if _MADE.fullmatch(name) or _is_interrupted(name):
                    _remove(self.path / name)
            if self._lock is not None:
                (self.path / LOCK).unlink(missing_ok=True)
        self.release()
        if self._is_new:
            storage.remove_empty([self.path])

    @classmethod
    def open(cls, path: str | Path, keep: int = 2) -> RunDirectory:
        """An existing run, to be read only; raises :class:`RequestError` if ``path`` is not one."""
        run = cls(path, keep)
        if not run.config_path.is_file():
            raise RequestError(f"{run.path} is not a run directory: it has no config.yaml")
        return run

    @classmethod
    def take(cls, path: str | Path, keep: int = 2) -> RunDirectory:
        """Own an existing run and change nothing of it yet, but for half-written files of a crash, which are removed."""
        refuse_untrusted(path)
        run = cls.open(path, keep)
        run._own()
        for directory in (run.path, run.checkpoints.directory, run.samples):
            if directory.is_dir():
                storage.sweep(directory)
        return run

    @classmethod
    def resume(cls, path: str | Path, keep: int = 2) -> tuple[RunDirectory, Checkpoint | None]:
        """Own an existing run and go on from its newest valid checkpoint, or from its beginning if it has none."""
        run = cls.take(path, keep)
        checkpoint = run.checkpoints.latest_valid()
        run.go_on(checkpoint)
        return run, checkpoint

    def go_on(
        self,
        checkpoint: Checkpoint | None,
        *,
        config: str | None = None,
        longer: bool = False,
        changes: Sequence[Mapping[str, Any]] = (),
        accepted: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Begin another attempt after ``checkpoint``: lines past it move to ``*.void.jsonl``.

        ``config`` is the run's config from here on, if it is another; ``changes`` of it and ``accepted`` inputs, as plain
        JSON, stand in the attempt. With ``longer`` a run that had come to its end is trained further. After a kill in
        between, the same call again does the rest.
        """
        step = 0
        if checkpoint is not None:
            step = checkpoint.step
            self.checkpoints.retain(step, before=checkpoint.manifest.about.get(SKIPPED_SINCE, 0))
        self._void_after(step)
        self.engines.forget()
        if config is not None:
            storage.write_file(self.config_path, config)
        for ended in (self.closing_path, self.summary_path):
            if longer and ended.exists():
                with storage.storage_errors(ended):
                    os.replace(ended, self.void_summary_path)
        self._begin_attempt(step, changes=list(changes), accepted=list(accepted))

    def note_stop(self) -> None:
        """Write down when this attempt was stopped on request: the pause from now until it goes on is no time of the run."""
        self.attempts.amend_last({"stopped": time.time()})

    def go_back(self, step: int) -> None:
        """Go on from ``step`` in the same attempt: lines past it move to ``*.void.jsonl``, and samples past it are removed."""
        self._void_after(step)

    def void_attempt(self) -> None:
        """Move the line of this attempt to ``attempts.void.jsonl``: it was refused before it did anything."""
        void = JsonLines(self.path / "attempts.void.jsonl", attempt_problem)
        self.attempts.keep(lambda line: line["attempt"] != self.attempt, void)
        self.attempt -= 1

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary_path.exists()

    def remember_lines(self) -> None:
        """From now on keep the lines that were read in memory, for one who reads this run again and again."""
        for lines in (self.metrics, self.void_metrics, self.attempts, self.incidents):
            lines.remember()

    def files(self) -> Sequence[Path]:
        """The files that say what the run is and has done, whether they are there or not."""
        lines = (self.metrics.path, self.attempts.path, self.path / "ledger.jsonl")
        return self.config_path, self.inputs_path, *lines, self.summary_path, self.closing_path

    def config_text(self) -> str:
        """The run's config as YAML, with every default."""
        return read_text(self.config_path)

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write samples of a step to ``samples/step-NNNNNN.jsonl``."""
        with storage.storage_errors(self.samples):
            self.samples.mkdir(exist_ok=True)
        text = "".join(json.dumps(dict(sample), ensure_ascii=False) + "\n" for sample in samples)
        storage.write_file(self._samples_path(step), text)

    def sampled_steps(self) -> list[int]:
        """The steps that have samples."""
        found = (_SAMPLES.fullmatch(path.name) for path in self.samples.glob("step-*.jsonl"))
        return sorted(int(match[1]) for match in found if match is not None)

    def read_samples(self, step: int | None = None) -> tuple[int, list[dict[str, Any]]]:
        """The samples of a step, by default of the last that has some; raises :class:`RequestError` where there are none."""
        steps = self.sampled_steps()
        if step is None and steps:
            step = steps[-1]
        if step is None or step not in steps:
            there = (
                f"there are those of steps {steps[0]} to {steps[-1]}"
                if steps
                else "monitoring.samples_per_log keeps some"
            )
            raise RequestError(f"{self.path} has no samples{'' if step is None else f' of step {step}'}: {there}")
        return step, JsonLines(self._samples_path(step), sample_problem).read()

    def begin_final(self) -> storage.PendingDirectory:
        """An empty directory for the final model; ``storage.commit`` puts it at ``final/``, in place of an older one."""
        return storage.begin_directory(self.final, replace=True)

    def begin_best(self) -> storage.PendingDirectory:
        """An empty directory for the model of the best evaluation; ``storage.commit`` puts it at ``best/``."""
        return storage.begin_directory(self.best, replace=True)

    def final_step(self, *, whole: bool = False) -> int | None:
        """The step whose weights ``final/`` holds; none where it is missing or does not say.

        If it must be ``whole``, every file is read, and there is none where one is damaged.
        """
        try:
            step = (storage.verify if whole else storage.read_manifest)(self.final).about.get("step")
        except IntegrityError:
            return None
        return step if isinstance(step, int) else None

    def write_summary(self, summary: Summary) -> None:
        """Write what the report shows besides metrics; the run counts as finished."""
        storage.write_file(self.summary_path, summary.to_json())
        self.closing_path.unlink(missing_ok=True)

    def write_closing(self, summary: Summary) -> None:
        """Write the summary of a run whose report is still missing."""
        storage.write_file(self.closing_path, summary.to_json())

    def summary(self) -> Summary:
        """The summary that :meth:`write_summary` or :meth:`write_closing` wrote, or an empty one."""
        for path in (self.closing_path, self.summary_path):
            if path.exists():
                return Summary.from_json(read_text(path), str(path))
        return Summary()

    def release(self) -> None:
        """Let another process own the run. The end of this process does the same."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def is_owned(self) -> bool:
        """Whether any process owns the run now, this one included; on a file system without locks its heartbeat says so."""
        if self._lock is not None:
            return True
        taken = is_taken(self.path / LOCK)
        if taken is not None:
            return taken
        starts = [line["timestamp"] for line in self.attempts.read()]
        return self.heartbeat.is_fresh(time.time(), max(starts, default=0.0))

    def _own(self) -> None:
        with storage.storage_errors(self.path / LOCK):
            while True:
                lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
                if not take(lock):
                    owner = os.read(lock, 200).decode(errors="replace")
                    os.close(lock)
                    raise RequestError(
                        f"{self.path} is in use by {owner or 'another process'}: wait for it, or stop it first"
                    )
                if is_at(lock, self.path / LOCK):
                    break
                os.close(lock)  # its owner discarded it between our opening and our locking it
            os.ftruncate(lock, 0)
            os.pwrite(lock, this_process().encode(), 0)
        self._lock = lock

    def _require_empty(self) -> None:
        """Refuse a directory that holds more than a start leaves that was killed before there was a config."""
        with storage.storage_errors(self.path, "read"):
            content = sorted(
                name for name in os.listdir(self.path) if not _is_interrupted(name) and not self._is_lock(name)
            )
        if content:
            raise RequestError(self._refusal(content))

    def _is_lock(self, name: str) -> bool:
        place = self.path / name
        if name != LOCK or place.is_symlink() or not place.is_file():
            return False
        return place.stat().st_size < 500 and _OWNER.fullmatch(place.read_bytes()) is not None

    def _begin_attempt(self, from_step: int, **known: Sequence[Mapping[str, Any]]) -> None:
        self.attempt += 1
        line = {"attempt": self.attempt, "from_step": from_step, "timestamp": time.time()}
        self.attempts.append(line | {name: value for name, value in known.items() if value})
        self.ledger = Ledger(self.path / "ledger.jsonl", self.attempt)

    def _void_after(self, step: int) -> None:
        voided = self.metrics.keep(lambda line: line["step"] <= step, self.void_metrics)
        self.ledger.void_after(step)
        for path in self.samples.glob("step-*.jsonl"):
            match = _SAMPLES.fullmatch(path.name)
            if match is not None and int(match[1]) > step:
                path.unlink()
        if voided:
            get_logger("runs").info(
                "%s goes on after step %d: %d lines past it were moved to *.void.jsonl", self.path, step, voided
            )

    def _samples_path(self, step: int) -> Path:
        return self.samples / f"step-{step:06d}.jsonl"

    def _refusal(self, content: Sequence[str]) -> str:
        if self.config_path.is_file() and self.is_finished:
            return (
                f"the run {self.path} has finished: train it further with `rlhf-ray resume {self.path}` and more steps or "
                "epochs, choose another run.name, or remove the directory"
            )
        if self.config_path.is_file():
            steps = self.checkpoints.steps()
            last = f"its last checkpoint is of step {steps[-1]}" if steps else "it has no checkpoint yet"
            return (
                f"the run {self.path} exists ({last}): continue it with `rlhf-ray resume {self.path}`, "
                "choose another run.name, or remove the directory"
            )
        return f"{self.path} is not empty and is not a run (it holds {', '.join(content[:3])}): choose another run.name"


def _is_interrupted(name: str) -> bool:
    """Whether an interrupted write of a file of the run left this."""
    target = target_of(name, PENDING)
    return target is not None and _MADE.fullmatch(target) is not None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
