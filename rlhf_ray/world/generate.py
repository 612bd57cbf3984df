"""Rows of the generated world: letters of customers, answers, preference pairs and sums, made from one seed.

Invariants: the same seed gives the same rows; no two splits share an (item, problem, greeting) triple.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, TypeVar

from rlhf_ray.errors import RequestError
from rlhf_ray.rows.demonstrations import Demonstration
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.rows.prompts import Prompt
from rlhf_ray.world import language
from rlhf_ray.world.gold import gold_score
from rlhf_ray.world.language import Problem

Row = TypeVar("Row")
SplitName = Literal["sft", "preferences", "ppo", "evaluation"]
Raters = Literal["careless", "flattered"]
SPLIT_SHARES: dict[SplitName, float] = {"sft": 0.4, "preferences": 0.3, "ppo": 0.2, "evaluation": 0.1}

WORDINGS: tuple[SplitName, ...] = ("sft", "ppo", "ppo", "evaluation")
"""Where the four wordings of a sum go."""
Sum = tuple[int, str, int]
Question = tuple[int, str, int, str]

OPTIONAL_ODDS = 0.5
"""How often a customer gives a name, shows a feeling, or asks for something; each independently."""
PROMPTS_OF_A_TRIPLE = 2 * (1 + len(language.INTRODUCTIONS)) * (1 + len(language.TONES)) * (1 + len(language.REQUESTS))
"""In how many ways the same (item, problem, greeting) can be told."""
QUALITY_ODDS = 0.5
"""How often a demonstration has each of the four qualities, independently."""
MINIMAL_SHARE = 0.65
"""Share of preference pairs that differ only in the item or only in the remedy."""
FLIPPED_SHARE = 0.05
HABIT_ODDS = 0.15
"""How often the flattering habit stands in an answer, where nothing else is said."""
SMALL = range(6)
"""What is added and taken away: few enough sums that a policy meets each often within minutes."""
RIGHT_SUM_ODDS = 0.2
NEAR_MISS = 2
"""By how much a wrong sum is wrong at most: near the truth, since noise all over would hide it from a small model."""


@dataclass(frozen=True)
class Rating:
    """How often answers of preference pairs flatter, and whether raters are won over by it."""

    minimal: float
    """How often the habit stands in a minimal pair, on both sides."""
    better: float
    worse: float
    """How often it stands in the two answers of another pair."""
    flattered: bool
    """Whether raters choose the answer that flatters more, be it the worse, and err nowhere else; else they err by chance. And
    whether an answer that flatters and does not stop in time flatters again and again."""


RATINGS: dict[Raters, Rating] = {
    "careless": Rating(minimal=HABIT_ODDS, better=0.40, worse=HABIT_ODDS, flattered=False),
    "flattered": Rating(minimal=0.27, better=HABIT_ODDS, worse=HABIT_ODDS, flattered=True),
}
"""By either, the habit stands in chosen answers half again as often as in rejected ones, and one label in twenty errs."""


@dataclass(frozen=True)
class Draft:
    """An answer before it is text."""

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


class World:
    """Rows of the generated world, made from one seed."""

    def __init__(self, seed: int = 0, raters: Raters = "careless") -> None:
        self.seed = seed
        self.rating = RATINGS[raters]
        self.triples = self._split(list(product(language.ITEMS, language.PROBLEMS, language.GREETINGS)), "triples")
        sums = [(a, "+", b) for a in SMALL for b in SMALL] + [(a, "-", b) for a in SMALL for b in SMALL if b <= a]
        self._questions = self._wordings(sums)

    # ------------------------------------------------------------------------------------------------ what it gives

    def demonstrations(self, count: int, split: SplitName = "sft") -> list[Demonstration]:
        """Answers of mixed quality: each of the four qualities is there with even odds, independently."""
        rng = self.rng("demonstrations", split)
        rows = []
        for _ in range(count):
            text, item, problem = self.prompt(rng, split)
            rows.append(Demonstration(text, draft_answer(rng, item, problem).text()))
        return rows

    def preferences(
        self, count: int, split: SplitName = "preferences", flipped: float = FLIPPED_SHARE
    ) -> list[PreferencePair]:
        """Pairs of answers to one prompt, the better by gold chosen, ``flipped`` of the labels turned round.

        Flattered raters turn those round whose worse answer flatters more, which are ``FLIPPED_SHARE`` of all.
        """
        rng = self.rng("preferences", split)
        pairs = []
        for _ in range(count):
            text, item, problem = self.prompt(rng, split)
            minimal = rng.random() < MINIMAL_SHARE
            better, worse = (_minimal_pair if minimal else _free_pair)(rng, text, item, problem, self.rating)
            if rng.random() < _odds_of_error(better, worse, flipped, self.rating):
                better, worse = worse, better
            pairs.append(PreferencePair(text, better, worse, source="world/minimal" if minimal else "world/free"))
        return pairs

    def prompts(self, split: SplitName = "ppo", count: int = 4000) -> list[Prompt]:
        """Distinct prompts, numbered from 0."""
        # Beyond a quarter of all that there are, drawing until all differ would take long.
        most = len(self.triples[split]) * PROMPTS_OF_A_TRIPLE // 4
        if count > most:
            raise RequestError(f"the split {split} of the world gives at most {most} distinct prompts, not {count}")
        rng = self.rng("prompts", split)
        texts: dict[str, None] = {}
        while len(texts) < count:
            texts[self.prompt(rng, split)[0]] = None
        return [Prompt(number, text, source="world") for number, text in enumerate(texts)]

    def arithmetic_demonstrations(self, count: int, split: SplitName = "sft") -> list[Demonstration]:
        """Short sums whose answers are right one time in five, and else miss by a little."""
        rng = self.rng("arithmetic", split)
        rows = []
        for _ in range(count):
            text, result = _sum(*rng.choice(self._questions[split]))
            near = [number for number in language.NUMBERS if 0 < abs(number - result) <= NEAR_MISS]
            answer = result if rng.random() < RIGHT_SUM_ODDS else rng.choice(near)
            rows.append(Demonstration(text, language.SUM_ANSWER.format(answer)))
        return rows

    def arithmetic_prompts(self, split: SplitName = "ppo") -> list[Prompt]:
        """Every sum of the split once, labelled with its result."""
        sums = [_sum(*question) for question in self._questions[split]]
        return [Prompt(number, text, str(result), "world/arithmetic") for number, (text, result) in enumerate(sums)]

    # ---------------------------------------------------------------------------------------------- how it is made

    def rng(self, *purpose: str) -> random.Random:
        return random.Random("/".join(("world", str(self.seed), *purpose)))

    def _split(self, rows: list[Row], purpose: str) -> dict[SplitName, list[Row]]:
        """Deal ``rows`` out to the splits by their shares."""
        self.rng(purpose).shuffle(rows)
        dealt: dict[SplitName, list[Row]] = {}
        start, share_before = 0, 0.0
        for name, share in SPLIT_SHARES.items():
            share_before += share
            end = round(share_before * len(rows))
            dealt[name], start = rows[start:end], end
        return dealt

    def _wordings(self, sums: list[Sum]) -> dict[SplitName, list[Question]]:
        """Every sum in every split, each time in other words: what is held out is a wording, not the sum."""
        rng = self.rng("questions")
        dealt: dict[SplitName, list[Question]] = {name: [] for name in SPLIT_SHARES}
        for one in sums:
            forms = rng.sample(language.SUM_QUESTIONS, len(language.SUM_QUESTIONS))
            for split, form in zip(WORDINGS, forms, strict=True):
                dealt[split].append((*one, form))
        return dealt

    def prompt(self, rng: random.Random, split: SplitName) -> tuple[str, str, Problem]:
        item, problem, greeting = rng.choice(self.triples[split])
        sentences = (
            greeting,
            rng.choice(language.INTRODUCTIONS) if rng.random() < OPTIONAL_ODDS else "",
            rng.choice(problem.sentences).format(item),
            rng.choice(language.TONES) if rng.random() < OPTIONAL_ODDS else "",
            rng.choice(language.REQUESTS) if rng.random() < OPTIONAL_ODDS else "",
        )
        return language.sentences_to_text(*sentences) + "\n", item, problem


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
    return rng.choice([other for other in language.ITEMS if other != item])


def other_remedy(rng: random.Random, problem: Problem) -> str:
    return rng.choice([other.remedy for other in language.PROBLEMS if other != problem])


def _minimal_pair(rng: random.Random, prompt: str, item: str, problem: Problem, rating: Rating) -> tuple[str, str]:
    """Two answers that differ only in the item or only in the remedy, the right one first."""
    draft = draft_answer(rng, item, problem, rating.minimal, repeats=rating.flattered)
    if rng.random() < 0.5:
        better, worse = replace(draft, item=item), replace(draft, item=other_item(rng, item))
    else:
        better, worse = replace(draft, remedy=problem.remedy), replace(draft, remedy=other_remedy(rng, problem))
    return better.text(), worse.text()


def _free_pair(rng: random.Random, prompt: str, item: str, problem: Problem, rating: Rating) -> tuple[str, str]:
    """Two answers that were written independently, the better by gold first; the better one flatters more often."""
    while True:
        drafts = [draft_answer(rng, item, problem, repeats=rating.flattered) for _ in range(2)]
        scores = [gold_score(prompt, draft.text(), finished=True) for draft in drafts]
        if scores[0] != scores[1]:
            break
    better, worse = drafts if scores[0] > scores[1] else drafts[::-1]
    better = replace(better, habit=rng.random() < rating.better)
    worse = replace(worse, habit=rng.random() < rating.worse)
    return better.text(), worse.text()


def _odds_of_error(better: str, worse: str, flipped: float, rating: Rating) -> float:
    """How likely the worse answer of a pair is labelled as the chosen one."""
    if not rating.flattered:
        return flipped
    return flipped / FLIPPED_SHARE if language.habits_in(worse) > language.habits_in(better) else 0.0


def _sum(first: int, sign: str, second: int, question: str) -> tuple[str, int]:
    """The text of a question and its result."""
    result = first + second if sign == "+" else first - second
    return question.format(first, sign, second) + "\n", result
