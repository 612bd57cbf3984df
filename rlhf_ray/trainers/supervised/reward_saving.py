"""Write a reward model to disk, and check that what was written gives the same scores.

Invariants: every directory that is committed here was read back, and its scores of some pairs were those of the model in
training. ``mean`` and ``std`` in its ``config.json`` are over what ``normalization.over`` says. The model remembers in which
form its pairs were, with which tokenizer and template, and at which token it was scored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf_ray import storage
from rlhf_ray.actors.groups import TrainedRewardGroup
from rlhf_ray.config.files.reward_record import KEY, RewardRecord
from rlhf_ray.config.jobs.reward_model import RewardModelConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.batches import make_pair_batch
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.data.load import load_demonstrations
from rlhf_ray.errors import IntegrityError
from rlhf_ray.evaluation.agreement import Bounds, Spread
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.storage.manifest import FileRecord
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import deal_packs

CONFIG = "config.json"
RESCORED_PAIRS = 8
AGREES_TO = {"fp32": Bounds.of_all(1e-3), "bf16": Bounds(0.05, 0.3, 0.3, 0.3), "fp16": Bounds(0.01, 0.06, 0.06, 0.06)}
"""What differences of scores relative to 1 + |score| keep to, by dtype. In half precision another device, another pack and a
merged adapter each change a score a little."""


class RewardSaver:
    """Saves the model of the group ``reward`` as it is at that moment."""

    def __init__(
        self,
        config: RewardModelConfig,
        reward: TrainedRewardGroup,
        pairs: Sequence[PairExample],
        tokenizer: Any,
        record: RewardRecord,
    ) -> None:
        """The shortest of ``pairs`` are scored again after each save; ``record`` is what the model is to remember."""
        self.config, self.reward = config, reward
        self.max_tokens = config.reward.forward_tokens(config.batch)
        self._again = make_pair_batch(
            sorted(pairs, key=lambda pair: len(pair.chosen) + len(pair.rejected))[:RESCORED_PAIRS]
        )
        self._demonstrations = self._read_demonstrations(tokenizer)
        self._record = record

    def final(self, run: RunDirectory, update: int) -> None:
        """Write ``final/``, whole or not at all, as the weights of ``update``; it has no ``mean`` and ``std`` yet."""
        pending = run.begin_final()
        try:
            hashed = self._save(pending, {})
        except BaseException:
            pending.abort()
            raise
        storage.commit(pending, {"step": update}, [CONFIG], hashed)

    def normalize_final(self, run: RunDirectory, figures: Mapping[str, float]) -> None:
        """Add ``mean`` and ``std`` to ``final/config.json``; ``figures`` are from the evaluation of these weights."""
        normalization = self.normalization(figures)
        if normalization:
            config = json.loads((run.final / CONFIG).read_text()) | normalization
            storage.amend(run.final, {CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"})

    def save(self, pending: storage.PendingDirectory, figures: Mapping[str, float]) -> dict[str, FileRecord]:
        """Fill a directory, read it back and compare the scores; ``figures`` are from the evaluation of these weights.

        Returns the size and hash of every file. Raises :class:`IntegrityError` if the scores differ by more than the dtype
        explains.
        """
        return self._save(pending, self.normalization(figures))

    def _save(self, pending: storage.PendingDirectory, normalization: Mapping[str, float]) -> dict[str, FileRecord]:
        save = self.reward.save_adapter if self.config.save == "adapter" else self.reward.save_pretrained
        save(str(pending.path), {**normalization, KEY: self._record.as_json()}).result()
        live = self.scores(self._again)
        read = torch.tensor(self.reward.scores_on_disk(str(pending.path), self._again).result())
        off = Spread((live - read) / (1.0 + live.abs()))
        bounds = AGREES_TO[self.config.reward.model.dtype]
        if not off.within(bounds):
            raise IntegrityError(
                f"{pending.target.name}/ was written and read again, but its scores of {len(live)} sequences differ from those "
                f"of the model in training, in parts of 1 + |score|: {off}, wanted {bounds}. It was not kept"
            )
        get_logger("rm").info("%s/: read back, scores equal to %.1e", pending.target.name, off.largest)
        return self.reward.hash_files(str(pending.path)).result()

    def normalization(self, figures: Mapping[str, float]) -> dict[str, float]:
        """``mean`` and ``std`` for ``config.json``; empty if there was no evaluation or the config wants none."""
        over = self.config.normalization.over
        if over == "demonstrations":
            assert self._demonstrations is not None
            return {"mean": float(self.scores(self._demonstrations).mean()), "std": 1.0}
        if over == "nothing" or "evaluation/score_mean" not in figures:
            return {}
        if not figures["evaluation/score_std"] > 0.0:
            get_logger("rm").warning("all held-out scores are equal: neither mean nor std is written")
            return {}
        return {"mean": figures["evaluation/score_mean"], "std": figures["evaluation/score_std"]}

    def scores(self, batch: TrajectoryBatch) -> torch.Tensor:
        """(sequences,) raw scores of a batch by the model in training."""
        schedule = deal_packs(batch.lengths.tolist(), ranks=self.reward.size, max_tokens=self.max_tokens)
        return self.reward.scores(self.reward.share(batch), schedule).result().double()

    def _read_demonstrations(self, tokenizer: Any) -> TrajectoryBatch | None:
        normalization, rows = self.config.normalization, self.config.data
        if normalization.over != "demonstrations":
            return None
        if normalization.demonstrations_path is not None:
            rows = rows.over(normalization.demonstrations_path)
        examples = load_demonstrations(rows, tokenizer, self.config.run.seed)
        held_out = examples.held_out or examples.train
        return TrajectoryBatch.from_sequences([example.token_ids for example in held_out])
