"""One rank of the reward model, which owns the reward tokenizer and template: scores requests, and trains on pairs.

Always true: every request ends in one result, a score or a sentence that says why there is none; a score does not depend on
what else was asked, nor on which rank or scorer gave it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlhf_ray.actors.workers import CriticWorker, Part, WorkerSetup
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.engine.optimizer import full_shape
from rlhf_ray.environment import keep_freed_memory
from rlhf_ray.errors import ScoringError
from rlhf_ray.planning.flops import ComputeShape
from rlhf_ray.rewards.encoding import EncodedItem, encode_request
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.length_packs import alike_packs
from rlhf_ray.trajectories.packing import Packed, families
from rlhf_ray.trajectories.schedule import MicroBatch, make_schedule

if TYPE_CHECKING:
    from rlhf_ray.models.forward.parallel_packs import Streams
    from rlhf_ray.rollout.vllm_scorer import VllmScorer

FAMILIES_PER_RANK = 4
"""Items that begin alike are cut into so many parts a rank at least, where they are all there is."""


class RewardWorker(CriticWorker):
    """The reward model; where its scorer is vLLM, that scores in the place of an engine, and the model is nowhere else."""

    role = "reward"
    model_type = "reward"
    pooling: VllmScorer | None = None
    streams: Streams | None = None
    """Where a rank that only scores has several threads of a CPU."""

    def setup(self, setup: WorkerSetup) -> str:
        from rlhf_ray.data.tokenizers import fingerprint, template_fingerprint
        from rlhf_ray.models import load_tokenizer

        with_vllm = isinstance(setup.config, ScoringRole) and setup.config.scorer == "vllm"
        line = self._start_vllm(setup) if with_vllm else super().setup(setup)
        self.tokenizer = load_tokenizer(setup.config.model)
        self.fingerprint, self.template = fingerprint(self.tokenizer), template_fingerprint(self.tokenizer)
        if self.pooling is not None:
            self.model_config, self.vocabulary = self.pooling.config, self.pooling.vocabulary
        else:
            self.model_config = self.hf_model.config
            self.vocabulary = self.hf_model.get_input_embeddings().num_embeddings
            self.streams = self._streams(setup)
        positions = self.model_config.get_text_config().to_dict().get("max_position_embeddings")
        self.max_item_tokens = min(setup.max_item_tokens, positions or setup.max_item_tokens)
        return line

    def _streams(self, setup: WorkerSetup) -> Streams | None:
        from rlhf_ray.models.forward.parallel_packs import Streams
        from rlhf_ray.models.forward.shards import in_shards

        threads = setup.config.resources.threads_per_rank
        alone = setup.total_updates is None and self.device.type == "cpu" and not in_shards(self.hf_model)
        if threads == 1 or not alone:
            return None
        keep_freed_memory()
        return Streams(threads)

    def _start_vllm(self, setup: WorkerSetup) -> str:
        from rlhf_ray.rollout.vllm_scorer import VllmScorer

        self.config, self.settings = setup.config, setup
        self.pooling = VllmScorer(
            setup.config.model, max_item_tokens=setup.max_item_tokens, gpus=setup.config.resources.gpus_per_rank
        )
        self.phase = "ready"
        return f"{setup.config.model.path}: reward in vLLM's pooling runner, {setup.config.model.dtype}"

    def _outputs(self, module: torch.nn.Module, packed: Packed) -> Any:
        return module(packed, kind="routed_scores" if self.settings.routers else "scores")

    def save_adapter(self, directory: str, metadata: dict[str, Any] | None = None) -> None:
        """The LoRA adapter and the head alone, without the base, written by rank 0; every rank takes part."""
        from rlhf_ray.models import save_adapter

        names = {f"{self.model.value_head_prefix}.weight"}
        gathered = (pair for group in self.engine.full_state(self.hf_model) for pair in group)
        trained = [(name, tensor) for name, tensor in gathered if ".lora_" in name or name in names]
        if self.rank == 0:
            save_adapter(self.model, self.tokenizer, directory, tensors=trained, metadata=metadata)

    def scores_on_disk(self, directory: str, batch: TrajectoryBatch) -> list[float]:
        """What the model in ``directory`` gives to ``batch``, read anew by rank 0 as a user would; empty elsewhere."""
        from rlhf_ray.models.reread import scores_of_directory

        if self.rank != 0:
            return []
        self.phase = "score"
        scores = scores_of_directory(directory, self.config.model, batch)
        self.phase = "ready"
        return scores

    def compute(self) -> ComputeShape:
        """What a token of this model costs."""
        backbone = self.model.backbone
        text = backbone.config.get_text_config()
        outside = {id(parameter) for parameter in backbone.get_input_embeddings().parameters()}
        matrices = [p for p in backbone.parameters() if id(p) not in outside and len(full_shape(p)) > 1]
        trained = sum(full_shape(p).numel() for p in matrices if p.requires_grad)
        width = text.num_attention_heads * (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        return ComputeShape(sum(full_shape(p).numel() for p in matrices), trained, text.num_hidden_layers, width)

    def matmul_rate(self) -> float:
        """FLOP/s of a large matrix product on this rank, now, in the precision that it computes in."""
        from rlhf_ray.engine.matmul_rate import matmul_rate
        from rlhf_ray.models.dtypes import DTYPES

        return matmul_rate(DTYPES[self.config.model.dtype], self.device)

    def describe(self) -> dict[str, Any]:
        """What callers must know of this model: its tokenizer and template, limit, mean and std where they normalise."""
        values = self.model_config.to_dict()
        mean, std = values.get("mean"), values.get("std")
        if mean is None or std is None or not math.isfinite(mean) or not 0 < std < math.inf:
            mean = std = None
        told = {"fingerprint": self.fingerprint, "template": self.template}
        return {**told, "mean": mean, "std": std, "max_tokens": self.max_item_tokens}

    def scores(
        self, batch: TrajectoryBatch, micro_batches: Sequence[MicroBatch], streams: Streams | None = None
    ) -> list[Part]:
        """One score a sequence, read at its last token."""
        self.phase = "score"
        if self.pooling is not None:
            rows = tuple(index for micro_batch in micro_batches for index in micro_batch)
            part = batch.select(rows)
            sequences = [ids.tolist() for ids in part["token_ids"].split(part.lengths.tolist())]
            parts: list[Part] = [(rows, np.asarray(self.pooling.scores(sequences), dtype=np.float32))]
        else:
            parts = self.forward_parts(
                batch, micro_batches, lambda module, packed: module(packed, kind="scores"), streams
            )
        self.phase = "ready"
        return parts

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[int, ScoreResult]]:
        """Results of this rank's share of ``requests``, with their positions.

        Every rank gets all requests and makes the same schedule, so that each enters every forward.
        """
        encoded: dict[int, EncodedItem] = {}
        results: list[tuple[int, ScoreResult]] = []
        for position, request in enumerate(requests):
            try:
                encoded[position] = encode_request(
                    self.tokenizer, request, max_tokens=self.max_item_tokens, vocabulary=self.vocabulary
                )
            except ScoringError as error:
                results.append((position, ScoreResult.failed(str(error))))
        results = results if self.rank == 0 else []
        return results + self._score_encoded(encoded) if encoded else results

    def _score_encoded(self, encoded: dict[int, EncodedItem]) -> list[tuple[int, ScoreResult]]:
        positions, items = list(encoded), list(encoded.values())
        sequences = [item.token_ids for item in items]
        results = []
        for indices, scores in self.scores(
            TrajectoryBatch.from_sequences(sequences), self._own_packs(sequences), self.streams
        ):
            for index, score in zip(indices, scores.tolist(), strict=True):
                item = items[index]
                result = ScoreResult.of(score, len(item.token_ids), truncated=item.truncated)
                results.append((positions[index], result))
        return results

    def _own_packs(self, sequences: Sequence[Sequence[int]]) -> list[MicroBatch]:
        """What this rank scores of ``sequences``: those that begin alike lie in one pack, which computes that once.

        No rank and no stream goes idle for it. Ranks that may meet in every forward get as many packs each.
        """
        streams = 1 if self.streams is None else self.streams.threads
        lengths, parts = list(map(len, sequences)), self.world_size * streams
        budget = max(self.settings.max_tokens // streams, *lengths)
        together = families(sequences, max(*lengths, min(budget, sum(lengths) // (FAMILIES_PER_RANK * parts))))
        if self.streams is not None or self.world_size == 1:
            packs = alike_packs(lengths, together, ranks=self.world_size, streams=streams, max_tokens=budget)
            return packs[self.rank]
        schedule = make_schedule(
            [sum(lengths[i] for i in family) for family in together], ranks=parts, max_tokens=budget
        )
        return [tuple(i for family in pack for i in together[family]) for pack in schedule.rank(self.rank)]
