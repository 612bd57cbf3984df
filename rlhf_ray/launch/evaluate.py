"""``rlhf-ray evaluate``: measure a reward model on a file of preferences.

Invariants: the figures are those that evaluation during training gives, over the same packs; dropped pairs are counted and
reported; no text of a pair is printed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_ray import storage
from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.place import Place, place_scoring_group
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encoded_pairs import PairExample, PairFile, encode_pair_file
from rlhf_ray.data.text_pairs import encode_text_pairs
from rlhf_ray.errors import EXIT_DONE, DataError
from rlhf_ray.evaluation.rewardbench import missing_subsets, section_scores
from rlhf_ray.launch.evaluate_candidates import is_file_of_candidates, read_candidates, report_on_candidates
from rlhf_ray.launch.output import require_folder
from rlhf_ray.launch.reward_report import RewardReport, print_report
from rlhf_ray.rows.preferences import PreferenceReader
from rlhf_ray.rows.read import read_file
from rlhf_ray.rows.sources import RowSource

WORST = 50
"""The number of worst pairs in the file of figures."""


def evaluate(
    config: ServeConfig, file: Path, reader: PreferenceReader, *, output: Path | None, place: Place | None = None
) -> int:
    """Print what :func:`evaluate_pairs` finds as tables, and write all of it to ``output``."""
    require_folder("--output", output)
    report = evaluate_pairs(config, file, reader, place=place)
    print_report(report)
    if output is not None:
        content = {
            "figures": report.figures,
            "sources": report.sources,
            "rewardbench": report.rewardbench,
            "calibration": report.calibration,
            "worst": asdict(report.worst),
        }
        storage.write_file(output, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return EXIT_DONE


def evaluate_pairs(
    config: ServeConfig, file: Path, reader: PreferenceReader, *, place: Place | None = None
) -> RewardReport:
    """Score every pair of ``file``, or every answer where its rows hold several, with ``config.reward``.

    The model runs in ``place``, or on Ray if there is none.
    """
    from rlhf_ray.algorithms.reward_losses import RewardLoss
    from rlhf_ray.models import load_tokenizer
    from rlhf_ray.models.weights.encoder_config import encoder_positions, is_encoder
    from rlhf_ray.trainers.supervised.reward_evaluation import HeldOutPairs, source_table

    if is_file_of_candidates(file, reader.keys):
        rows = read_candidates(file, reader)
        with Cluster.for_job(config) if place is None else nullcontext(place) as here:
            scorer = place_scoring_group(here, config, config.reward).load().result()
            return report_on_candidates(
                rows, lambda requests: scorer.score(requests).result(), turns=reader.turns, worst=WORST, file=file
            )
    tokenizer = load_tokenizer(config.reward.model)
    in_pairs = is_encoder(config.reward.model)
    max_tokens = min(
        config.max_tokens, (encoder_positions(config.reward.model) if in_pairs else None) or config.max_tokens
    )
    pairs = _pairs(file, reader, tokenizer, max_tokens, text_pairs=in_pairs)
    with Cluster.for_job(config) if place is None else nullcontext(place) as here:
        group = place_scoring_group(here, config, config.reward).load().result()
        budget = max(config.max_batch_tokens, max(len(pair.chosen) + len(pair.rejected) for pair in pairs))
        held_out = HeldOutPairs(group, pairs, RewardLoss(), budget)
        held_out.figures(show_progress=True)
        page = held_out.page(tokenizer, WORST, None)
    scored = held_out.scored
    assert scored is not None
    sources = {source: part.figures() for source, part in scored.by_source().items()}
    return RewardReport(
        scored.figures(),
        sources,
        section_scores(_accuracies(sources)),
        page.calibration,
        page.worst,
        source_table(scored),
        missing_subsets(_accuracies(sources)),
    )


def _accuracies(sources: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The accuracy on each source that has one; where all pairs are ties there is none."""
    return {source: figures["accuracy"] for source, figures in sources.items() if "accuracy" in figures}


def _pairs(
    file: Path, reader: PreferenceReader, tokenizer: Any, max_tokens: int, *, text_pairs: bool
) -> list[PairExample]:
    """The pairs of a file that fit; with ``text_pairs`` each side is what an encoder reads."""
    if not file.exists():
        raise DataError(f"{file} does not exist: name a file of preference pairs")
    source = RowSource(str(file))
    rows = (
        encode_text_pairs(tokenizer, read_file(source, reader), max_tokens)
        if text_pairs
        else [row.pair for row in encode_pair_file(PairFile(source, reader, max_tokens), ChatFormat(tokenizer))]
    )
    pairs = [row for row in rows if isinstance(row, PairExample)]
    dropped = Counter(row for row in rows if isinstance(row, str))
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not pairs:
        raise DataError(
            f"{file}: no pair is left to evaluate on ({reasons or 'there were none'}); give other rows, or raise max_tokens"
        )
    if dropped:
        get_logger("data").info("%s: of %d pairs dropped: %s", file, len(rows), reasons)
    return pairs
