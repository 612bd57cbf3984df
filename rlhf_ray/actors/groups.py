"""Groups: all ranks of one role, called by the driver as one.

Invariants: a batch goes in and columns of the same batch come out, in its order, whatever the schedule and the number of
ranks; a training report is the sum over all ranks, and it is finite only if the report of every rank is. A group is started
again as a whole, by one thread at a time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from rlhf_ray.actors.ranks import START_TIMEOUT, Ranks
from rlhf_ray.actors.workers.base import STARTING
from rlhf_ray.actors.workers.model import Loss, Part, Vocabulary, WorkerSetup
from rlhf_ray.algorithms.losses import Divergence
from rlhf_ray.console import get_logger
from rlhf_ray.engine.report import Applied, Report
from rlhf_ray.engine.saving.room import Room
from rlhf_ray.engine.saving.writer import Written
from rlhf_ray.errors import GroupError, RlhfRayError
from rlhf_ray.network import LOOPBACK
from rlhf_ray.pending import Pending
from rlhf_ray.planning.flops import ComputeShape
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rollout.execution import Execution, require_agreement
from rlhf_ray.rollout.transport import Transport
from rlhf_ray.rollout.weights.deadline import Limit, Taken
from rlhf_ray.rollout.wire import Content, PublishedWeights
from rlhf_ray.storage.manifest import FileRecord
from rlhf_ray.trajectories.batch import TrajectoryBatch, scatter_sequences, scatter_tokens
from rlhf_ray.trajectories.schedule import Schedule, Update

ANSWERS_S = 10.0
"""How long a rank that is idle may take to answer."""


@dataclass(frozen=True)
class SharedBatch:
    """A batch, and a handle with which ranks read it without another copy."""

    batch: TrajectoryBatch
    handle: Any


class Group:
    """All ranks of one role."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.role = ranks.role
        self.size = ranks.size
        self.report_line = ""
        self.restarting = threading.RLock()
        """Held by the thread that starts the group again, until its model is loaded."""
        self._setup: tuple[WorkerSetup, float] | None = None

    def share(self, batch: TrajectoryBatch) -> SharedBatch:
        return SharedBatch(batch, self.ranks.share(batch))

    def setup(self, setup: WorkerSetup, *, timeout_s: float) -> Pending[str]:
        """Load the models; ranks meet where rank 0 listens. The value is rank 0's load report."""
        self._setup = setup, timeout_s
        if self.size > 1:
            setup = replace(setup, rendezvous=self._rendezvous(timeout_s))
        return self._everywhere("setup", setup, timeout_s=timeout_s, key=START_TIMEOUT).then(self._remember)

    def setup_again(self) -> Pending[str]:
        """Load the models as before, after :meth:`restart`: those of the start, whatever was learned or loaded since."""
        if self._setup is None:
            raise GroupError(self.role, None, "restart", "its model was never loaded")
        setup, timeout_s = self._setup
        return self.setup(setup, timeout_s=timeout_s)

    def restart(self) -> None:
        """End all processes, whatever they are doing, and start others in their places, which have no model yet."""
        self.ranks.restart()

    def _rendezvous(self, timeout_s: float) -> tuple[str, int] | None:
        """Address and port where rank 0 listens from now on; only ranks on several nodes need more than loopback."""
        addresses = self._everywhere("node_address", timeout_s=timeout_s, key=START_TIMEOUT).result()
        address = LOOPBACK if len(set(addresses)) == 1 else addresses[0]
        held = self._everywhere("hold_rendezvous", address, timeout_s=timeout_s, key=START_TIMEOUT)
        port = held.result()[0]
        return None if port is None else (address, port)

    def _remember(self, lines: list[str]) -> str:
        self.report_line = lines[0]
        return lines[0]

    def save(self, directory: str) -> Pending[dict[str, FileRecord]]:
        """Write the training state; the value is the size and hash of every file, made by the rank that wrote it."""
        return self._everywhere("save", directory).then(_join)

    def begin_save(self, directory: str) -> Pending[list[None]]:
        """Copy the training state in the memory of the ranks, which write it while the calls that follow run."""
        return self._everywhere("begin_save", directory)

    def saved(self) -> Pending[Written]:
        """Wait for what :meth:`begin_save` began, beside other calls; the files and the errors are those of :meth:`save`.

        Ranks write side by side: the seconds are those of the one that took most.
        """
        return self._everywhere("saved", phase="save").then(_written)

    def room_to_save(self) -> Pending[list[Room]]:
        """For each rank what the copy of :meth:`begin_save` takes of its machine's memory, and what is free there."""
        return self._everywhere("room_to_save")

    def hash_files(self, directory: str) -> Pending[dict[str, FileRecord]]:
        """The size and hash of every file in a directory that :meth:`save_pretrained` has filled, made where it was written."""
        return self._everywhere("hash_files", directory).then(_join)

    def load(self, directory: str) -> Pending[list[None]]:
        return self._everywhere("load", directory)

    def save_pretrained(self, directory: str, metadata: dict[str, Any] | None = None) -> Pending[list[None]]:
        return self._everywhere("save_pretrained", directory, metadata)

    def vocabulary(self) -> Pending[Vocabulary]:
        """The tokens that the model was loaded with."""
        return self._everywhere("vocabulary").then(lambda answers: answers[0])

    def health(self, timeout_s: float = 10.0) -> Pending[list[dict[str, Any]]]:
        return self._everywhere("health", timeout_s=timeout_s)

    def stop(self) -> None:
        self.ranks.stop()

    def accumulate(self, shared: SharedBatch, update: Update, loss: Loss, denominator: float) -> Pending[Report]:
        """Compute the gradients of one update on all ranks; the report is the sum over them."""
        arguments = [(shared.handle, update.rank(rank), loss, denominator) for rank in range(self.size)]
        return self.ranks.call("accumulate", arguments).then(merge_reports)

    def apply(self, skip: bool, limit: float = math.inf) -> Pending[Applied]:
        """Take the optimizer step, or skip it, on every rank; the memory is that of the fullest GPU.

        A step whose gradient has a norm above ``limit`` is skipped too.

        Ranks that disagree are an error.
        """
        return self._everywhere("apply", skip, limit).then(self._agreed)

    def _agreed(self, applied: list[Applied]) -> Applied:
        if len({one.skipped for one in applied}) != 1:
            raise GroupError(self.role, None, "apply", f"ranks disagree on skipping the update: {applied}")
        fullest = max(
            (one.gpu for one in applied if one.gpu is not None), key=lambda gpu: gpu.reserved_gb, default=None
        )
        return replace(applied[0], gpu=fullest)

    def _everywhere(
        self,
        method: str,
        *arguments: Any,
        phase: str | None = None,
        timeout_s: float | None = None,
        key: str | None = None,
    ) -> Pending[list[Any]]:
        return self.ranks.call(method, [arguments] * self.size, phase=phase, timeout_s=timeout_s, key=key)

    def _column(
        self, method: str, shared: SharedBatch, schedule: Schedule, *others: Any, per_token: bool
    ) -> Pending[torch.Tensor]:
        arguments = [(shared.handle, schedule.rank(rank), *others) for rank in range(self.size)]
        scatter = scatter_tokens if per_token else scatter_sequences
        return self.ranks.call(method, arguments).then(lambda results: scatter(_parts(results), shared.batch))


