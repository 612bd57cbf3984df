"""Encoding rows as token ids.

Invariants:

- A row is encoded whole, or dropped and counted; of a conversation that is learned the answers that fit are kept. Only the
  prompt of a pair may be cut, at its beginning and equally in both sides, where the config asks for it; an end is never cut.
- An answer ends in exactly one end token: a text in the tokenizer's end of sequence, a conversation in the one that its
  template ends an answer with (:mod:`rlhf_ray.data.chat`).
- A prompt that is text has the same ids wherever it stands: alone, before a demonstration, and before both sides of a pair.
- What is learned of a conversation is what a policy would sample: an answer's ids after the very ids that it is sampled after.
  Where each answer stands is found by comparing ids, never by lengths.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

from rlhf_ray.console import progress
from rlhf_ray.data.answer_ids import Ids, encode_text_answers, shared_length, tokenize_prompts
from rlhf_ray.data.chat import ChatFormat, Conversation
from rlhf_ray.data.chat_template import Messages, RefusedConversation
from rlhf_ray.data.template_losses import answer_losses, prompt_losses
from rlhf_ray.rows.demonstrations import Demonstration
from rlhf_ray.rows.judged import JudgedAnswer
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.rows.prompts import Prompt

Row = TypeVar("Row")
Encoded = TypeVar("Encoded")
Example = TypeVar("Example")
Drops = Counter[str]
"""How many rows were dropped, by reason."""


class EncodedPair(NamedTuple):
    """Token ids of both sides of a pair."""

    chosen: Ids
    """The prompt and the better answer."""
    rejected: Ids
    """The prompt and the worse answer."""
    prompt_length: int
    """Tokens of the prompt that both sides begin with."""
    cut: int = 0
    """Tokens that the prompt has lost at its beginning."""
    losses: tuple[str, ...] | None = None
    """What the chat template leaves out of a conversation (:mod:`rlhf_ray.data.template_losses`); none of texts."""
    chosen_answer: int = 0
    """Tokens of the better answer at the end of its side: of its last message, where it has several."""
    rejected_answer: int = 0
    """The same of the worse answer."""


class EncodedAnswer(NamedTuple):
    """Token ids of a prompt and of one answer to it; ``cut`` and ``losses`` as of :class:`EncodedPair`."""

    prompt: Ids
    answer: Ids
    cut: int
    losses: tuple[str, ...] | None


ROWS_AT_ONCE = 256
"""Enough for the tokenizer to be fast; few enough to need little memory besides the ids, and to show progress."""
TOO_LONG, EQUAL, EMPTY = "too long", "with two equal sides", "without a token"
"""Reasons to drop a row, as they are logged."""


def encode_in_parts(rows: Sequence[Row], what: str, encode: Callable[[Sequence[Row]], Encoded]) -> Iterator[Encoded]:
    """``encode`` each stretch of ``ROWS_AT_ONCE`` rows, in their order; ``what`` names the rows in the progress bar.

    The tokenizers release Python's lock while they work, so the stretches are encoded by several threads.
    """
    parts = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
    if len(parts) < 2:
        yield from map(encode, parts)
        return
    yield encode(parts[0])  # alone: the first call settles the tokenizer's own switches
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        rest = threads.map(encode, parts[1:])
        yield from progress(rest, f"encoding {len(rows)} {what}, {ROWS_AT_ONCE} at a time", total=len(parts) - 1)


def encode_prompts(chat: ChatFormat, rows: Sequence[Prompt], max_tokens: int, drops: Drops) -> list[Ids | None]:
    """The ids of each prompt; none for one that is dropped, which ``drops`` counts."""
    encoded = encode_in_parts(rows, "prompts", lambda part: _encode_prompt_part(chat, part))
    return [_keep_or_drop(ids, _length_problem(ids, max_tokens), drops) for part in encoded for ids in part]


def render_prompt(chat: ChatFormat, row: Prompt) -> str:
    """The text that answers are sampled to; a conversation as the tokenizer's chat template writes it, up to the answer."""
    if row.messages is None:
        return row.text
    return chat.prompt_text(Conversation(row.messages, row.tools, row.template_variables, row.where))


