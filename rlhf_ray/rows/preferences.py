"""Preference pairs: two answers to one prompt, the better one first.

Invariants: the pairs of a row, mostly one, come in the order of the file. Where a row does not name its prompt, the prompt
followed by each answer gives back the two sides of the row. Prompt and answers are all texts or all lists of messages. Either
all pairs of a file have a margin, a finite number, or none has; the same holds for grades.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from rlhf_ray.rows.layouts import Keys, PairParts, read_pair, read_variables
from rlhf_ray.rows.published.comparisons import (
    Ratings,
    prompt_beside,
    recast,
    refuse_lists_of_answers,
    refuse_unread_label,
    with_ratings,
)
from rlhf_ray.rows.published.table import are_rated_together, find_layout, join_rated
from rlhf_ray.rows.read import Expanded, PlainReader, read_file
from rlhf_ray.rows.row import KeySets, LayoutError, Row, is_filled
from rlhf_ray.rows.sources import AnySource

PAIR_NUMBERS = ("margin", "grade")
"""Optional columns: one number a pair, which some losses read."""
ANSWER_BEGINS = "\n\nAssistant:"
"""What stands before each answer in a dialogue of Anthropic's HH data (hh-rlhf)."""
SOURCE_KEYS = ("source", "subset", "data_source")
"""Columns that name where a row comes from (``subset`` is RewardBench's, ``data_source`` verl's); the first that is there
counts."""

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PreferencePair:
    """A prompt, the better and the worse answer: three texts, or three lists of messages."""

    prompt: str | Messages
    chosen: str | Messages
    """The better answer, without the prompt."""
    rejected: str | Messages
    """The worse answer, without the prompt."""
    margin: float | None = None
    """By how much the score of the better answer should be higher, for losses with a margin."""
    source: str = ""
    """Where the pair comes from, for tables by source; empty where its row does not say."""
    grade: float | None = None
    """By how much the chosen side is better: 0 is a tie."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Functions that a conversation may call."""
    where: str = field(default="", compare=False)
    """File and line."""
    template_variables: Mapping[str, Any] | None = None
    """Variables that the chat template is given for this pair alone."""

    @property
    def texts(self) -> tuple[str, str, str] | None:
        """Prompt, chosen and rejected answer where they are texts."""
        sides = (self.prompt, self.chosen, self.rejected)
        return cast("tuple[str, str, str]", sides) if isinstance(self.prompt, str) else None

    @property
    def is_conversation(self) -> bool:
        """Whether prompt and answers are lists of messages."""
        return not isinstance(self.prompt, str)

    @property
    def conversations(self) -> tuple[Messages, Messages, Messages] | None:
        """Prompt, chosen and rejected answer where they are lists of messages."""
        sides = (self.prompt, self.chosen, self.rejected)
        return None if isinstance(self.prompt, str) else cast("tuple[Messages, Messages, Messages]", sides)


@dataclass(frozen=True)
class PreferenceReader(PlainReader):
    """Reads pairs in any layout of :mod:`rlhf_ray.rows.layouts` and :mod:`rlhf_ray.rows.published.table`.

    With ``turns`` texts become messages.
    """

    keys: Keys = Keys()  # noqa: RUF009 (a NamedTuple cannot change)
    turns: bool = False
    ratings: Ratings = "ties"
    """What ratings of the two sides say besides: that equal ones are a tie, also the margin, or nothing."""
    prompt_in_sides: bool | None = None
    """Whether texts beside a prompt begin with it; none: that is told from the row, or refused."""

    @property
    def needs(self) -> KeySets:
        """The two sides; the prompt may be what both begin with."""
        return [(self.keys.chosen, self.keys.rejected)]

    @property
    def uniform(self) -> Sequence[str]:
        """The prompt and the numbers."""
        return (self.keys.prompt, *PAIR_NUMBERS)

    def belong_together(self, one: Any, other: Any) -> bool:
        """Rated answers to one prompt make pairs together."""
        return are_rated_together(one, other)

    def expand(self, rows: Sequence[Any]) -> Expanded:
        """The pairs of a row, each with a prompt, a chosen and a rejected side."""
        values = join_rated(rows)
        if not isinstance(values, Mapping):
            return Expanded(rows)
        if not {self.keys.chosen, self.keys.rejected} <= values.keys():
            layout = find_layout(values)
            return (
                Expanded(rows)
                if layout is None
                else Expanded(recast(values, layout, self.keys, self.ratings), layout.name)
            )
        refuse_lists_of_answers(values, self.keys)
        refuse_unread_label(values, self.keys)
        values = with_ratings(values, self.keys, self.ratings)
        if not is_filled(values, self.keys.prompt):
            prompt = prompt_beside(values, [values[self.keys.chosen], values[self.keys.rejected]])
            values = values if prompt is None else {**values, self.keys.prompt: prompt}
        return Expanded([values])

    def read(self, row: Row) -> PreferencePair:
        """The pair of one row."""
        parts = read_pair(row.values, self.keys, turns=self.turns, prompt_in_sides=self.prompt_in_sides)
        margin, grade = row.numbers(PAIR_NUMBERS)
        prompt, chosen, rejected = parts.prompt or find_prompt(row, self.keys, parts), parts.chosen, parts.rejected
        if not parts.prompt:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        source, variables = read_source(row), read_variables(row.values)
        return PreferencePair(prompt, chosen, rejected, margin, source, grade, parts.tools, row.where, variables)


