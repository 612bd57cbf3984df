"""``rlhf-ray evaluate``: measure a reward model on a file of preferences.

Invariants: the figures are those that evaluation during training gives, over the same packs; dropped pairs are counted and
reported; no text of a pair is printed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.place import Place, place_scoring_group
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.roles import Form, ScoringRole
from rlhf_ray.console import get_logger
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encode import without_refused_pairs
from rlhf_ray.data.encoded_pairs import PairExample, PairFile, encode_pair_file
from rlhf_ray.data.text_pairs import encode_text_pairs
from rlhf_ray.errors import EXIT_DONE, DataError, ModelLoadError
from rlhf_ray.evaluation.rewardbench import missing_subsets, section_scores
from rlhf_ray.launch.evaluate_candidates import is_file_of_candidates, read_candidates, report_on_candidates
from rlhf_ray.launch.reward_report import RewardReport, print_report
from rlhf_ray.rows.preferences import PreferencePair, PreferenceReader
from rlhf_ray.rows.read import read_file
from rlhf_ray.rows.sources import RowSource
from rlhf_ray.storage import OutputFile

if TYPE_CHECKING:
    from rlhf_ray.models.reward_reading import RewardReading

WORST = 50
"""The number of worst pairs in the file of figures."""


def evaluate(
    config: ServeConfig, file: Path, reader: PreferenceReader, *, output: OutputFile | None, place: Place | None = None
) -> int:
    """Print what :func:`evaluate_pairs` finds as tables, and write all of it to ``output``."""
    if output is not None:
        output.check()
    with _evaluated(config, file, reader, place) as report:
        print_report(report)
        if output is not None:
            content = {
                "figures": report.figures,
                "sources": report.sources,
                "rewardbench": report.rewardbench,
                "calibration": report.calibration,
                "worst": asdict(report.worst),
            }
            output.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return EXIT_DONE


def evaluate_pairs(
    config: ServeConfig, file: Path, reader: PreferenceReader, *, place: Place | None = None
) -> RewardReport:
    """Score every pair of ``file``, or every answer where its rows hold several, with ``config.reward``.

    The model runs in ``place``, or on Ray if there is none.
    """
    with _evaluated(config, file, reader, place) as report:
        return report


@contextmanager
def _evaluated(
    config: ServeConfig, file: Path, reader: PreferenceReader, place: Place | None
) -> Iterator[RewardReport]:
    """What :func:`evaluate_pairs` finds; the place is left after the block, since a cluster that died may end this process."""
    from rlhf_ray.algorithms.reward_losses import RewardLoss
    from rlhf_ray.models import load_tokenizer
    from rlhf_ray.models.weights.encoder_config import encoder_positions, is_encoder
    from rlhf_ray.trainers.supervised.reward_evaluation import HeldOutPairs, source_table

    tokenizer = load_tokenizer(config.reward.model)
    reading = _reading(config.reward, tokenizer, turns=reader.turns)
    if is_file_of_candidates(file, reader.keys):
        rows = read_candidates(file, reader)
        with Cluster.for_job(config, together=True) if place is None else nullcontext(place) as here:
            scorer = place_scoring_group(here, config, config.reward).load().result()
            yield report_on_candidates(
                rows, lambda requests: scorer.score(requests).result(), turns=reader.turns, worst=WORST, file=file
            )
        return
    in_pairs = is_encoder(config.reward.model)
    max_tokens = min(
        config.max_tokens, (encoder_positions(config.reward.model) if in_pairs else None) or config.max_tokens
    )
    pairs = _pairs(file, reader, tokenizer, max_tokens, reading, text_pairs=in_pairs)
    with Cluster.for_job(config, together=True) if place is None else nullcontext(place) as here:
        group = place_scoring_group(here, config, config.reward).load().result()
        budget = max(config.max_batch_tokens, max(len(pair.chosen) + len(pair.rejected) for pair in pairs))
        held_out = HeldOutPairs(group, pairs, RewardLoss(), budget)
        held_out.figures(show_progress=True)
        page = held_out.page(tokenizer, WORST, None)
        scored = held_out.scored
        assert scored is not None
        sources = {source: part.figures() for source, part in scored.by_source().items()}
        yield RewardReport(
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


def _reading(role: ScoringRole, tokenizer: Any, *, turns: bool) -> RewardReading:
    """How the model reads; ``turns`` asks for turns of a conversation."""
    from rlhf_ray.models import load_reward_reading

    try:
        form: Form | None = "conversation" if turns else role.form
        reading: RewardReading = load_reward_reading(role.model, tokenizer, form=form, scored_token=role.scored_token)
    except ModelLoadError as error:
        raise ModelLoadError(f"--apply-chat-template: {error}" if turns else str(error)) from error
    return reading


def _pairs(
    file: Path, reader: PreferenceReader, tokenizer: Any, max_tokens: int, reading: RewardReading, *, text_pairs: bool
) -> list[PairExample]:
    """The pairs of a file that fit, up to the token that is read; with ``text_pairs`` each side is what an encoder reads."""
    if not file.exists():
        raise DataError(f"{file} does not exist: name a file of preference pairs")
    source, reader = RowSource(str(file)), replace(reader, turns="text" not in reading.forms)
    rows = (
        encode_text_pairs(tokenizer, read_file(source, reader), max_tokens)
        if text_pairs
        else _encode(PairFile(source, reader, max_tokens), ChatFormat(tokenizer, reading.template_variables), reading)
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


def _encode(file: PairFile, chat: ChatFormat, reading: RewardReading) -> list[PairExample | str]:
    """The pairs of a file, or why they are dropped, with ids that end at the token where the model's score is read."""
    rows = [row.pair for row in encode_pair_file(file, chat)]
    if any(isinstance(row, PairExample) and row.form not in reading.forms for row in rows):
        raise DataError(f"{file.rows} holds conversations, but the model {reading.sentence()}: give pairs of texts")
    sides = [None if isinstance(row, str) else (row.chosen, row.rejected) for row in rows]
    if reading.scored_token == "rendering" and "conversation" in reading.forms:
        written = list(read_file(file.rows, file.reader, bad_rows=[]))
        written = without_refused_pairs(chat, written, []) if file.reader.drops_bad_rows else written
        sides = [_renderings(row, chat) for row in written]
    return [
        row
        if isinstance(row, str) or two is None
        else replace(row, chosen=reading.scored_ids(two[0]), rejected=reading.scored_ids(two[1]))
        for row, two in zip(rows, sides, strict=True)
    ]


def _renderings(row: PreferencePair, chat: ChatFormat) -> tuple[Sequence[int], Sequence[int]]:
    """The ids of all that the template writes for both sides."""
    assert row.conversations is not None, "all rows are conversations here"
    prompt, *answers = row.conversations
    chosen, rejected = (
        chat.rendering_ids([*prompt, *answer], row.tools, row.template_variables, where=row.where) for answer in answers
    )
    return chosen, rejected
