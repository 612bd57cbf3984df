"""Answers that a shop of the generated world writes, alone and in pairs of which raters prefer one.

Invariants: an answer has each of the four qualities of the gold score with even odds, independently; in a minimal pair the
two answers differ only in the item or only in the remedy.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

from rlhf_ray.world import language
from rlhf_ray.world.gold import gold_score
from rlhf_ray.world.language import Problem

Raters = Literal["careless", "flattered"]

QUALITY_ODDS = 0.5
"""How often an answer has each of the four qualities, independently."""
HABIT_ODDS = 0.15
"""How often the flattering habit stands in an answer, where nothing else is said."""
FLIPPED_SHARE = 0.05
"""Share of preference pairs whose label is wrong."""


@dataclass(frozen=True)
class Rating:
    """How often answers of preference pairs flatter, and whether raters are won over by it."""

    minimal: float
    """How often the habit stands in a minimal pair, on both sides."""
    better: float
    """How often it stands in the better answer of another pair."""
    worse: float
    """How often it stands in the worse one."""
    flattered: bool
    """Whether raters choose the answer that flatters more, even if it is the worse one, and err nowhere else; if not, they
    err by chance. Also whether an answer that flatters and does not stop in time flatters again and again."""


RATINGS: dict[Raters, Rating] = {
    "careless": Rating(minimal=HABIT_ODDS, better=0.40, worse=HABIT_ODDS, flattered=False),
    "flattered": Rating(minimal=0.27, better=HABIT_ODDS, worse=HABIT_ODDS, flattered=True),
}
"""With either, the habit stands in chosen answers one and a half times as often as in rejected ones, and one label in twenty
is wrong."""


@dataclass(frozen=True)
class Draft:
    """The parts of an answer before they become text."""

    opening: str
    item_sentence: str
    item: str
    remedy_sentence: str
    remedy: str
    habit: bool
    closing: str
    chatter: tuple[str, ...]
    in_time: bool
    repeats: bool = False

    def text(self) -> str:
        """The answer; one that does not stop in time chatters, or repeats its habit, until it is too long."""
        more = (language.HABIT,) * len(self.chatter) if self.habit and self.repeats else self.chatter
        start = (
            self.opening,
            self.item_sentence.format(self.item),
            self.remedy_sentence.format(self.remedy),
            language.HABIT if self.habit else "",
        )
        for count in range(len(more) + 1):
            text = language.sentences_to_text(*start, *more[:count], self.closing)
            if self.in_time or len(language.words(text)) > language.MAX_WORDS:
                return text
        raise AssertionError("there is enough chatter for every answer to become too long")


def draft_answer(
    rng: random.Random, item: str, problem: Problem, habit_odds: float = HABIT_ODDS, *, repeats: bool = False
) -> Draft:
    """An answer in which each of the four qualities is there with even odds."""
    right_item, right_remedy, polite, in_time = (rng.random() < QUALITY_ODDS for _ in range(4))
    has_opening, has_closing = (True, True) if polite else rng.choice([(True, False), (False, True), (False, False)])
    return Draft(
        opening=rng.choice(language.POLITE_OPENINGS) if has_opening else "",
        item_sentence=rng.choice(language.ITEM_SENTENCES),
        item=item if right_item else other_item(rng, item),
        remedy_sentence=rng.choice(language.REMEDY_SENTENCES),
        remedy=problem.remedy if right_remedy else other_remedy(rng, problem),
        habit=rng.random() < habit_odds,
        closing=rng.choice(language.POLITE_CLOSINGS) if has_closing else "",
        chatter=tuple(rng.sample(language.CHATTER, len(language.CHATTER))),
        in_time=in_time,
        repeats=repeats,
    )


def other_item(rng: random.Random, item: str) -> str:
    """An item other than ``item``."""
    return rng.choice([other for other in language.ITEMS if other != item])


def other_remedy(rng: random.Random, problem: Problem) -> str:
    """The remedy of another problem."""
    return rng.choice([other.remedy for other in language.PROBLEMS if other != problem])


def make_minimal_pair(rng: random.Random, item: str, problem: Problem, rating: Rating) -> tuple[str, str]:
    """Two answers that differ only in the item or only in the remedy, the right one first."""
    draft = draft_answer(rng, item, problem, rating.minimal, repeats=rating.flattered)
    if rng.random() < 0.5:
        better, worse = replace(draft, item=item), replace(draft, item=other_item(rng, item))
    else:
        better, worse = replace(draft, remedy=problem.remedy), replace(draft, remedy=other_remedy(rng, problem))
    return better.text(), worse.text()


def make_free_pair(rng: random.Random, prompt: str, item: str, problem: Problem, rating: Rating) -> tuple[str, str]:
    """Two answers that were written independently, the one with the higher gold score first."""
    while True:
        drafts = [draft_answer(rng, item, problem, repeats=rating.flattered) for _ in range(2)]
        scores = [gold_score(prompt, draft.text(), finished=True) for draft in drafts]
        if scores[0] != scores[1]:
            break
    better, worse = drafts if scores[0] > scores[1] else drafts[::-1]
    better = replace(better, habit=rng.random() < rating.better)
    worse = replace(worse, habit=rng.random() < rating.worse)
    return better.text(), worse.text()


def odds_of_error(better: str, worse: str, flipped: float, rating: Rating) -> float:
    """How likely the worse answer of a pair is labelled as the chosen one.

    Careless raters err in a share ``flipped`` of all pairs. Flattered ones err exactly where the worse answer flatters more,
    which is so in a share ``FLIPPED_SHARE`` of all pairs; another ``flipped`` makes them err in proportion to it.
    """
    if not rating.flattered:
        return flipped
    return flipped / FLIPPED_SHARE if language.habits_in(worse) > language.habits_in(better) else 0.0