def _encode_prompt_part(chat: ChatFormat, rows: Sequence[Prompt]) -> list[Ids]:
    """A text begins as the tokenizer begins a text; to a conversation nothing is added that its template did not write."""
    texts = [index for index, row in enumerate(rows) if row.messages is None]
    talks = [index for index, row in enumerate(rows) if row.messages is not None]
    ids = dict(zip(texts, tokenize_prompts(chat.tokenizer, [rows[index].text for index in texts]), strict=True))
    rendered = [render_prompt(chat, rows[index]) for index in talks]
    ids |= zip(talks, chat.encode_prompts(rendered), strict=True)
    return [ids[index] for index in range(len(rows))]


class EncodedDemonstration(NamedTuple):
    """The sequences that a row is learned in: one, or one for each answer where the template allows no other."""

    sequences: list[tuple[Ids, list[bool]]] = []  # noqa: RUF012 (it is never changed)
    """Of each its ids, and which of them are learned; empty where the row is dropped."""
    too_long: int = 0
    """Answers that are left out because they end behind the longest sequence, of a row that has others."""
    losses: tuple[str, ...] | None = None
    """What the chat template leaves out of a conversation; none of texts."""


def encode_demonstrations(
    chat: ChatFormat, rows: Sequence[Demonstration], max_tokens: int, drops: Drops, *, every_token: bool = False
) -> list[EncodedDemonstration]:
    """What is learned of each row, or of one that is dropped nothing, which ``drops`` counts.

    Learned are the answers with their end tokens; with ``every_token`` what stands before them too.
    """
    encoded = encode_in_parts(rows, "demonstrations", lambda part: _encode_demonstration_part(chat, part))
    results = []
    for answers, losses in chain.from_iterable(encoded):
        fitting = [(prompt, answer) for prompt, answer in answers if len(prompt) + len(answer) <= max_tokens]
        problem = EMPTY if not answers[0][0] else "" if fitting else TOO_LONG
        if problem:
            drops[problem] += 1
            results.append(EncodedDemonstration())
        else:
            sequences = join_learned(fitting, every_token=every_token)
            results.append(EncodedDemonstration(sequences, len(answers) - len(fitting), losses))
    return results


def join_learned(answers: Sequence[tuple[Ids, Ids]], *, every_token: bool = False) -> list[tuple[Ids, list[bool]]]:
    """The sequences in which answers of one conversation are learned, each answer in one of them.

    ``answers`` are the ids before each answer, as a policy would be given them, and those of the answer. An answer is learned
    in the sequence of the one before where the ids before it begin with that whole sequence. Else, as where a template drops
    earlier thinking, it gets a sequence of its own, in which nothing is learned again.
    """
    sequences: list[tuple[Ids, list[bool]]] = []
    for prompt, answer in answers:
        before, learned = sequences[-1] if sequences else ([], [])
        if prompt[: len(before)] == before:
            del sequences[-1:]
        else:
            before = before[: shared_length(before, prompt)]
            learned = [False] * len(before)
        mask = [*learned, *[every_token] * (len(prompt) - len(before)), *[True] * len(answer)]
        mask[0] = False  # nothing stands before the first token that would predict it
        sequences.append((prompt + answer, mask))
    return sequences


def _encode_demonstration_part(
    chat: ChatFormat, rows: Sequence[Demonstration]
) -> list[tuple[list[tuple[Ids, Ids]], tuple[str, ...] | None]]:
    """Of each row the ids before each of its answers and those of the answer, and what its template leaves out."""
    texts = [row for row in rows if row.messages is None]
    plain = encode_text_answers(chat.tokenizer, [row.prompt for row in texts], [[row.answer] for row in texts])
    rendered = [render_demonstration(chat, row) for row in rows if row.messages is not None]
    pairs = [pair for row in rendered for pair in row.answers]
    answers = chat.encode_answers([before for before, _ in pairs], [[answer] for _, answer in pairs])
    of_texts, of_talks, talks = iter(plain), iter(answers), iter(rendered)
    results: list[tuple[list[tuple[Ids, Ids]], tuple[str, ...] | None]] = []
    for row in rows:
        if row.messages is None:
            prompt, (answer,) = next(of_texts)
            results.append(([(prompt, answer)], None))
        else:
            talk = next(talks)
            results.append(([(before, one) for before, (one,) in islice(of_talks, len(talk.answers))], talk.losses))
    return results


class RenderedDemonstration(NamedTuple):
    """The texts of a conversation."""

    answers: list[tuple[str, str]]
    """What stands before each answer that is learned, as a policy is given it, and that answer."""
    losses: tuple[str, ...]
    """What the template leaves out, by kinds."""


