"""What a reward model of the generated world learned: each quality of an answer by itself, beside what it is worth.

Invariants: the two answers of a probe are the same but for one quality; ``gold`` is what the gold score gives for having it,
so that a habit (worth nothing) and the rule stand in one table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev

from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.world import language
from rlhf_ray.world.answers import Draft, draft_answer, other_item, other_remedy
from rlhf_ray.world.generate import World
from rlhf_ray.world.gold import gold_score


@dataclass(frozen=True)
class Probe:
    """A prompt, an answer with a quality and the same without it, and what gold says of having it."""

    prompt: str
    having: str
    lacking: str
    gold: float


Probes = Mapping[str, Sequence[Probe]]
"""Probes by the name of their quality."""


@dataclass(frozen=True)
class LearnedQuality:
    """What one quality of an answer does to its score."""

    name: str
    gold: float
    """What the gold score gives for it."""
    shift: float
    """By how much it moves a score on average, in standard deviations of all scores."""
    preferred: float
    """How often the answer that has it scores higher; ties count one half."""


PROBES_OF_A_QUALITY = 200
QUALITY_HEADERS = ("an answer that", "gold", "score, in deviations", "preferred")


def make_probes(world: World, count: int = PROBES_OF_A_QUALITY) -> dict[str, list[Probe]]:
    """``count`` probes of each quality, over held-out prompts; their answers have all other qualities of the gold score."""
    rng = world.rng("probes", "evaluation")
    probes: dict[str, list[Probe]] = {}
    for _ in range(count):
        prompt, item, problem = world.make_prompt(rng, "evaluation")
        draft = draft_answer(rng, item, problem)
        opening, closing = rng.choice(language.POLITE_OPENINGS), rng.choice(language.POLITE_CLOSINGS)
        good = replace(
            draft, item=item, remedy=problem.remedy, opening=opening, closing=closing, habit=False, in_time=True
        )
        lacking = {
            "names the right item": replace(good, item=other_item(rng, item)),
            "gives the right remedy": replace(good, remedy=other_remedy(rng, problem)),
            "is polite": replace(good, opening="", closing=""),
            "stops in time": replace(good, in_time=False),
        }
        for name, without in lacking.items():
            probes.setdefault(name, []).append(_probe(prompt, good, without))
        probes.setdefault("flatters", []).append(_probe(prompt, replace(good, habit=True), good))
    return probes


def probe_pairs(probes: Probes) -> list[PreferencePair]:
    """All probes as pairs to be scored, one quality after the other; the answer with the quality is the chosen one."""
    return [PreferencePair(probe.prompt, probe.having, probe.lacking) for group in probes.values() for probe in group]


def learned_qualities(
    probes: Probes,
    having: Sequence[float],
    lacking: Sequence[float],
    win_rate: Callable[[Sequence[float], Sequence[float]], float],
) -> list[LearnedQuality]:
    """What the scores of :func:`probe_pairs` say about each quality; ``win_rate`` says how often the first side is higher."""
    deviation = pstdev([*having, *lacking]) or 1.0  # a model that gives one score to everything shifts nothing
    qualities, start = [], 0
    for name, group in probes.items():
        with_it, without_it = (scores[start : start + len(group)] for scores in (having, lacking))
        shift = (fmean(with_it) - fmean(without_it)) / deviation
        qualities.append(LearnedQuality(name, group[0].gold, shift, win_rate(with_it, without_it)))
        start += len(group)
    return qualities


def quality_figures(qualities: Sequence[LearnedQuality]) -> dict[str, float]:
    """The shifts by the names under which an evaluation logs them."""
    return {f"habit/{quality.name.replace(' ', '_')}": quality.shift for quality in qualities}


def quality_rows(qualities: Sequence[LearnedQuality]) -> list[tuple[str, ...]]:
    """Rows of a table below ``QUALITY_HEADERS``."""
    return [
        (quality.name, f"{quality.gold:+.1f}", f"{quality.shift:+.2f}", f"{quality.preferred:.1%}")
        for quality in qualities
    ]


def _probe(prompt: str, having: Draft, lacking: Draft) -> Probe:
    gold = [gold_score(prompt, draft.text(), finished=True) for draft in (having, lacking)]
    return Probe(prompt, having.text(), lacking.text(), round(gold[0] - gold[1], 6))
