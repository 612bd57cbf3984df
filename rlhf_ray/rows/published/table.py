"""The published preference data whose layouts are known: what their columns mean. ``LAYOUTS`` is the table of all.

Invariants: a row is read only where its columns say for certain which side is better, by the documentation of the data; data
that hold no pairs are refused by what they are. docs/configuration.md shows the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_ray.rows.published.comparisons import (
    TIES,
    Comparison,
    Layout,
    Reader,
    Values,
    choose,
    every_two,
    mappings_under,
    named_lists,
    named_sides,
    number_under,
    order,
)
from rlhf_ray.rows.row import LayoutError, is_filled

ANSWERS = "rated answers"
"""Where :func:`join_rated` keeps the rows that it joined."""
SINGLE = "these are single answers that are marked as good or bad (KTO), and not pairs of answers"
STEPWISE = (
    "these are steps of an answer that are marked as right or wrong (process supervision), and not pairs of answers"
)
NO_PAIRS = "pairs are needed: two answers to each prompt, under data.chosen_key and data.rejected_key"
OR_LABELS = f"{NO_PAIRS}; or learn from the labels in a job of kind dpo, with loss.name=kto"


def find_layout(values: Values) -> Layout | None:
    """The layout of a row without a chosen and a rejected side; none where it has no known one."""
    known, refused = (next((row for row in table if row.fits(values)), None) for table in (LAYOUTS, REFUSED))
    return named_lists(values) or known or named_sides(values) or refused


def are_rated_together(one: Any, other: Any) -> bool:
    """Whether two rows are rated answers to the same prompt, as HelpSteer writes them one after the other."""
    return all(_is_rated(values) for values in (one, other)) and one["prompt"] == other["prompt"]


def join_rated(rows: Sequence[Any]) -> Any:
    """Rows that are rated together as one; any other row as it is."""
    return {**rows[0], ANSWERS: rows} if _is_rated(rows[0]) else rows[0]


def _is_rated(values: Any) -> bool:
    return isinstance(values, Mapping) and RATED.fits(values) and "chosen" not in values


def _pku_saferlhf(values: Values) -> Iterator[Comparison]:
    label = "better_response_id" if "better_response_id" in values else "safer_response_id"
    better = choose(values, label, {"0": 1, "1": -1})
    yield order(values["prompt"], values["response_0"], values["response_1"], better)


def _shp(values: Values) -> Iterator[Comparison]:
    better = choose(values, "labels", {"1": 1, "0": -1})
    source = values.get("domain")
    yield order(values["history"], values["human_ref_A"], values["human_ref_B"], better, source=source)


def _strength_of_second(label: str, prompt: str, first: str, second: str, source: str = "") -> Reader:
    """Strengths from -3, where the first side is much better, to 3, where the second is."""

    def read(values: Values) -> Iterator[Comparison]:
        strength = number_under(values, label)
        if strength not in range(-3, 4):
            raise LayoutError(f"{label!r} must hold a whole number from -3 to 3, this is {strength:g}")
        size, domain = abs(strength), values.get(source)
        yield order(values[prompt], values[first], values[second], -strength, grade=size, margin=size, source=domain)

    return read


def _webgpt(values: Values) -> Iterator[Comparison]:
    question = values["question"]
    if isinstance(question, Mapping):
        question = question.get("full_text")
    rated = [(values[f"answer_{side}"], number_under(values, f"score_{side}")) for side in (0, 1)]
    return every_two(question, rated)


def _summarize_from_feedback(values: Values) -> Iterator[Comparison]:
    """The prompt is the one that the paper's models were given (Stiennon et al. 2020)."""
    first, second = (summary["text"] for summary in _two(mappings_under(values, "summaries", ["text"]), "summaries"))
    better, about = choose(values, "choice", {"0": 1, "1": -1}), values["info"]
    if not isinstance(about, Mapping) or not all(is_filled(about, key) for key in ("subreddit", "title", "post")):
        raise LayoutError("'info' must hold 'subreddit', 'title' and 'post', of which the prompt is made")
    prompt = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:".format(**about)
    yield order(prompt, first, second, better)


