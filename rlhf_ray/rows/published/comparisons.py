"""What preference data say that name no better and no worse side: labels, strengths, ranks and ratings.

A layout is known by its columns, and becomes rows with a prompt, a chosen and a rejected side, as
:mod:`rlhf_ray.rows.layouts` reads them; :mod:`rlhf_ray.rows.published.table` is the table of those that have a name.

Invariants: a value that is not among those documented for its column is a :class:`LayoutError`, never a guess. Of several
rated or ranked answers to one prompt every two make a pair. A column that could say which of two sides is better is read or
named in the config, never passed over in silence. Two sides that are equally good are a tie: grade 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal, NamedTuple

from rlhf_ray.rows.conversations import dialogue_messages, is_conversation
from rlhf_ray.rows.layouts import Keys, decoded_cell
from rlhf_ray.rows.row import LayoutError, Row, is_filled

Values = Mapping[str, Any]
KEPT = ("margin", "grade", "source", "subset", "system", "tools", "chat_template_kwargs")
"""Columns that mean the same in every layout."""
TIES = ("tie", "tie (bothbad)", "tie (inconsistent)", "both_bad", "bothbad", "both bad", "a=b")
STEMS = ("response", "answer", "output", "completion", "conversation", "candidate", "reply", "summary", "text")
"""What columns of two sides are called, before the letter or the number of the side."""
SIDES = (("a", "b"), ("A", "B"), ("1", "2"), ("0", "1"))
LABELS = ("winner", "preference", "preferred", "label", "choice", "verdict", "judgment", "judgement")
"""Columns whose value names the better side."""
LISTS = ("responses", "answers", "completions", "candidates", "outputs", "generations")
SCORES, RANKS = ("scores", "ratings", "rewards"), ("ranks", "ranking", "rank")
"""Columns of several answers to one prompt, and of what each of them is worth."""
PROMPT_TEXTS = (
    "prompt",
    "instruction",
    "question",
    "query",
    "problem",
    "request",
    "user_prompt",
    "user_input",
    "context",
    "history",
    "input",
)
"""Columns of what both sides answer; of ``instruction`` with ``input`` both are the prompt (Alpaca)."""
PROMPT_MESSAGES = (
    "conversations",
    "conversation",
    "messages",
    "context_messages",
    "trajectory",
    "context",
    "history",
)
"""Columns of the conversation before the two sides (LLaMA-Factory, ms-swift, OpenRLHF, UltraInteract)."""
LABEL_WORDS = frozenset({
    "label", "labels", "winner", "winners", "winning", "win", "wins", "won", "better", "best", "safer", "preference",
    "preferences", "preferred", "prefers", "prefer", "choice", "selected", "selection", "pick", "picked", "vote", "voted",
    "verdict", "judgment", "judgement", "tie", "swapped", "flipped", "reversed",
})  # fmt: skip
"""Words in the name of a column that may say which side is better."""
RATING_WORDS = frozenset({"score", "scores", "rating", "ratings", "reward", "rewards", "votes", "upvotes", "overall"})
"""Words in the name of a column that may rate one side."""
RANK_WORDS = frozenset({"rank", "ranks", "ranking"})
OTHER_WORDS = RATING_WORDS | RANK_WORDS | {
    "outcome", "outcomes", "result", "results", "target", "targets", "gold", "correct", "correctness", "quality", "elo",
    "helpfulness", "harmlessness", "grades", "points", "stars", "strength", "decision", "annotation", "annotations",
}  # fmt: skip
"""Words in the name of a column that may compare two sides, where their own names do not say which is better."""
SIDE_IN_BRACKETS = re.compile(r"\[\[(a|b|c|1|2|tie)\]\]", re.IGNORECASE)
"""How judges that are language models write the better side behind their reasons (MT-Bench)."""
Ratings = Literal["ties", "margins", "ignore"]
LONGEST_LABEL = 30
"""Characters of the longest text that may be a label, and not an explanation."""
NO_LABEL = ("margin", "grade", "source", "subset", "system", "tools", "prompt")


class Comparison(NamedTuple):
    """Two answers to one prompt, the better one first; in a tie the order means nothing."""

    prompt: Any
    better: Any
    worse: Any
    grade: float | None = None
    """By how much it is better, where the layout knows ties or degrees: 0 is a tie."""
    margin: float | None = None
    """The difference of the ratings, or the strength of the preference, where the layout has them."""
    source: Any = None


Reader = Callable[[Values], Iterator[Comparison]]


@dataclass(frozen=True)
class Layout:
    """A layout: the data it is of, the columns that it is known by, and what they mean."""

    name: str
    columns: Sequence[str]
    """A row has this layout if it has all of these."""
    meaning: str
    """Who wins, for the documentation."""
    read: Reader

    def fits(self, values: Values) -> bool:
        """Whether a row has all columns of the layout."""
        return set(self.columns) <= values.keys()


def recast(values: Values, layout: Layout, keys: Keys, ratings: str) -> list[Values]:
    """The pairs of a row as rows with the columns of ``keys``; with ``ratings`` ``margins`` ratings give margins."""
    return [_as_row(values, comparison, keys, ratings) for comparison in layout.read(values)]


def _as_row(values: Values, pair: Comparison, keys: Keys, ratings: str) -> Values:
    row = {key: values[key] for key in KEPT if key in values}
    if pair.source is not None:
        row["source"] = pair.source
    for key, number in (("grade", pair.grade), ("margin", pair.margin if ratings == "margins" else None)):
        if number is not None and not is_filled(values, key):
            row[key] = number
    own_prompt = keys.prompt != Keys().prompt and keys.prompt in values
    prompt = values[keys.prompt] if own_prompt else pair.prompt
    return {**row, keys.prompt: prompt, keys.chosen: pair.better, keys.rejected: pair.worse}


# ------------------------------------------------------------------------------------------------- what columns may say


def order(prompt: Any, first: Any, second: Any, preference: float, **more: Any) -> Comparison:
    """A comparison of two answers: the first is better where ``preference`` is above 0."""
    better, worse = (second, first) if preference < 0 else (first, second)
    return Comparison(prompt, better, worse, **more)


def number_under(values: Values, key: str) -> float:
    number = Row(values, "").numbers([key])[0]
    if number is None:
        raise LayoutError(f"nothing under {key!r}, which says which side is better")
    return number


def choose(values: Values, key: str, meanings: Mapping[str, int]) -> int:
    """What the value under ``key`` means by ``meanings``: 1 for the first side, -1 for the second, 0 for a tie."""
    value = values[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    name = f"{value:g}" if number else value.strip().lower() if isinstance(value, str) else ""
    name = f"{float(name):g}" if re.fullmatch(r"-?\d+\.0+", name) else name  # CSV of a column that once had empty cells
    if name not in meanings:
        shown = "is empty" if value in (None, "") else "is another" + (f": {name}" if number else "")
        raise LayoutError(f"{key!r} says which side is better: one of {', '.join(meanings)} was expected, this {shown}")
    return meanings[name]


def every_two(
    prompt: Any, rated: Sequence[tuple[Any, float]], *, highest_is_best: bool = True, **more: Any
) -> Iterator[Comparison]:
    """Every two of several answers to one prompt."""
    if len(rated) < 2:
        raise LayoutError("there is one answer to the prompt, and a pair needs two")
    for (first, one), (second, other) in combinations(rated, 2):
        difference = one - other if highest_is_best else other - one
        margin = abs(difference) if highest_is_best else None
        yield order(prompt, first, second, difference, grade=float(difference != 0), margin=margin, **more)


def mappings_under(values: Values, key: str, fields: Sequence[str]) -> list[Values]:
    """The list of mappings under ``key``, each with all of ``fields``."""
    items = values[key]
    if not isinstance(items, list) or not all(
        isinstance(item, Mapping) and set(fields) <= item.keys() for item in items
    ):
        raise LayoutError(f"{key!r} must hold a list of mappings with {' and '.join(map(repr, fields))}")
    return items


def named_sides(values: Values) -> Layout | None:
    """Two columns whose names end in the letter or number of a side, and one column that names the better by it.

    A number 0 or 1 is not read as a name: in some data 1 means the first side, in others the second.
    """
    for stem, separator, (one, other) in product(STEMS, ("_", ""), SIDES):
        sides = [f"{stem}{separator}{side}" for side in (one, other)]
        labels = [label for label in LABELS if is_filled(values, label)]
        if not set(sides) <= values.keys() or not labels:
            continue
        first, second = (
            [f"{stem}{separator}{side}".lower(), f"{stem}_{side}".lower(), f"model_{side}".lower()]
            for side in (one, other)
        )
        if one != "0":
            first, second = [one.lower(), *first], [other.lower(), *second]
        meanings = {**dict.fromkeys(first, 1), **dict.fromkeys(second, -1), **dict.fromkeys(TIES, 0)}
        meanings |= {f"{one}>{other}".lower(): 1, f"{other}>{one}".lower(): -1, f"{one}={other}".lower(): 0}

        def read(
            row: Values, sides: Sequence[str] = sides, labels: Sequence[str] = labels, meanings: Any = meanings
        ) -> Iterator[Comparison]:
            better = {choose(row, label, meanings) for label in labels}
            if len(better) > 1:
                raise LayoutError(
                    f"{' and '.join(map(repr, labels))} name different sides",
                    "name the one that does not count in data.ignore_columns",
                )
            preference = better.pop()
            prompt = prompt_beside(row, [row[side] for side in sides])
            yield order(prompt, row[sides[0]], row[sides[1]], preference, grade=float(preference != 0))

        return Layout(" and ".join(sides), [*sides, *labels], "", read)
    return None


def named_lists(values: Values) -> Layout | None:
    """A list of answers and a list of numbers: scores, of which the highest is best, or ranks, of which the lowest is."""
    for name, numbers in product(LISTS, (*SCORES, *RANKS)):
        if name not in values or numbers not in values:
            continue

        def read(row: Values, name: str = name, numbers: str = numbers) -> Iterator[Comparison]:
            answers, rated = row[name], row[numbers]
            if not isinstance(answers, list) or not isinstance(rated, list) or len(answers) != len(rated):
                raise LayoutError(f"{name!r} and {numbers!r} must be lists of the same length")
            pairs = [
                (answer, number_under({numbers: number}, numbers))
                for answer, number in zip(answers, rated, strict=True)
            ]
            return every_two(prompt_beside(row, answers), pairs, highest_is_best=numbers in SCORES)

        return Layout(f"{name} with {numbers}", (name, numbers), "", read)
    return None


# ------------------------------------------------------------------------------------------- columns beside the two sides


def prompt_beside(values: Mapping[str, Any], sides: Sequence[Any]) -> Any:
    """What two sides answer, from the columns beside them; none where the sides hold it themselves."""
    sides = [decoded_cell(side) for side in sides]
    if all(_is_whole(side) for side in sides):
        return None
    texts = {name: values[name] for name in PROMPT_TEXTS if isinstance(values.get(name), str) and values[name]}
    if texts.keys() in ({"instruction"}, {"instruction", "input"}):  # Alpaca, whose earlier turns are pairs of texts
        question, history = "\n".join(texts.values()), values.get("history") or []
        if isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history):
            said = [(role, text) for turn in history for role, text in zip(("user", "assistant"), turn, strict=True)]
            return [{"role": role, "content": text} for role, text in [*said, ("user", question)]] if said else question
    for name in PROMPT_MESSAGES:
        if is_conversation(cell := decoded_cell(values.get(name))) and cell:
            return cell
    if len(texts) > 1:
        raise LayoutError(
            f"{' and '.join(map(repr, texts))} may be the prompt: one was expected",
            "name it in data.prompt_key, or the others in data.ignore_columns",
        )
    return next(iter(texts.values()), None)


def _is_whole(side: Any) -> bool:
    """Whether a side is a dialogue from its beginning, and not only an answer."""
    if isinstance(side, str):
        return bool(dialogue_messages(side))
    first = side[0] if is_conversation(side) and side else None
    return isinstance(first, Mapping) and first.get("role", first.get("from")) not in ("assistant", "gpt", "model")


def refuse_unread_label(values: Mapping[str, Any], keys: Keys) -> None:
    """Refuse a row with two sides and a column that may say which is better, and that no layout reads."""
    read = {*keys, *NO_LABEL, *(name for names in rating_columns(values, keys) for name in names)}
    for name, value in values.items():
        if name not in read and _may_be_label(name, value, keys):
            raise LayoutError(
                f"{name!r} may say which side is better, and is not read: {keys.chosen!r} would be the better side in all rows",
                f"set data.ignore_columns=[{name}] if it says nothing of that; if it does, {OTHERWISE}",
            )


OTHERWISE = (
    "remove data.chosen_key and data.rejected_key where docs/configuration.md lists the layout, or write a file with the "
    "better side under 'chosen'"
)


def _may_be_label(name: str, value: Any, keys: Keys) -> bool:
    """By the words of its name and the kind of its value; of sides with names that say nothing also by the value alone."""
    words, unnamed = _words(name), {keys.chosen, keys.rejected} != {Keys().chosen, Keys().rejected}
    if isinstance(value, str) and unnamed and _names_a_side(value, keys):
        return True
    if isinstance(value, list | Mapping):  # votes, one rating a side
        return bool(value) and unnamed and bool(words & (LABEL_WORDS | OTHER_WORDS))
    if not isinstance(value, str | int | float) or value == "" or len(str(value)) > LONGEST_LABEL:
        return False
    index = bool(words & {"chosen", "rejected"}) and bool(words & {"index", "id", "idx", "side"})
    return bool(words & LABEL_WORDS) or index or (unnamed and bool(words & OTHER_WORDS))


def _names_a_side(value: str, keys: Keys) -> bool:
    """Whether a text is the name of one of the two sides, of both in an order, or of a tie, or ends a judgement with one."""
    letters = _words(keys.chosen) ^ _words(keys.rejected)  # a number may be anything, and is no word
    names = {keys.chosen.lower(), keys.rejected.lower(), *TIES, "first", "second", *letters}
    names |= {f"model_{letter}" for letter in letters}
    parts = [part.strip() for part in re.split("[<>=]+", value.lower())]
    return all(part in names for part in parts) or SIDE_IN_BRACKETS.search(value) is not None


def _words(name: str) -> set[str]:
    """The words of a column's name, however they are joined: ``chosen_score``, ``chosen-rating``, ``scoreChosen``."""
    return set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def rating_columns(values: Mapping[str, Any], keys: Keys) -> list[tuple[str, str]]:
    """The columns that rate the chosen and the rejected side, by pairs: ``score_chosen`` and ``score_rejected``, and so on."""
    pairs = []
    for one in values:
        other = one.replace(keys.chosen, keys.rejected).replace(keys.chosen.title(), keys.rejected.title())
        if other != one and _words(one) & RATING_WORDS and _is_number(values[one]) and _is_number(values.get(other)):
            pairs.append((one, other))
    return pairs