def read_preferences(
    source: AnySource,
    prompt_key: str = "prompt",
    chosen_key: str = "chosen",
    rejected_key: str = "rejected",
    *,
    turns: bool = False,
    max_rows: int | None = None,
) -> list[PreferencePair]:
    """Every pair of a data file or data set; where its rows have no ``prompt_key``, the prompt is what both sides begin with.

    Columns ``margin``, ``grade``, ``system``, ``tools`` and ``chat_template_kwargs`` are read where they are there, and as the
    source the first of ``SOURCE_KEYS``. With ``turns`` texts become messages.
    """
    reader = PreferenceReader(Keys(prompt_key, chosen_key, rejected_key), turns)
    return list(read_file(source, reader, max_rows=max_rows))


def read_source(row: Row) -> str:
    """Where a row comes from, for tables by source; empty where it does not say. A list of names is one name."""
    key = next((key for key in SOURCE_KEYS if key in row), None)
    if key is None:
        return ""
    names = row.values[key]
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return ", ".join(names)
    return row.short_text(key) or ""


def find_prompt(row: Row, keys: Keys, parts: PairParts) -> str | Messages:
    """The prompt of a row whose two sides begin with it; :class:`LayoutError` where they begin differently."""
    chosen, rejected = parts.chosen, parts.rejected
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt: str | Messages = shared_prompt(chosen, rejected)
    else:  # read_pair refuses a text beside a conversation
        prompt = shared_messages(cast("Messages", chosen), cast("Messages", rejected))
    if not prompt:
        names = ", ".join(map(repr, row.values))
        raise LayoutError(
            f"{keys.chosen!r} and {keys.rejected!r} begin differently, so they do not hold the prompt",
            f"set data.prompt_key to the key that does; its keys are {names}",
        )
    return prompt


def shared_messages(chosen: Messages, rejected: Messages) -> Messages:
    """The messages that both conversations begin with; at least one message of each is left as its answer."""
    end = 0
    while end < min(len(chosen), len(rejected)) - 1 and chosen[end] == rejected[end]:
        end += 1
    return chosen[:end]


def shared_prompt(chosen: str, rejected: str) -> str:
    """What both texts begin with: in a dialogue up to the last ``Assistant:`` in it, else up to the end of a word."""
    end = _shared_length(chosen, rejected)
    dialogue = chosen.rfind(ANSWER_BEGINS, 0, end)
    if dialogue >= 0:
        return chosen[: dialogue + len(ANSWER_BEGINS)]
    while _cuts_a_word(chosen, end) or _cuts_a_word(rejected, end):
        end -= 1
    return chosen[:end]


def _shared_length(one: str, other: str) -> int:
    """How many characters both texts begin with, by bisection: it compares slices, which is fast for long texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _cuts_a_word(text: str, end: int) -> bool:
    """Whether ``end`` lies inside a word of ``text``; the space before a word belongs to it, as in most tokenizers."""
    if end in (0, len(text)) or text[end].isspace():
        return False
    return text[end - 1] in " \t" or (text[end - 1].isalnum() and text[end].isalnum())
