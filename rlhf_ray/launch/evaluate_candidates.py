"""Evaluate a reward model on prompts with several right and several wrong answers: best-of-n, and RewardBench 2.

Invariants: an answer is read as ``rlhf-ray score`` reads a prompt and its response; a prompt counts with all its answers or
not at all, and those that do not count are reported; no text is printed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from rlhf_ray.console import get_logger, progress
from rlhf_ray.errors import DataError
from rlhf_ray.evaluation.rewardbench2 import (
    SUBSETS,
    TIES,
    ScoredAnswers,
    TiesId,
    benchmark_scores,
    subset_name,
    ties_score,
)
from rlhf_ray.launch.reward_report import RewardReport
from rlhf_ray.monitoring.report.summary import Table
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rows.candidates import CandidateReader, Candidates
from rlhf_ray.rows.layouts import Keys
from rlhf_ray.rows.preferences import PreferenceReader
from rlhf_ray.rows.published.comparisons import hold_lists_of_answers
from rlhf_ray.rows.read import read_file
from rlhf_ray.rows.sources import RowSource, placed_rows

ANSWERS_PER_CALL = 512
SHOWN_CHARACTERS = 400
"""In the table of the worst prompts: so much of a prompt's end and of an answer's beginning."""
Score = Callable[[Sequence[ScoreRequest]], Sequence[ScoreResult]]
Scored = Sequence[tuple[Candidates, ScoredAnswers]]


def is_file_of_candidates(file: Path, keys: Keys) -> bool:
    """Whether the first row of a file holds lists of answers; a file that cannot be read holds none."""
    try:
        first = next(islice(placed_rows(RowSource(str(file))), 1), None)
    except DataError:
        return False
    return first is not None and isinstance(first[1], Mapping) and hold_lists_of_answers(first[1], keys)


def read_candidates(file: Path, like: PreferenceReader) -> list[Candidates]:
    """Every prompt of a file, whose columns are read as ``like`` reads them."""
    reader = CandidateReader(like.keys, columns=like.columns, drops_bad_rows=like.drops_bad_rows)
    return list(read_file(RowSource(str(file)), reader))


def report_on_candidates(
    rows: Sequence[Candidates], score: Score, *, turns: bool, worst: int, file: Path
) -> RewardReport:
    """What the scores of all answers say; with ``turns`` a prompt that is a text becomes a turn of the user."""
    scored = _scored(rows, _score_all(rows, score, turns=turns), file)
    by_source: dict[str, list[tuple[Candidates, ScoredAnswers]]] = {}
    for candidates, answers in scored:
        by_source.setdefault(subset_name(candidates.source), []).append((candidates, answers))
    sources = {source: _figures(part) for source, part in by_source.items()}
    scores = benchmark_scores(
        {source: part["accuracy"] for source, part in sources.items()}, _ties(by_source.get(TIES, ()), file)
    )
    headers = ("source", "prompts", "answers", "accuracy", "separated")
    table = [(source or "(no source)", *_cells(part, headers[1:])) for source, part in sources.items()]
    return RewardReport(
        figures=_figures(scored),
        sources=sources,
        rewardbench=scores,
        calibration=(),
        worst=_worst(scored, worst),
        source_table=Table(headers, tuple(table)),
        missing=[subset for subset in SUBSETS if subset not in scores],
        unit="prompts",
        benchmark="RewardBench 2",
    )


def _score_all(rows: Sequence[Candidates], score: Score, *, turns: bool) -> list[ScoreResult]:
    """The result of every answer, the right ones of a prompt before the wrong ones."""
    requests = [_request(row, answer, turns=turns) for row in rows for answer in (*row.right, *row.wrong)]
    parts = [requests[start : start + ANSWERS_PER_CALL] for start in range(0, len(requests), ANSWERS_PER_CALL)]
    return [result for part in progress(parts, f"scored, {ANSWERS_PER_CALL} answers a call") for result in score(part)]


def _request(row: Candidates, answer: str, *, turns: bool) -> ScoreRequest:
    if isinstance(row.prompt, str) and not turns:
        return ScoreRequest(prompt=row.prompt, response=answer)
    before = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    return ScoreRequest(messages=(*before, {"role": "assistant", "content": answer}))


def _scored(rows: Sequence[Candidates], results: Sequence[ScoreResult], file: Path) -> Scored:
    """Every prompt whose answers all have a score."""
    left, dropped, scored = iter(results), Counter[str](), []
    for row in rows:
        own = list(islice(left, len(row.right) + len(row.wrong)))
        scores = [result.raw for result in own if result.raw is not None]
        if len(scores) == len(own):
            right = len(row.right)
            scored.append((row, ScoredAnswers(scores[:right], scores[right:])))
        else:
            dropped[f"{row.where}: {next(str(result.error) for result in own if result.error is not None)}"] += 1
    first = next(iter(dropped), "there were none")
    if not scored:
        raise DataError(f"{file}: no prompt is left to evaluate on ({first}); give other rows, or raise max_tokens")
    if dropped:
        get_logger("data").warning(
            "%s: %d of %d prompts have an answer without a score and do not count, such as %s",
            file, dropped.total(), len(rows), first,
        )  # fmt: skip
    return scored


def _figures(scored: Scored) -> dict[str, float]:
    answers = [one for _, one in scored]
    scores = np.array([score for one in answers for side in one for score in side])
    return {
        "prompts": float(len(answers)),
        "answers": float(len(scores)),
        "accuracy": float(np.mean([one.best_is_right for one in answers])),
        "separated": float(np.mean([one.gap > 0 for one in answers])),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
    }


def _ties(rows: Iterable[tuple[Candidates, ScoredAnswers]], file: Path) -> float | None:
    """The score of the subset Ties; none where there is none, or where its ids do not say which prompts belong together."""
    prompts = {TiesId.parse(candidates.row_id): answers for candidates, answers in rows}
    known = {row: answers for row, answers in prompts.items() if row is not None}
    if len(known) == len(prompts):
        return ties_score(known) if known else None
    get_logger("data").warning(
        "%s: the subset Ties has no score, since it has rows whose id is not ref:NUMBER or tied:NUMBER", file
    )
    return None


def _worst(scored: Scored, count: int) -> Table:
    """The prompts with the widest lead of a wrong answer."""
    leads = sorted((max(answers.right) - max(answers.wrong), place) for place, (_, answers) in enumerate(scored))
    rows = []
    for lead, place in leads[:count]:
        if lead > 0:
            break
        candidates, answers = scored[place]
        sides = ((candidates.right, answers.right), (candidates.wrong, answers.wrong))
        best = [texts[scores.index(max(scores))][:SHOWN_CHARACTERS] for texts, scores in sides]
        prompt = candidates.prompt if isinstance(candidates.prompt, str) else str(candidates.prompt[-1]["content"])
        numbers = (f"{number:.2f}" for number in (lead, max(answers.right), max(answers.wrong)))
        rows.append((*numbers, candidates.source, prompt[-SHOWN_CHARACTERS:], *best))
    headers = ("margin", "right", "wrong", "source", "prompt (its end)", "best right answer", "best wrong answer")
    return Table(headers, tuple(rows))


def _cells(figures: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [f"{figures[name]:.0f}" if name in ("prompts", "answers") else f"{figures[name]:.3f}" for name in names]