class ReferenceGroup(Group):
    def log_probs(self, shared: SharedBatch, schedule: Schedule) -> Pending[torch.Tensor]:
        """(N,) log-probs of every token under the frozen policy."""
        return self._column("log_probs", shared, schedule, per_token=True)


class PolicyGroup(ReferenceGroup):
    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks)
        self._said: set[str] = set()
        """Warnings of the execution contract, each of which is said once."""

    def divergences(self, shared: SharedBatch, schedule: Schedule, divergence: Divergence) -> Pending[torch.Tensor]:
        """(N,) how far the policy is from its teacher at every token, in nats."""
        return self._column("divergences", shared, schedule, divergence, per_token=True)

    def save_without_weights(self, directory: str) -> Pending[dict[str, tuple[int, ...]]]:
        """Write what rollout engines start from; the value is the shapes of the weights by their names on disk."""
        return self._everywhere("save_without_weights", directory).then(lambda shapes: shapes[0])

    def adapter_rank(self) -> int:
        """The largest rank of the LoRA that is trained, where nothing else is."""
        return int(self._everywhere("adapter_rank").result()[0])

    def publish_weights(self, version: int, content: Content = "weights") -> Pending[PublishedWeights]:
        """Return rank 0's publication, by which the rollout engines find the weights; errors as of :meth:`execution`."""

        def agreed(ranks: list[Any]) -> PublishedWeights:
            if self.size > 1:  # the publication has rank 0's record alone
                self.execution().result()
            return cast(PublishedWeights, ranks[0])

        return self._everywhere("publish_weights", version, content).then(agreed)

    def execution(self) -> Pending[Execution]:
        """How the ranks compute log-probs; :class:`RequestError` where one does it otherwise than rank 0."""
        return self._everywhere("execution").then(self._alike)

    def _alike(self, ranks: Sequence[Execution]) -> Execution:
        for rank, one in enumerate(ranks):
            sides = {"here": f"{self.role} rank {rank}", "there": f"{self.role} rank 0"}
            for text in require_agreement(one, ranks[0], "alike", **sides):
                if text not in self._said:
                    self._said.add(text)
                    get_logger().warning("%s", text)
        return ranks[0]

    def gpus(self) -> list[str | None]:
        """The GPU of each rank."""
        return self._everywhere("gpu").result()

    def connect_engines(self, transport: Transport, engines: Sequence[Ranks], workers: int) -> None:
        """Connect all ranks with ``engines``, of ``workers`` GPUs each, so that weights can go from GPU to GPU."""
        address = self._everywhere("node_address").result()[0]
        reached = [one for engine in engines for one in engine.reached()]
        self._everywhere("connect_engines", transport, reached, workers, address).result()

    def send_weights(self, version: int, limit: Limit | None = None) -> Pending[tuple[Execution, Taken]]:
        """Send the weights to the connected engines, within ``limit`` or else that of any call.

        The value is how the ranks compute log-probs, and what the sending took; errors as of :meth:`execution`.
        """
        timeout_s, key = (None, None) if limit is None else (limit.seconds, limit.key)
        sent = self._everywhere("send_weights", version, timeout_s=timeout_s, key=key)
        return sent.then(lambda ranks: (self._alike([record for record, _ in ranks]), ranks[0][1]))