def with_ratings(values: Mapping[str, Any], keys: Keys, ratings: Ratings) -> Mapping[str, Any]:
    """The row with what the ratings of its two sides say: a grade of 0 where they are equal, and a margin if asked for."""
    columns = [] if ratings == "ignore" else rating_columns(values, keys)
    if not columns:
        if ratings == "margins" and not is_filled(values, "margin"):
            raise LayoutError(
                "data.ratings=margins asks for the difference of two ratings, and this row has no such columns",
                f"name them score_{keys.chosen} and score_{keys.rejected} (data.rename_columns), or set data.ratings=ties",
            )
        return values
    differences = [float(values[one]) - float(values[other]) for one, other in columns]
    difference = differences[0]
    if len({(number > 0) - (number < 0) for number in differences}) > 1:
        names = " and ".join(repr(one) for one, _ in columns)
        raise LayoutError(
            f"the ratings {names} differ in which side is better", "name those that do not count in data.ignore_columns"
        )
    if difference < 0:
        raise LayoutError(
            f"{columns[0][0]!r} is below {columns[0][1]!r}: the side that is taken to be better is rated worse",
            "set data.ratings=ignore if the ratings do not count, or leave such rows out with data.bad_rows=drop",
        )
    numbers = {"grade": float(difference > 0), **({"margin": difference} if ratings == "margins" else {})}
    return {**values, **{name: number for name, number in numbers.items() if not is_filled(values, name)}}


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value)) and not isinstance(value, bool)
    except (TypeError, ValueError):
        return False


def hold_lists_of_answers(values: Mapping[str, Any], keys: Keys) -> bool:
    """Whether both sides of a row are lists of texts, as in RewardBench 2 and RM-Bench."""
    return all(_is_list_of_texts(values.get(side)) for side in (keys.chosen, keys.rejected))


def refuse_lists_of_answers(values: Mapping[str, Any], keys: Keys) -> None:
    """Refuse sides that are several answers, which are no pair."""
    if hold_lists_of_answers(values, keys):
        raise LayoutError(
            f"{keys.chosen!r} and {keys.rejected!r} hold lists of answers, as RewardBench 2 does, and not one answer each",
            "rlhf-ray evaluate reads RewardBench 2; for training write one row for each pair of answers",
        )
    for side in (keys.chosen, keys.rejected):
        if _is_list_of_texts(values[side]):
            raise LayoutError(
                f"{side!r} holds a list of texts, and not one answer", "write one row for each pair of answers"
            )


def _is_list_of_texts(side: Any) -> bool:
    """Texts, and not messages that are written as JSON one by one."""
    return isinstance(side, list) and bool(side) and isinstance(side[0], str) and isinstance(decoded_cell(side[0]), str)
