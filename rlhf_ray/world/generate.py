"""Rows of the generated world: letters of customers, answers, preference pairs and sums, made from one seed.

Invariants: the same seed gives the same rows; no two splits share an (item, problem, greeting) triple.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Literal, TypeVar

from rlhf_ray.errors import RequestError
from rlhf_ray.rows.demonstrations import Demonstration
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.rows.prompts import Prompt
from rlhf_ray.world import language
from rlhf_ray.world.answers import (
    FLIPPED_SHARE,
    RATINGS,
    Raters,
    draft_answer,
    make_free_pair,
    make_minimal_pair,
    odds_of_error,
)
from rlhf_ray.world.language import Problem

Row = TypeVar("Row")
SplitName = Literal["sft", "preferences", "ppo", "evaluation"]
SPLIT_SHARES: dict[SplitName, float] = {"sft": 0.4, "preferences": 0.3, "ppo": 0.2, "evaluation": 0.1}

WORDINGS: tuple[SplitName, ...] = ("sft", "ppo", "ppo", "evaluation")
"""The splits that the four wordings of a sum go to."""
Sum = tuple[int, str, int]
"""First number, sign, second number."""
Question = tuple[int, str, int, str]
"""A sum, and the wording that asks for it."""

OPTIONAL_ODDS = 0.5
"""How often a customer gives a name, shows a feeling, or asks for something; each independently."""
PROMPTS_OF_A_TRIPLE = 2 * (1 + len(language.INTRODUCTIONS)) * (1 + len(language.TONES)) * (1 + len(language.REQUESTS))
"""In how many ways the same (item, problem, greeting) can be told: each problem has 2 sentences, and each optional sentence
may also be missing."""
MINIMAL_SHARE = 0.65
"""Share of preference pairs that differ only in the item or only in the remedy."""
SMALL = range(6)
"""The numbers that are added and subtracted: so few that a policy meets each sum often within minutes."""
RIGHT_SUM_ODDS = 0.2
NEAR_MISS = 2
"""By how much a wrong sum is wrong at most: near the truth, since noise all over would hide it from a small model."""


class World:
    """Rows of the generated world, made from one seed."""

    def __init__(self, seed: int = 0, raters: Raters = "careless") -> None:
        """``raters`` label the preference pairs."""
        self.seed = seed
        self.rating = RATINGS[raters]
        self.triples = self._deal_out(list(product(language.ITEMS, language.PROBLEMS, language.GREETINGS)), "triples")
        sums = [(a, "+", b) for a in SMALL for b in SMALL] + [(a, "-", b) for a in SMALL for b in SMALL if b <= a]
        self._questions = self._deal_out_wordings(sums)

    def demonstrations(self, count: int, split: SplitName = "sft") -> list[Demonstration]:
        """Answers of mixed quality: each of the four qualities is there with even odds, independently."""
        rng = self.rng("demonstrations", split)
        rows = []
        for _ in range(count):
            text, item, problem = self.make_prompt(rng, split)
            rows.append(Demonstration(text, draft_answer(rng, item, problem).text()))
        return rows

    def preferences(
        self, count: int, split: SplitName = "preferences", flipped: float = FLIPPED_SHARE
    ) -> list[PreferencePair]:
        """Pairs of answers to one prompt, the better by gold chosen, but for a share ``flipped`` of wrong labels.

        With flattered raters the wrong labels are those of pairs whose worse answer flatters more.
        """
        rng = self.rng("preferences", split)
        pairs = []
        for _ in range(count):
            text, item, problem = self.make_prompt(rng, split)
            minimal = rng.random() < MINIMAL_SHARE
            if minimal:
                better, worse = make_minimal_pair(rng, item, problem, self.rating)
            else:
                better, worse = make_free_pair(rng, text, item, problem, self.rating)
            if rng.random() < odds_of_error(better, worse, flipped, self.rating):
                better, worse = worse, better
            pairs.append(PreferencePair(text, better, worse, source="world/minimal" if minimal else "world/free"))
        return pairs

    def prompts(self, split: SplitName = "ppo", count: int = 4000) -> list[Prompt]:
        """Distinct prompts, numbered from 0; raises :class:`RequestError` where the split does not give so many."""
        # Prompts are drawn until enough differ, which would take long for more than a quarter of all that there are.
        most = len(self.triples[split]) * PROMPTS_OF_A_TRIPLE // 4
        if count > most:
            raise RequestError(f"the split {split} of the world gives at most {most} distinct prompts, not {count}")
        rng = self.rng("prompts", split)
        texts: dict[str, None] = {}
        while len(texts) < count:
            texts[self.make_prompt(rng, split)[0]] = None
        return [Prompt(number, text, source="world") for number, text in enumerate(texts)]

    def arithmetic_demonstrations(self, count: int, split: SplitName = "sft") -> list[Demonstration]:
        """Short sums whose answers are right one time in five, and else miss by a little."""
        rng = self.rng("arithmetic", split)
        rows = []
        for _ in range(count):
            text, result = _ask(*rng.choice(self._questions[split]))
            near = [number for number in language.NUMBERS if 0 < abs(number - result) <= NEAR_MISS]
            answer = result if rng.random() < RIGHT_SUM_ODDS else rng.choice(near)
            rows.append(Demonstration(text, language.SUM_ANSWER.format(answer)))
        return rows

    def arithmetic_prompts(self, split: SplitName = "ppo") -> list[Prompt]:
        """Every sum of the split once, labelled with its result."""
        sums = [_ask(*question) for question in self._questions[split]]
        return [Prompt(number, text, str(result), "world/arithmetic") for number, (text, result) in enumerate(sums)]

    def make_prompt(self, rng: random.Random, split: SplitName) -> tuple[str, str, Problem]:
        """A customer's letter, and the item and the problem that it tells of."""
        item, problem, greeting = rng.choice(self.triples[split])
        sentences = (
            greeting,
            rng.choice(language.INTRODUCTIONS) if rng.random() < OPTIONAL_ODDS else "",
            rng.choice(problem.sentences).format(item),
            rng.choice(language.TONES) if rng.random() < OPTIONAL_ODDS else "",
            rng.choice(language.REQUESTS) if rng.random() < OPTIONAL_ODDS else "",
        )
        return language.sentences_to_text(*sentences) + "\n", item, problem

    def rng(self, *purpose: str) -> random.Random:
        """Random numbers for one purpose, so that making more rows of one kind changes none of another."""
        return random.Random("/".join(("world", str(self.seed), *purpose)))

    def _deal_out(self, rows: list[Row], purpose: str) -> dict[SplitName, list[Row]]:
        """Deal shuffled ``rows`` out to the splits by their shares."""
        self.rng(purpose).shuffle(rows)
        rows_by_split: dict[SplitName, list[Row]] = {}
        start, share_before = 0, 0.0
        for name, share in SPLIT_SHARES.items():
            share_before += share
            end = round(share_before * len(rows))
            rows_by_split[name], start = rows[start:end], end
        return rows_by_split

    def _deal_out_wordings(self, sums: list[Sum]) -> dict[SplitName, list[Question]]:
        """Every sum in every split, each time in other words: what is held out is a wording, not the sum."""
        rng = self.rng("questions")
        questions: dict[SplitName, list[Question]] = {name: [] for name in SPLIT_SHARES}
        for numbers_and_sign in sums:
            forms = rng.sample(language.SUM_QUESTIONS, len(language.SUM_QUESTIONS))
            for split, form in zip(WORDINGS, forms, strict=True):
                questions[split].append((*numbers_and_sign, form))
        return questions


def _ask(first: int, sign: str, second: int, wording: str) -> tuple[str, int]:
    """The text of a question and its result."""
    result = first + second if sign == "+" else first - second
    return wording.format(first, sign, second) + "\n", result