def render_demonstration(chat: ChatFormat, row: Demonstration) -> RenderedDemonstration:
    """The answers of a conversation that are learned, as the chat template writes what comes before them."""
    assert row.messages is not None, "texts are not rendered"
    answers, losses = [], list[str]()
    for place in row.learned:
        whole = Conversation(row.messages[: place + 1], row.tools, row.template_variables, row.where)
        question = whole._replace(messages=row.messages[:place])
        before = chat.prompt_text(question)
        answer = chat.answer_text(whole, before)
        answers.append((before, answer))
        losses += [*prompt_losses(question, before), *answer_losses(row.messages[place], before, answer)]
    return RenderedDemonstration(answers, tuple(dict.fromkeys(losses)))


def encode_pairs(
    chat: ChatFormat, rows: Sequence[PreferencePair], max_tokens: int, drops: Drops, *, cut_prompt: bool = False
) -> list[EncodedPair | None]:
    """The ids of each pair; none for one that is dropped, which ``drops`` counts."""

    def encode(part: Sequence[PreferencePair]) -> list[EncodedPair | str]:
        return encode_pair_part(chat, part, max_tokens, cut_prompt=cut_prompt)

    outcomes = list(chain.from_iterable(encode_in_parts(rows, "pairs", encode)))
    drops.update(outcome for outcome in outcomes if isinstance(outcome, str))
    return [None if isinstance(outcome, str) else outcome for outcome in outcomes]


def encode_pair_part(
    chat: ChatFormat, rows: Sequence[PreferencePair], max_tokens: int, *, cut_prompt: bool = False
) -> list[EncodedPair | str]:
    """The ids of each pair, or why it is dropped; all at once, so of few pairs."""
    start = chat.tokenizer.bos_token_id
    return [
        EQUAL if pair.chosen == pair.rejected else _fit(pair, max_tokens, start, cut_prompt=cut_prompt)
        for pair in _encode_sides(chat, rows)
    ]


def encode_judged_answers(
    chat: ChatFormat, rows: Sequence[JudgedAnswer], max_tokens: int, drops: Drops, *, cut_prompt: bool = False
) -> list[EncodedAnswer | None]:
    """Each prompt with the answer to it; none for one that is dropped, which ``drops`` counts."""

    def encode(part: Sequence[JudgedAnswer]) -> list[EncodedPair | str]:
        start = chat.tokenizer.bos_token_id
        whole = _encode_sides(chat, [row.as_pair() for row in part])
        return [_fit(pair, max_tokens, start, cut_prompt=cut_prompt) for pair in whole]

    results: list[EncodedAnswer | None] = []
    for outcome in chain.from_iterable(encode_in_parts(rows, "answers", encode)):
        if isinstance(outcome, str):
            drops[outcome] += 1
            results.append(None)
        else:
            side, begin = outcome.chosen, len(outcome.chosen) - outcome.chosen_answer
            results.append(EncodedAnswer(side[:begin], side[begin:], outcome.cut, outcome.losses))
    return results


def _encode_sides(chat: ChatFormat, rows: Sequence[PreferencePair]) -> list[EncodedPair]:
    texts = iter(_encode_texts(chat.tokenizer, [row.texts for row in rows if row.texts is not None]))
    talks = iter(_encode_conversations(chat, [(row, sides) for row in rows if (sides := row.conversations)]))
    return [next(talks if row.texts is None else texts) for row in rows]


def _fit(pair: EncodedPair, max_tokens: int, start: int | None, *, cut_prompt: bool) -> EncodedPair | str:
    """The pair within the limit, or why it is dropped; ``start`` is the token that begins a text, which is not cut off."""
    excess = max(len(pair.chosen), len(pair.rejected)) - max_tokens
    if excess <= 0:
        return pair
    starts = int(
        pair.prompt_length > 0 and pair.chosen[0] == start
    )  # 1 where the prompt begins with that token, else 0
    if not cut_prompt or pair.prompt_length - starts <= excess:
        return TOO_LONG
    chosen, rejected = (side[:starts] + side[starts + excess :] for side in pair[:2])
    return pair._replace(chosen=chosen, rejected=rejected, prompt_length=pair.prompt_length - excess, cut=excess)


def _encode_texts(tokenizer: Any, rows: Sequence[tuple[str, str, str]]) -> list[EncodedPair]:
    encoded = encode_text_answers(tokenizer, [prompt for prompt, _, _ in rows], [answers for _, *answers in rows])
    return [
        EncodedPair(
            prompt + chosen, prompt + rejected, len(prompt), chosen_answer=len(chosen), rejected_answer=len(rejected)
        )
        for prompt, (chosen, rejected) in encoded
    ]


