"""Workers with a language model: the policy that is trained, and the frozen reference that it is compared with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from rlhf_ray.actors.workers.model import Loss, ModelWorker, Part, Vocabulary, WorkerSetup, sampled_tokens
from rlhf_ray.algorithms.losses import Distillation, Divergence, PolicyOutputs
from rlhf_ray.config.files.sampled import NO_ADAPTER
from rlhf_ray.config.files.tokenizers import different_tokenizer
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.errors import RequestError
from rlhf_ray.network import free_port
from rlhf_ray.rollout.execution import PROCESSED, Execution, versions
from rlhf_ray.rollout.transport import Transport
from rlhf_ray.rollout.weights.deadline import Taken
from rlhf_ray.rollout.wire import Bucket, Content, PublishedWeights
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed
from rlhf_ray.trajectories.schedule import MicroBatch

if TYPE_CHECKING:
    from rlhf_ray.models.forward.divergence import Teacher
    from rlhf_ray.rollout.weight_sender import WeightSender
    from rlhf_ray.rollout.weights.delta import LastSent


@dataclass(frozen=True)
class LanguageSetup(WorkerSetup):
    """What the policy and the reference need besides."""

    temperature: float = 1.0
    """The sampling temperature, at which log-probs are computed."""
    teacher: ModelConfig | None = None
    """A model that the policy learns from, which lies frozen beside it on every rank."""


class ReferenceWorker(ModelWorker[LanguageSetup]):
    """The frozen policy that KL is measured against. Tokens of a mixture go where its own routers send them."""

    role = "reference"
    over_kept_sets = True

    def _load(self, setup: LanguageSetup) -> tuple[torch.nn.Module, str]:
        from rlhf_ray.models import PackedPolicy, load_policy
        from rlhf_ray.models.description import describe

        self.actor = load_policy(
            setup.config.model, device=self.device, ds_config=self._ds_config(setup), seed=setup.seed
        )
        return PackedPolicy(self.actor), describe(self.actor)

    @property
    def hf_model(self) -> Any:
        return self.actor.model

    def log_probs(self, batch: TrajectoryBatch, micro_batches: Sequence[MicroBatch]) -> list[Part]:
        """log p(token t | tokens before t) at the sampling temperature, for every sampled token of this rank's sequences.

        Prompts have 0: the output layer, half of a small model's work, does not run for them.
        """
        with self.doing("log_probs"):
            return [part for one in micro_batches for part in self._log_probs_of_pack(batch, one)]

    def _log_probs_of_pack(self, batch: TrajectoryBatch, micro_batch: MicroBatch) -> list[Part]:
        wanted = self._sampled(batch, micro_batch)
        temperature = self.settings.temperature
        return self.forward_parts(
            batch, [micro_batch], lambda module, packed: module(packed, temperature, wanted=wanted).log_probs
        )


class PolicyWorker(ReferenceWorker):
    """The policy: log-probs as the reference computes them, training, and its weights for the rollout engines."""

    role = "policy"
    replays_routing = True
    _sender: WeightSender | None = None
    _last_sent: LastSent | None = None
    _base: PublishedWeights | None = None
    _transport: Transport | None = None
    _quantization: str | None = None
    _teacher: Teacher | None = None

    def _load(self, setup: LanguageSetup) -> tuple[torch.nn.Module, str]:
        from rlhf_ray.models.weights.quantization import four_bit_layers

        loaded = super()._load(setup)
        # Layers are in 4 bits from loading on or never. To look at all of them with every publication takes milliseconds.
        self._quantization = "nf4" if four_bit_layers(self.hf_model) else None
        if setup.teacher is not None:
            self._teacher = self._load_teacher(setup)
        return loaded

    def _load_teacher(self, setup: LanguageSetup) -> Teacher:
        from rlhf_ray.models import load_policy
        from rlhf_ray.models.forward.divergence import Teacher

        assert setup.teacher is not None
        teacher = Teacher(load_policy(setup.teacher, device=self.device))
        _require_one_vocabulary(setup.config.model, setup.teacher)
        return teacher

    @cached_property
    def _own_vocabulary(self) -> Vocabulary:
        return self.vocabulary()  # reads a file; it is asked for with every publication

    def execution(self, transport: str | None = None, lora: str | None = None) -> Execution:
        """How this rank computes log-probs; ``transport`` and ``lora`` are of the publication that it made just now, if any."""
        from rlhf_ray.models.dtypes import dtype_name

        config = self.hf_model.config.get_text_config()
        return Execution(
            dtype=dtype_name(self.hf_model.dtype),
            head="fp32" if self.actor.log_prob_head.fp32 else dtype_name(self.hf_model.dtype),
            log_probs=PROCESSED,
            temperature=float(self.settings.temperature),
            attention=self.actor.attention,
            vocabulary=self._own_vocabulary.rows,
            tokenizer=self._own_vocabulary.fingerprint,
            lora=lora,
            quantization=self._quantization,
            context=getattr(config, "max_position_embeddings", None),
            transport=transport,
            **versions("torch", "transformers", "tokenizers", "deepspeed"),
        )

    def _outputs(self, module: torch.nn.Module, packed: Packed, sequences: TrajectoryBatch | None, loss: Loss) -> Any:
        wanted = None if sequences is None else sampled_tokens(sequences)
        in_loss = getattr(loss, "entropy_coefficient", 0.0) != 0.0
        from_teacher = (
            {"teacher": self._teacher, "divergence": loss.divergence} if isinstance(loss, Distillation) else {}
        )
        return module(
            packed, self.settings.temperature, with_entropy=True, wanted=wanted, entropy_in_loss=in_loss, **from_teacher
        )

    def divergences(
        self, batch: TrajectoryBatch, micro_batches: Sequence[MicroBatch], divergence: Divergence
    ) -> list[Part]:
        """The divergence from the teacher, in nats, of every sampled token of this rank's sequences; prompts have 0."""

        def forward(module: torch.nn.Module, packed: Packed, wanted: Any) -> torch.Tensor:
            outputs: PolicyOutputs = module(packed, wanted=wanted, teacher=self._teacher, divergence=divergence)
            assert outputs.divergence is not None, "the driver gave this rank a teacher"
            return outputs.divergence

        with self.doing("divergences"):
            return [
                part
                for one in micro_batches
                for part in self.forward_parts(batch, [one], partial(forward, wanted=self._sampled(batch, one)))
            ]

    def save_without_weights(self, directory: str) -> dict[str, tuple[int, ...]]:
        """Write what rollout engines start from, on rank 0; weights come by the first update.

        Returns their names on disk and shapes, there; nothing on other ranks.
        """
        from rlhf_ray.engine.weights import describe_disk_weights
        from rlhf_ray.models import load_tokenizer, save_without_weights

        if self.rank != 0:
            return {}
        described = describe_disk_weights(self.hf_model)
        tokenizer = load_tokenizer(self.config.model) if self.tokenizer is None else self.tokenizer
        empty = {one.name: torch.empty(one.shape, dtype=one.dtype, device="meta") for one in described}
        save_without_weights(self.hf_model, tokenizer, directory, empty)
        return {one.name: one.shape for one in described}

    def adapter_rank(self) -> int:
        """The largest rank of the LoRA that is trained. Raises :class:`RequestError` where something else is trained too."""
        from rlhf_ray.models.weights.lora import ADAPTER, adapted_layers, is_adapter_part

        trained = [name for name, parameter in self.hf_model.named_parameters() if parameter.requires_grad]
        others = [name for name in trained if not is_adapter_part(name)]
        if others:
            raise RequestError(f"rollout.lora is {NO_ADAPTER} (it trains {others[0]})")
        return int(max(layer.r[ADAPTER] for layer in adapted_layers(self.hf_model).values()))

    def publish_weights(self, version: int, content: Content = "weights") -> PublishedWeights | None:
        """All weights by their names on disk, in buckets with a checksum, on rank 0; the other ranks take part.

        They must not change before the engines have taken them: no bucket is a copy unless :meth:`keep_bucket` makes one. With
        the ``content`` ``changes`` the publication also has what changed since the one before, of which rank 0 keeps a copy;
        with ``adapter`` its weights are the base, which is gathered once, and the LoRA adapter is beside them.
        """
        from rlhf_ray.rollout.weights.delta import LastSent
        from rlhf_ray.rollout.wire import publish

        with self.doing("publish_weights"):
            if content == "adapter":
                published = self._publish_adapter(version)
            else:
                if content == "changes" and self._last_sent is None:
                    self._last_sent = LastSent()
                weights = self.engine.disk_weights_in_place(self.hf_model)
                published = publish(version, weights, keep=self.keep_bucket, last=self._last_sent)
        if self.rank != 0:
            return None
        lora = "adapter" if content == "adapter" else "merged"
        return replace(published, execution=self.execution("object_store", lora))

    def _publish_adapter(self, version: int) -> PublishedWeights:
        from rlhf_ray.engine.weights import adapter_weights, disk_weights
        from rlhf_ray.models.weights.adapters import adapter_config
        from rlhf_ray.rollout.wire import publish, publish_adapter

        receive, keep = self.rank == 0, self.keep_bucket
        if self._base is None:
            base = disk_weights(self.hf_model, receive=receive, adapters="left out")
            self._base = publish(version, chain.from_iterable(base), keep=keep)
        tensors = chain.from_iterable(adapter_weights(self.hf_model, receive=receive))
        adapter = publish_adapter(version, adapter_config(self.hf_model), tensors, keep=keep)
        return replace(self._base, version=version, adapter=adapter)

    def gpu(self) -> str | None:
        """The UUID of this rank's GPU; None on a CPU."""
        return str(torch.cuda.get_device_properties(self.device).uuid) if self.device.type == "cuda" else None

    def connect_engines(self, transport: Transport, engines: Sequence[Any], workers: int, address: str) -> None:
        """Connect to ``engines``, of ``workers`` GPUs each, through which weights then go from GPU to GPU.

        Every rank takes part; rank 0 calls the engines, and listens at ``address`` for their workers.
        """
        from rlhf_ray.engine.weights import describe_disk_weights, disk_weights
        from rlhf_ray.rollout.weight_sender import DiskWeights, Route, WeightSender

        with self.doing("connect_engines"):
            if self._sender is not None:
                self._sender.close()
            # Through ipc every rank shares its GPU's memory; through nccl only rank 0 sends.
            receive = transport == "ipc" or self.rank == 0
            source = DiskWeights(
                describe_disk_weights(self.hf_model), partial(disk_weights, self.hf_model, receive=receive)
            )
            port = free_port(address) if self.rank == 0 else 0  # the others do not listen
            route = Route(transport, self.rank, len(engines), workers, address, port)
            self._transport = transport
            self._sender = WeightSender(route, source, partial(self.call_engines, engines), self.device)

    def send_weights(self, version: int) -> tuple[Execution, Taken]:
        """Send all weights to the connected engines, which hold them as ``version`` when rank 0 returns.

        Returns how this rank computes log-probs, and what the sending took.
        """
        assert self._sender is not None, "the driver connects the engines first"
        began = time.monotonic()
        with self.doing("send_weights"):
            if self.device.type == "cuda":  # the last update of the weights may still be running
                torch.cuda.synchronize(self.device)
            self._sender.send(version)
        taken = Taken(whole=True, nbytes=self._sender.nbytes, seconds=time.monotonic() - began)
        return self.execution(self._transport, "merged"), taken

    def call_engines(self, engines: Sequence[Any], method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Call ``method`` of every engine, each with its own arguments; returns when all have answered."""
        for engine, own in zip(engines, arguments, strict=True):
            getattr(engine, method)(*own)

    def keep_bucket(self, bucket: Bucket) -> Any:
        """Keep a bucket until the engines have taken it; returns what they find it by: itself in the same process."""
        return bucket


def _require_one_vocabulary(policy: ModelConfig, teacher: ModelConfig) -> None:
    """Refuse a teacher whose token ids mean something else; one that comes from a hub is first seen here."""
    from rlhf_ray.data.tokenizers import fingerprint
    from rlhf_ray.models import load_tokenizer

    if fingerprint(load_tokenizer(policy)) != fingerprint(load_tokenizer(teacher)):
        raise RequestError(f"teacher: {different_tokenizer('teacher', teacher, policy)}")