def _two(items: Sequence[Any], key: str) -> Sequence[Any]:
    if len(items) != 2:
        raise LayoutError(f"{key!r} must hold two answers, these are {len(items)}")
    return items


def _arena_one_hot(values: Values) -> Iterator[Comparison]:
    """``winner_model_a``, ``winner_model_b`` and ``winner_tie``; the cells are lists of turns, also where written as JSON."""
    columns = ("winner_model_a", "winner_model_b", "winner_tie")
    marks = [number_under(values, column) for column in columns]
    if sorted(marks) != [0, 0, 1]:
        raise LayoutError(f"one of {', '.join(map(repr, columns))} must be 1 and the others 0")
    preference = marks[0] - marks[1]
    turns, first, second = (_texts(values, key) for key in ("prompt", "response_a", "response_b"))
    sides = []
    for key, answers in (("response_a", first), ("response_b", second)):
        if len(answers) != len(turns):
            raise LayoutError(f"{key!r} holds {len(answers)} answers to {len(turns)} turns of 'prompt'")
        pairs = [(("user", asked), ("assistant", answer)) for asked, answer in zip(turns, answers, strict=True)]
        sides.append([{"role": role, "content": text} for pair in pairs for role, text in pair])
    yield order(None, sides[0], sides[1], preference, grade=float(preference != 0))


def _texts(values: Values, key: str) -> list[Any]:
    """A list, also one written as JSON, of a text a turn; one text that is no list is one turn."""
    value = values[key]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise LayoutError(f"{key!r} must hold a list of texts, and this text is not JSON") from error
    return value if isinstance(value, list) else [value]


def _arena_conversations(values: Values) -> Iterator[Comparison]:
    """The judged turn may be an earlier one than the last (MT-Bench): what comes after it was not judged."""
    better = choose(values, "winner", {"model_a": 1, "model_b": -1, **dict.fromkeys(TIES, 0)})
    sides = [values["conversation_a"], values["conversation_b"]]
    if is_filled(values, "turn") and all(isinstance(side, list) for side in sides):
        turn = number_under(values, "turn")  # a table may write it as 1.0, and CSV as text
        if turn < 1 or not turn.is_integer():
            raise LayoutError(f"'turn' is the number of the judged turn, from 1, this is {turn:g}")
        sides = [side[: 2 * int(turn)] for side in sides]
    yield order(None, sides[0], sides[1], better, grade=float(better != 0))


def _nectar(values: Values) -> Iterator[Comparison]:
    answers = [
        (answer["answer"], number_under(answer, "rank"))
        for answer in mappings_under(values, "answers", ["answer", "rank"])
    ]
    return every_two(values["prompt"], answers, highest_is_best=False)


def _ultrafeedback(values: Values) -> Iterator[Comparison]:
    completions = mappings_under(values, "completions", ["response"])
    rating = "overall_score"
    if not all(is_filled(completion, rating) for completion in completions):
        rating = "fine-grained_score"
    rated = [(completion["response"], number_under(completion, rating)) for completion in completions]
    return every_two(values["instruction"], rated)


def _helpsteer(values: Values) -> Iterator[Comparison]:
    rated = [(row["response"], number_under(row, "helpfulness")) for row in values[ANSWERS]]
    return every_two(values["prompt"], rated)


def _stack_exchange(values: Values) -> Iterator[Comparison]:
    yield Comparison(values["question"], values["response_j"], values["response_k"])


