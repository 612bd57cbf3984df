"""``rlhf-ray evaluate``: what a reward model makes of a file of preferences.

Always true: the figures are those of the evaluation in training, over the same packs; what was dropped is said; nothing of
the pairs' text is printed.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_ray import storage
from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.place import Place, place_scoring_group
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.console import get_logger, say, table
from rlhf_ray.data.encoded_pairs import PairExample, PairFile, pairs_of_file
from rlhf_ray.errors import EXIT_DONE, DataError, RequestError
from rlhf_ray.evaluation.rewardbench import missing_subsets, section_scores
from rlhf_ray.evaluation.scored_pairs import ScoredPairs
from rlhf_ray.rows.layouts import Keys
from rlhf_ray.rows.preferences import PreferenceReader
from rlhf_ray.rows.sources import RowSource

WORST = 50
"""Pairs in the file of figures."""


def evaluate(
    config: ServeConfig, file: Path, keys: Keys, *, turns: bool, output: Path | None, place: Place | None = None
) -> int:
    """Score every pair of ``file`` with ``config.reward``; print the tables, write all figures to ``output``.

    The model lives in ``place``, on Ray without one.
    """
    from rlhf_ray.algorithms.reward_losses import RewardLoss
    from rlhf_ray.models import load_tokenizer
    from rlhf_ray.trainers.supervised.reward_evaluation import HeldOutPairs

    if output is not None and not output.parent.is_dir():
        raise RequestError(
            f"--output {output}: the folder {output.parent} does not exist: make it, or name another file"
        )
    tokenizer = load_tokenizer(config.reward.model)
    pairs = _pairs(file, keys, tokenizer, config.max_tokens, turns=turns)
    with Cluster.for_job(config) if place is None else nullcontext(place) as here:
        group = place_scoring_group(here, config, config.reward).load().result()
        budget = max(config.max_batch_tokens, max(len(pair.chosen) + len(pair.rejected) for pair in pairs))
        held_out = HeldOutPairs(group, pairs, RewardLoss(), budget)
        held_out.figures(shown=True)
        page = held_out.page(tokenizer, WORST, None)
    assert held_out.scored is not None
    figures = tell(held_out.scored)
    if output is not None:
        shown = {**figures, "calibration": page.calibration, "worst": asdict(page.worst)}
        storage.write_file(output, json.dumps(shown, indent=1, ensure_ascii=False) + "\n")
    return EXIT_DONE


def tell(scored: ScoredPairs) -> dict[str, Any]:
    """Print the figures of all pairs, of each source and of RewardBench's sections; also as plain values."""
    from rlhf_ray.trainers.supervised.reward_evaluation import source_table

    figures = scored.figures()
    say(table("all pairs", ("figure", "value"), [(name, f"{value:.4g}") for name, value in figures.items()]))
    sources = source_table(scored)
    say(table("by source", sources.headers, sources.rows))
    by_source = {source: part.figures() for source, part in scored.by_source().items()}
    accuracies = {source: part["accuracy"] for source, part in by_source.items() if "accuracy" in part}
    sections = section_scores(accuracies)
    if sections:
        say(table("RewardBench", ("section", "score"), [(name, f"{score:.4f}") for name, score in sections.items()]))
        missing = missing_subsets(accuracies)
        if missing:
            get_logger().warning("these are not the leaderboard's scores: %s are missing", ", ".join(missing))
    return {"figures": figures, "sources": by_source, "rewardbench": sections}


def _pairs(file: Path, keys: Keys, tokenizer: Any, max_tokens: int, *, turns: bool) -> list[PairExample]:
    if not file.exists():
        raise DataError(f"{file} does not exist: name a file of preference pairs")
    rows = pairs_of_file(PairFile(RowSource(str(file)), PreferenceReader(keys, turns), max_tokens), tokenizer)
    pairs = [row.pair for row in rows if isinstance(row.pair, PairExample)]
    dropped = Counter(row.pair for row in rows if isinstance(row.pair, str))
    told = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not pairs:
        raise DataError(
            f"{file}: no pair is left to evaluate on ({told or 'there were none'}); give other rows, or raise max_tokens"
        )
    if dropped:
        get_logger("data").info("%s: of %d pairs dropped: %s", file, len(rows), told)
    return pairs