def _encode_conversations(
    chat: ChatFormat, rows: Sequence[tuple[PreferencePair, tuple[Messages, Messages, Messages]]]
) -> list[EncodedPair]:
    rendered = [_render_pair(chat, row, sides) for row, sides in rows]
    prompts = [before for pair in rendered for before, _ in pair.sides]
    answers = [[answer] for pair in rendered for _, answer in pair.sides]
    answered = chat.encode_answers(prompts, answers)
    encoded = [before + answer for before, (answer,) in answered]
    ends = [len(answer) for _, (answer,) in answered]
    shared = chat.encode_prompts([pair.shared for pair in rendered])
    losses = [pair.losses for pair in rendered]
    pairs = zip(encoded[0::2], encoded[1::2], shared, losses, ends[0::2], ends[1::2], strict=True)
    return [
        EncodedPair(chosen, rejected, _prompt_length(chosen, rejected, prompt), 0, lost, *answers)
        for chosen, rejected, prompt, lost, *answers in pairs
    ]


class _RenderedPair(NamedTuple):
    """The texts of a pair of conversations."""

    shared: str
    """The prompt of both."""
    sides: list[tuple[str, str]]
    """Of each side what stands before its last answer, and that answer."""
    losses: tuple[str, ...]
    """What the template leaves out, by kinds."""


def _render_pair(
    chat: ChatFormat, row: PreferencePair, conversations: tuple[Messages, Messages, Messages]
) -> _RenderedPair:
    prompt, *sides = conversations
    common = Conversation(prompt, row.tools, row.template_variables, row.where)
    shared, rendered = chat.prompt_text(common), []
    losses: list[str] = []
    for side in sides:
        whole = common._replace(messages=[*prompt, *side])
        question = whole._replace(messages=whole.messages[:-1])
        before = shared if len(side) == 1 else chat.prompt_text(question)
        answer = chat.answer_text(whole, before)
        rendered.append((before, answer))
        losses += [*prompt_losses(question, before), *answer_losses(side[-1], before, answer)]
    return _RenderedPair(shared, rendered, tuple(dict.fromkeys(losses)))


def without_refused_pairs(chat: ChatFormat, rows: Iterable[PreferencePair], refused: list[str]) -> list[PreferencePair]:
    """The rows whose conversations the chat template writes; what it says of the others is added to ``refused``."""
    return _without_refused(rows, refused, lambda row: row.conversations and _render_pair(chat, row, row.conversations))


def without_refused_answers(chat: ChatFormat, rows: Iterable[JudgedAnswer], refused: list[str]) -> list[JudgedAnswer]:
    """The same of single answers with labels."""

    def write(row: JudgedAnswer) -> object:
        pair = row.as_pair()
        return pair.conversations and _render_pair(chat, pair, pair.conversations)

    return _without_refused(rows, refused, write)


def without_refused_prompts(chat: ChatFormat, rows: Iterable[Prompt], refused: list[str]) -> list[Prompt]:
    """The same of prompts."""
    return _without_refused(rows, refused, lambda row: render_prompt(chat, row))


def without_refused_demonstrations(
    chat: ChatFormat, rows: Iterable[Demonstration], refused: list[str]
) -> list[Demonstration]:
    """The same of demonstrations."""
    return _without_refused(rows, refused, lambda row: row.messages and render_demonstration(chat, row))


def _without_refused(rows: Iterable[Row], refused: list[str], write: Callable[[Row], object]) -> list[Row]:
    kept = []
    for row in rows:
        try:
            write(row)
        except RefusedConversation as error:
            refused.append(str(error))
        else:
            kept.append(row)
    return kept


def _prompt_length(chosen: Ids, rejected: Ids, prompt: Ids) -> int:
    """How many tokens of the prompt both sides begin with; less than all where a side goes on with a turn of its own."""
    length = len(prompt)
    if chosen[:length] == rejected[:length] == prompt:
        return length
    return min(shared_length(chosen, prompt), shared_length(rejected, prompt))


def _length_problem(prompt: Ids, max_tokens: int) -> str:
    if not prompt:
        return EMPTY
    return TOO_LONG if len(prompt) > max_tokens else ""


def _keep_or_drop(example: Example, problem: str, drops: Drops) -> Example | None:
    if problem:
        drops[problem] += 1
    return None if problem else example
