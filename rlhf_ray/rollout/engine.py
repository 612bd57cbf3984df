"""The base class of rollout engines: steps, deadlines, failure and weight updates, whatever computes the tokens.

Invariants:

- All requests of a call are added before its first step, or none is.
- A call of ``generate`` ends in all its generations, in input order, or in one typed error.
- Every token carries the version of the weights that sampled it.
- Weights change only between two steps, and a change drops everything that was computed with the old ones.
- An engine whose step or update failed is dead and refuses all further work.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.data.tokenizers import fingerprint_directory
from rlhf_ray.errors import GroupError, RequestError
from rlhf_ray.models.devices import CPU
from rlhf_ray.planning.colocation.phases import Level
from rlhf_ray.rollout.errors import EngineDeadError, TooSlowError, WeightUpdateError, explain_too_slow
from rlhf_ray.rollout.execution import Execution
from rlhf_ray.rollout.requests import Generation, GenerationRequest, Key, Probe, check_requests, request_seed
from rlhf_ray.rollout.weights.delta import LastReceived
from rlhf_ray.rollout.wire import Bucket, IncomingUpdate, PublishedAdapter, PublishedWeights, shapes_on_disk, to_array

ROLE = "rollout"


class RolloutEngine(ABC):
    """One model that samples. Not thread-safe: one caller drives it."""

    vocabulary: int

    def __init__(
        self,
        model_dir: str | Path,
        config: RolloutConfig,
        *,
        stop_token_ids: Sequence[int],
        rank: int = 0,
        weight_version: int = 0,
        seed: int = 0,
        deterministic: bool = False,
        device: torch.device = CPU,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        takes_turns: bool = False,
        adapter_rank: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start on ``device`` from a directory that the policy wrote at ``weight_version``.

        ``shapes`` are those of all weights by their names on disk, if the directory holds no weights: then an update brings
        them before the first request. With ``takes_turns`` it sleeps and wakes by :meth:`go_to` alone. ``adapter_rank`` is the
        largest rank of the adapter that comes with every version, if one does.
        """
        self.takes_turns = takes_turns
        self.model_dir = Path(model_dir)
        self.config = config
        self.stop_token_ids = tuple(stop_token_ids)
        self.rank = rank
        self.deterministic = deterministic
        self.device = device
        self.stream_seed = request_seed(seed, 0, rank, 0) >> 32
        """The seed of the draws for requests that have none; it differs between engines."""
        self._clock = clock
        self._weight_version = weight_version
        self._awaits_weights = shapes is not None
        self._shapes = shapes_on_disk(model_dir) if shapes is None else dict(shapes)
        self._tokenizer = fingerprint_directory(self.model_dir)
        self._unfinished: dict[Key, GenerationRequest] = {}
        self._update: IncomingUpdate | None = None
        self._last = LastReceived() if config.weight_delta else None
        self.adapter_rank = adapter_rank
        self._base: str | None = None
        """The checksum of the weights under the adapter."""
        self._connected: str | None = None
        self._came_by: str | None = None
        """How the weights of the last update came."""
        self._dead: str | None = None

    # What a subclass implements

    @abstractmethod
    def _add(self, requests: Sequence[GenerationRequest]) -> None:
        """Accept requests, in order."""

    @abstractmethod
    def _advance(self) -> list[Generation]:
        """Run one step of the model for the unfinished requests; returns those that it finished."""

    @abstractmethod
    def _running(self) -> int:
        """The number of requests for which the next step samples a token, at most."""

    @abstractmethod
    def _drop(self) -> None:
        """Forget all requests."""

    @abstractmethod
    def _begin_load(self) -> None:
        """Prepare to receive new weights."""

    @abstractmethod
    def _load(self, weights: list[tuple[str, Tensor]]) -> None:
        """Load some of the weights, by their names on disk."""

    @abstractmethod
    def _end_load(self) -> None:
        """All weights have arrived: use them, and drop what was cached with the old ones."""

    def _load_adapter(self, name: str, adapter: PublishedAdapter) -> None:
        """Compute with ``adapter`` from now on, instead of one of before, and drop what was cached with that."""
        raise RequestError(f"a {self.config.backend} engine takes no adapters: set rollout.lora to merged")

    def _connect(self, transport: str, info: dict[str, Any]) -> None:
        """Join the group in which the trainer sends weights from GPU to GPU."""
        raise RequestError(
            f"a {self.config.backend} engine takes weights through the object store alone, not by {transport}"
        )

    def _take_sent(self, info: dict[str, Any]) -> None:
        """Fetch and load the weights that the trainer sends."""
        raise RequestError(f"a {self.config.backend} engine takes weights through the object store alone")

    def _received(self) -> list[str]:
        """The checksum of what each worker of the engine has fetched in this update."""
        return []

    def _rest(self) -> None:
        """Give back what is not needed until the next call; an engine that has its memory for itself keeps it."""
        return

    def _go_to(self, level: Level) -> None:
        """Have so much on the device; an engine that has its memory for itself keeps it."""
        return

    def _death(self) -> str | None:
        """Which process of the engine, besides this one, has died; none of an engine that has no other."""
        return None

    @abstractmethod
    def _loaded(self) -> dict[str, Any]:
        """The fields of :class:`Execution` that the engine's library has settled, whatever it was asked for."""

    @abstractmethod
    def _close(self) -> None:
        """Free what the engine holds."""

    # Generating

    @property
    def weight_version(self) -> int:
        """The version of the last completed weight update."""
        return self._weight_version

    @property
    def unfinished(self) -> int:
        """The number of unfinished requests."""
        return len(self._unfinished)

    def generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> list[Generation]:
        """Return the generations of all requests in their order.

        Raises :class:`TooSlowError` after ``deadline_s`` seconds, and then drops every request of the call.
        """
        if self._unfinished:
            raise RequestError(f"rollout engine {self.rank} has {self.unfinished} requests in work: step or abort them")
        try:
            return self._generate(requests, deadline_s)
        finally:
            if self._dead is None and not self._unfinished and not self.takes_turns:
                with self._or_die("rest"):
                    self._rest()

    def _generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> list[Generation]:
        end = self._clock() + deadline_s
        self.submit(requests)
        done: dict[Key, Generation] = {}
        sampled = 0
        while self._unfinished:
            if self._clock() >= end:
                left = sum(request.max_new_tokens for request in self._unfinished.values())
                ended = sum(len(generation.token_ids) for generation in done.values())
                cause = explain_too_slow(self.abort(), len(requests), deadline_s, sampled, ended + left)
                raise TooSlowError(ROLE, self.rank, "generate", cause)
            sampled += self._running()
            done |= {generation.key: generation for generation in self.step()}
        return [done[request.key] for request in requests]

    def advance(self, requests: Sequence[GenerationRequest], seconds: float) -> list[Generation]:
        """Add ``requests``, sample for about ``seconds``, at least one token each, and return the generations that ended.

        Those that did not stay in work for the next call, before which weights may change.
        """
        self.submit(requests)
        finished: list[Generation] = []
        end = self._clock() + seconds
        while self._unfinished:
            finished += self.step()
            if self._clock() >= end:
                break
        return finished

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Add all requests, or none of them if one cannot be served."""
        self._refuse_while_updating("submit")
        if self._awaits_weights:
            raise RequestError(
                f"rollout engine {self.rank} was started without weights: update them before the first request"
            )
        check_requests(
            requests,
            vocabulary=self.vocabulary,
            max_model_tokens=self.config.max_model_tokens,
            seeded=self.deterministic,
            unfinished=self._unfinished,
        )
        with self._or_die("submit"):
            self._add(requests)
        self._unfinished |= {request.key: request for request in requests}

    def step(self) -> list[Generation]:
        """Sample one token for each unfinished request; returns the generations that ended."""
        self._refuse_while_updating("step")
        with self._or_die("step"):
            finished = self._advance()
        for generation in finished:
            del self._unfinished[generation.key]
        return finished

    def abort(self) -> int:
        """Drop all unfinished requests; returns their number."""
        dropped = self.unfinished
        with self._or_die("abort"):
            self._drop()
        self._unfinished.clear()
        return dropped

    # Weights

    def gpus(self) -> list[str]:
        """The UUIDs of the GPUs on which vLLM's transfer engines could bring weights; none where they do not reach."""
        return []

    def update_weights(self, version: int, buckets: Iterable[Bucket], checksum: str) -> None:
        """Replace all weights. Unfinished requests go on with the new ones, and their context is computed again."""
        self.begin_update()
        waiting = iter(buckets)
        while (bucket := self._next(waiting)) is not None:
            self.load_bucket(bucket)
        self.finish_update(version, checksum)

    def wanted(self, weights: PublishedWeights) -> PublishedWeights:
        """What this engine needs of a publication: its changes where it holds the one before, or else all weights."""
        if self._last is not None and self._last.holds(weights.delta):
            return replace(weights, buckets=(), nbytes=0)
        if weights.adapter is not None and self._base == weights.checksum:
            return replace(weights, buckets=(), nbytes=0)
        return replace(weights, delta=None)

    def receive(self, weights: PublishedWeights) -> None:
        """Replace all weights by a publication, of which only what is :meth:`wanted` is read."""
        if weights.adapter is not None:
            self._receive_adapter(weights, weights.adapter)
            return
        buckets: Iterable[Bucket]
        wanted = self.wanted(weights)
        if self._last is None:
            buckets = wanted.buckets
        elif wanted.delta is None:
            buckets = self._last.remember(wanted.buckets, to_array)
        else:
            buckets = self._last.rebuilt(wanted.delta)
        self.update_weights(weights.version, buckets, weights.checksum)
        if self._last is not None:
            self._last.adopted(weights.checksum)

    def _receive_adapter(self, weights: PublishedWeights, adapter: PublishedAdapter) -> None:
        if self._base != weights.checksum:
            self.update_weights(weights.version, weights.buckets, weights.checksum)
            self._base = weights.checksum
        self._refuse_while_updating("load_adapter")
        with self._or_die("load_adapter", WeightUpdateError):
            self._weight_version = weights.version
            self._load_adapter(f"policy-{weights.version}-{adapter.tensors.checksum[:16]}", adapter)

    def _next(self, buckets: Iterator[Bucket]) -> Bucket | None:
        with self._or_die("load_bucket", WeightUpdateError):
            return next(buckets, None)

    def begin_update(self) -> None:
        """Start an update whose buckets arrive one by one. Nothing is generated until it is finished."""
        self._refuse_while_updating("begin_update")
        with self._or_die("begin_update", WeightUpdateError):
            self._update = IncomingUpdate(self._shapes)
            self._begin_load()

    def load_bucket(self, bucket: Bucket) -> None:
        """Load one bucket of the update."""
        update = self._require_update("load_bucket")
        self._came_by = "object_store"
        with self._or_die("load_bucket", WeightUpdateError):
            self._load(update.accept(bucket))

    def connect(self, transport: str, info: dict[str, Any]) -> None:
        """Join the group in which the trainer sends weights from GPU to GPU; ``info`` is what vLLM's engine needs for it."""
        self._refuse_while_updating("connect")
        with self._or_die("connect"):
            self._connect(transport, info)
        self._connected = transport

    def take_sent(self, info: dict[str, Any]) -> None:
        """Fetch and load the weights that the trainer sends now: ``names``, ``shapes`` and how they come."""
        update = self._require_update("take_sent")
        self._came_by = self._connected
        with self._or_die("take_sent", WeightUpdateError):
            update.expect((name, tuple(shape)) for name, shape in zip(info["names"], info["shapes"], strict=True))
            self._take_sent(info)

    def finish_update(self, version: int, checksum: str) -> None:
        """Finish the update: check that every weight has arrived intact, and use them as ``version``."""
        update = self._require_update("finish_update")
        with self._or_die("finish_update", WeightUpdateError):
            update.close(checksum, self._received())
            self._weight_version = version
            self._end_load()
        self._awaits_weights = False
        self._update = None

    # Life

    def go_to(self, level: Level) -> None:
        """Sleep, or wake up as far as ``level`` says: its weights, or all. Between two calls that generate."""
        if self._unfinished:
            raise RequestError(f"rollout engine {self.rank} has {self.unfinished} requests in work: step or abort them")
        self._refuse_while_updating("go_to")
        with self._or_die("go_to"):
            self._go_to(level)

    def probe(self) -> Probe:
        """Report the engine's state without touching the model."""
        return Probe(self._dead or self._death(), self._weight_version, self.unfinished)

    def execution(self) -> Execution:
        """How this engine computes log-probs."""
        config = self.config
        return Execution(
            **self._loaded(),
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            vocabulary=self.vocabulary,
            tokenizer=self._tokenizer,
            transport=self._came_by,
        )

    def shutdown(self) -> None:
        """Free everything. The engine refuses all further work; a second call does nothing."""
        if self._dead != "it was shut down":
            self._dead = "it was shut down"
            self._unfinished.clear()
            self._close()

    @contextmanager
    def _or_die(self, phase: str, failure: type[GroupError] = EngineDeadError) -> Iterator[None]:
        """Refuse to run the block if the engine is dead; an error inside the block leaves it dead."""
        if self._dead is not None:
            raise EngineDeadError(ROLE, self.rank, phase, f"the engine is dead ({self._dead}): restart it")
        try:
            yield
        except Exception as error:
            cause = self._death() or str(error) or type(error).__name__
            self._dead = f"{phase} failed: {cause}"
            raise failure(ROLE, self.rank, phase, f"{cause}; the engine is dead now") from error

    def _refuse_while_updating(self, phase: str) -> None:
        if self._update is not None and self._dead is None:
            raise RequestError(f"rollout engine {self.rank}: {phase} in the middle of a weight update: finish it first")

    def _require_update(self, phase: str) -> IncomingUpdate:
        if self._update is None:
            with self._or_die(phase):
                pass
            raise RequestError(f"rollout engine {self.rank}: {phase} outside of a weight update: begin_update first")
        return self._update
