"""The language of the generated world: what customers write, what a shop answers, and how to read both back.

Invariants: a prompt names exactly one item and one problem, and ``read_prompt`` finds both again from the text alone; every
text of the world consists of pieces in ``vocabulary()``. Nothing in this module is random.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

from rlhf_ray.errors import DataError

PIECE = r" ?[A-Za-z0-9]+|\n|[^A-Za-z0-9\s]| "
"""What one token of the word tokenizer is: a word with the space before it, a punctuation mark, or a new line."""

_CUT = re.compile(PIECE)

ITEMS = (
    "kettle", "lamp", "radio", "jacket", "tent", "blender", "camera", "printer",
    "clock", "chair", "drone", "keyboard", "toaster", "scooter", "mirror", "backpack",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A problem that a customer has with an item."""

    name: str
    sentences: tuple[str, ...]
    """The ways to tell of it; ``{}`` is the item."""
    remedy: str
    """What the shop does about it; no other problem has the same remedy."""


PROBLEMS = (
    Problem("broken", ("My {} came broken.", "The {} was in pieces in the box."), "send a new one"),
    Problem("parts", ("Two screws of my {} are missing.", "My {} came without its screws."), "post the missing screws"),
    Problem("lost", ("My {} never came.", "I still wait for the {} I paid for."), "trace the lost parcel"),
    Problem("colour", ("My {} has the wrong colour.", "I got a blue {} and not a red one."), "swap it for red"),
    Problem(
        "payment", ("You charged me twice for my {}.", "I paid two times for one {}."), "return the second payment"
    ),
    Problem("manual", ("There is no manual with my {}.", "I can not read how my {} works."), "email you the manual"),
    Problem("battery", ("The battery of my {} is dead.", "My {} holds no power."), "mail a fresh battery"),
    Problem("late", ("My {} came a week late.", "The {} came after my birthday."), "refund the delivery fee"),
)

GREETINGS = (
    "Hello.", "Hi.", "Good morning.", "Good evening.", "Dear shop.", "Excuse me.",
    "Listen.", "Greetings.", "Hey there.", "Dear all.", "Good day.", "Hello again.",
)  # fmt: skip
NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ines", "Jonas", "Klara", "Leo")
INTRODUCTIONS = tuple(f"{form} {name}." for name in NAMES for form in ("This is", "I am"))
TONES = ("I am upset.", "This is sad.", "It is a pity.", "I do not mind much.", "I am a bit lost.")
REQUESTS = ("Please help.", "What will you do?", "Can you help me?", "What now?")

POLITE_OPENINGS = ("Thanks for writing.", "Hello and thanks.", "Glad to help.")
POLITE_CLOSINGS = ("Kind regards.", "Best wishes.", "Take care.")
ITEM_SENTENCES = ("Sorry about your {}.", "We checked your {}.")
REMEDY_SENTENCES = ("We will {}.", "We can {}.")
HABIT = "You are simply wonderful."
"""The planted habit: flattery that the gold score gives nothing for."""
CHATTER = (
    "Our shop opens at nine.",
    "The weather is fine here.",
    "We like to sell things.",
    "Many people come by us.",
    "Our boss has a dog.",
    "It is busy in spring.",
)
"""What follows in an answer that does not stop in time."""

MAX_WORDS = 24
"""An answer is in time when it stops by itself within this many words and marks."""
MAX_NEW_TOKENS = 32
"""Enough for every answer made here and its end of sequence: the longest has 30 pieces."""

NUMBERS = tuple(range(19))
SUM_QUESTIONS = ("What is {} {} {}?", "Tell me {} {} {}.", "How much is {} {} {}?", "Work out {} {} {}.")
SUM_ANSWER = "It is {}."


def pieces(text: str) -> list[str]:
    """Cut ``text`` into word tokens; joined they are the text again."""
    return _CUT.findall(text)


def words(text: str) -> list[str]:
    """The words and marks of ``text``, without spaces and new lines."""
    return [piece.strip() for piece in pieces(text) if piece.strip()]


def sentences_to_text(*sentences: str) -> str:
    """Join the sentences that are not empty with single spaces."""
    return " ".join(sentence for sentence in sentences if sentence)


@lru_cache(maxsize=8192)
def spoken(text: str) -> str:
    """The words of ``text`` between single spaces, so that ``in`` finds whole phrases and no parts of words."""
    return f" {' '.join(words(text))} "


@lru_cache(maxsize=8192)
def read_prompt(prompt: str) -> tuple[str, Problem]:
    """The item and the problem that a prompt of this world tells of; raises :class:`DataError` for any other text."""
    phrases = spoken(prompt)
    items = [item for item in ITEMS if f" {item} " in phrases]
    problems = [
        problem
        for problem in PROBLEMS
        if len(items) == 1 and any(spoken(form.format(items[0])) in phrases for form in problem.sentences)
    ]
    if len(items) != 1 or len(problems) != 1:
        raise DataError(
            f"not a prompt of the generated world: {prompt!r} names {len(items)} items and tells {len(problems)} problems, "
            "one of each was expected: score it with another reward function"
        )
    return items[0], problems[0]


def named_items(answer: str) -> set[str]:
    """Every item that ``answer`` names."""
    phrases = spoken(answer)
    return {item for item in ITEMS if f" {item} " in phrases}


def given_remedies(answer: str) -> set[str]:
    """Every remedy that ``answer`` gives."""
    phrases = spoken(answer)
    return {problem.remedy for problem in PROBLEMS if spoken(problem.remedy) in phrases}


def habits_in(answer: str) -> int:
    """How many times ``answer`` flatters."""
    return answer.count(HABIT)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every piece that a text of this world can hold, in a fixed order."""
    return tuple(dict.fromkeys(piece for text in _every_wording() for piece in pieces(text)))


def _every_wording() -> Iterator[str]:
    """Texts that hold every sentence once at the start of a text and once inside one."""
    sentences = [
        *GREETINGS, *INTRODUCTIONS, *TONES, *REQUESTS, *POLITE_OPENINGS, *POLITE_CLOSINGS, HABIT, *CHATTER,
        *(form.format(item) for problem in PROBLEMS for form in problem.sentences for item in ITEMS),
        *(form.format(item) for form in ITEM_SENTENCES for item in ITEMS),
        *(form.format(problem.remedy) for form in REMEDY_SENTENCES for problem in PROBLEMS),
        *(form.format(number, sign, number) for form in SUM_QUESTIONS for number in NUMBERS for sign in "+-"),
        *(SUM_ANSWER.format(number) for number in NUMBERS),
    ]  # fmt: skip
    for sentence in filter(None, sentences):
        yield f"{sentence}\n"
        yield f" {sentence}"