class CriticGroup(Group):
    def values(self, shared: SharedBatch, schedule: Schedule) -> Pending[torch.Tensor]:
        """(N,) values of the states in which the tokens were chosen."""
        return self._column("values", shared, schedule, per_token=True)


class RewardGroup(Group):
    def lives(self) -> bool:
        """Whether every rank says that it lives and has its model; it may be busy, and so may be the one that asks."""
        try:
            states = self.health(ANSWERS_S).result()
        except RlhfRayError:
            return False
        return all(state["phase"] != STARTING for state in states)

    def answers(self, timeout_s: float = ANSWERS_S) -> bool:
        """Whether every rank has its model and takes calls within ``timeout_s`` seconds; one that hangs does not."""
        try:
            self._everywhere("describe", timeout_s=timeout_s).result()
        except RlhfRayError:
            return False
        return True

    def describe(self) -> Pending[dict[str, Any]]:
        """Tokenizer fingerprint, normalisation and limits of the reward model."""
        return self._everywhere("describe").then(lambda answers: answers[0])

    def scores(self, shared: SharedBatch, schedule: Schedule) -> Pending[torch.Tensor]:
        """(B,) scores at each sequence's last token."""
        return self._column("scores", shared, schedule, per_token=False)

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        """Return one result per request, in the order of the requests."""
        count = len(requests)
        return self._everywhere("score", list(requests)).then(lambda shares: self._in_order(shares, count))

    def _in_order(self, shares: list[list[tuple[int, ScoreResult]]], count: int) -> list[ScoreResult]:
        results = dict(pair for share in shares for pair in share)
        if sorted(results) != list(range(count)) or sum(map(len, shares)) != count:
            raise GroupError(self.role, None, "score", f"{count} requests, but results for {len(results)}")
        return [results[position] for position in range(count)]


class TrainedRewardGroup(RewardGroup):
    def save_adapter(self, directory: str, metadata: dict[str, Any] | None = None) -> Pending[list[None]]:
        """Write the LoRA adapter and the head, without the base."""
        return self._everywhere("save_adapter", directory, metadata)

    def scores_on_disk(self, directory: str, batch: TrajectoryBatch) -> Pending[list[float]]:
        """The scores that a saved model, loaded anew, gives to ``batch``."""
        return self._everywhere("scores_on_disk", directory, batch).then(lambda answers: answers[0])

    def compute_shape(self) -> Pending[ComputeShape]:
        """What a token of the model costs."""
        return self._everywhere("compute_shape").then(lambda answers: answers[0])

    def matmul_rate(self) -> Pending[float]:
        """FLOP/s of matrix products of all ranks together, measured side by side."""
        return self._everywhere("matmul_rate").then(sum)


def _join(records: Sequence[Mapping[str, FileRecord]]) -> dict[str, FileRecord]:
    return {name: record for each in records for name, record in each.items()}


def _written(ranks: Sequence[Written]) -> Written:
    return Written(_join([rank.files for rank in ranks]), max(rank.seconds for rank in ranks))


def _parts(results: list[list[Part]]) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    return [(indices, torch.tensor(values)) for parts in results for indices, values in parts]


def merge_reports(reports: Sequence[Report]) -> Report:
    """The report of all ranks: finite if every one is, sums added."""
    metrics: dict[str, tuple[float, float]] = {}
    for report in reports:
        for name, (total, count) in report.metrics.items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = (before[0] + total, before[1] + count)
    return Report(
        finite=all(report.finite for report in reports), loss=sum(report.loss for report in reports), metrics=metrics
    )