def _rejected_answer(values: Values) -> Iterator[Comparison]:
    """ms-swift: the conversation with the better answer, and the worse answer or the whole conversation with it."""
    messages = values["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise LayoutError("'messages' must hold a list of messages that ends with the better answer")
    if is_filled(values, "rejected_messages"):
        yield Comparison(None, messages, values["rejected_messages"])
    else:
        worse = values["rejected_response"]
        yield Comparison(messages[:-1], messages[-1:], [{"role": "assistant", "content": worse}])


def _refused(problem: str, way_out: str) -> Reader:
    def read(values: Values) -> Iterator[Comparison]:
        raise LayoutError(problem, way_out)

    return read


RATED = Layout(
    "HelpSteer, HelpSteer2",
    ("prompt", "response", "helpfulness"),
    "every two of the rows one after the other with the same `prompt`; the higher `helpfulness` is better",
    _helpsteer,
)
LAYOUTS: Sequence[Layout] = (
    Layout(
        "PKU-SafeRLHF",
        ("prompt", "response_0", "response_1", "better_response_id"),
        "`better_response_id` is the number of the more helpful side; without that column `safer_response_id` counts",
        _pku_saferlhf,
    ),
    Layout(
        "PKU-SafeRLHF, safety",
        ("prompt", "response_0", "response_1", "safer_response_id"),
        "`safer_response_id` is the number of the safer side",
        _pku_saferlhf,
    ),
    Layout(
        "SHP",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        "`labels` 1: A is better, 0: B is; `domain` is the source",
        _shp,
    ),
    Layout(
        "HelpSteer2-preference",
        ("prompt", "response_1", "response_2", "preference_strength"),
        "`preference_strength` below 0: 1 is better, above 0: 2 is; its size is the grade, 0 a tie",
        _strength_of_second("preference_strength", "prompt", "response_1", "response_2"),
    ),
    Layout(
        "HelpSteer3",
        ("context", "response1", "response2", "overall_preference"),
        "`overall_preference` below 0: 1 is better, above 0: 2 is; its size is the grade, 0 a tie; `domain` is the source",
        _strength_of_second("overall_preference", "context", "response1", "response2", "domain"),
    ),
    Layout(
        "WebGPT comparisons",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        "the higher score is better; equal scores are a tie",
        _webgpt,
    ),
    Layout(
        "summarize-from-feedback",
        ("info", "summaries", "choice"),
        "`choice` is the number of the better summary; subreddit, title and post are the prompt",
        _summarize_from_feedback,
    ),
    Layout(
        "LMSYS arena, 55k",
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
        "the column that is 1 names the winner, or a tie; cells are lists of turns",
        _arena_one_hot,
    ),
    Layout(
        "LMSYS arena, 33k, 100k and 140k; MT-Bench",
        ("conversation_a", "conversation_b", "winner"),
        "`winner` is `model_a`, `model_b` or a tie (`tie`, `both_bad`, ...); with `turn` the conversation ends there",
        _arena_conversations,
    ),
    Layout("Nectar", ("prompt", "answers"), "every two answers; the lower `rank` is better", _nectar),
    Layout(
        "UltraFeedback",
        ("instruction", "completions"),
        "every two completions; the higher `overall_score` is better, or `fine-grained_score` where that is missing",
        _ultrafeedback,
    ),
    RATED,
    Layout(
        "Stack Exchange, paired", ("question", "response_j", "response_k"), "`response_j` is better", _stack_exchange
    ),
    Layout("ms-swift", ("messages", "rejected_response"), "`messages` ends with the better answer", _rejected_answer),
    Layout("ms-swift, whole", ("messages", "rejected_messages"), "`messages` is the better one", _rejected_answer),
)
REFUSED: Sequence[Layout] = (
    Layout("KTO", ("prompt", "completion", "label"), SINGLE, _refused(SINGLE, OR_LABELS)),
    Layout("KTO with responses", ("prompt", "response", "label"), SINGLE, _refused(SINGLE, OR_LABELS)),
    Layout("KTO with messages", ("messages", "label"), SINGLE, _refused(SINGLE, NO_PAIRS)),
    Layout("KTO with a tag", ("kto_tag",), SINGLE, _refused(SINGLE, NO_PAIRS)),
    Layout("stepwise", ("prompt", "completions", "labels"), STEPWISE, _refused(STEPWISE, NO_PAIRS)),
)
