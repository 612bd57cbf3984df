"""Loading the data of a job: demonstrations, preference pairs or prompts, read, encoded and split as its config says.

Invariants: everything is read before a cluster is joined; the prompts of both halves share one numbering.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from rlhf_ray.config.sections.data import DataConfig, SourceConfig, WorldConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.batches import DemonstrationExample, JudgedExample
from rlhf_ray.data.chat import ChatFormat, Conversation
from rlhf_ray.data.encode import (
    Drops,
    EncodedDemonstration,
    encode_demonstrations,
    encode_judged_answers,
    encode_prompts,
    render_prompt,
    without_refused_answers,
    without_refused_demonstrations,
    without_refused_prompts,
)
from rlhf_ray.data.encoded_pairs import PairExample, PairFile, PairRow, encode_pair_file, encode_pair_rows
from rlhf_ray.data.split import Halves, Split, encode_halves, read_halves, sources_name
from rlhf_ray.data.template_losses import prompt_losses, report_losses
from rlhf_ray.errors import DataError
from rlhf_ray.rows.demonstrations import Demonstration
from rlhf_ray.rows.judged import JudgedAnswer, both_sides
from rlhf_ray.rows.preferences import PAIR_NUMBERS
from rlhf_ray.rows.prompts import Prompt
from rlhf_ray.rows.read import RowReader, read_file, report_bad_rows
from rlhf_ray.rows.same_prompt import hash_prompt
from rlhf_ray.world.generate import World

WORLD_EVALUATION_DEMONSTRATIONS = 500
TIE = "that are ties, which have no better side (a reward model with loss.name=ordinal learns from them)"
"""A reason to drop a pair, as it is logged."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt of the run: what answers are sampled to, and what they are judged by."""

    prompt_id: int
    """Its number among all rows of both halves."""
    text: str
    """What the policy is given to go on with; a conversation as the policy's chat template writes it."""
    token_ids: tuple[int, ...]
    label: Any = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    """The conversation that the prompt is, where it is one."""
    source: str = ""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Functions that the conversation may call."""
    template_variables: Mapping[str, Any] | None = None
    """Variables that the chat template was given for this prompt alone."""


def load_demonstrations(data: DataConfig, tokenizer: Any, seed: int) -> Split[DemonstrationExample]:
    """Encoded demonstrations of the generated world or of files; a conversation may become several examples."""
    chat, name = ChatFormat(tokenizer, data.template_variables), sources_name(data)

    def read(name: str, source: SourceConfig, max_rows: int | None) -> list[Demonstration]:
        bad_rows: list[str] = []
        rows = list(read_file(source.rows, data.demonstration_reader(source), max_rows=max_rows, bad_rows=bad_rows))
        if data.bad_rows == "drop":
            rows = without_refused_demonstrations(chat, rows, bad_rows)
        report_bad_rows(source.rows, bad_rows)
        return rows

    def encode(half: Sequence[Demonstration], drops: Drops) -> list[DemonstrationExample]:
        encoded = encode_demonstrations(chat, half, data.max_tokens, drops, every_token=data.train_on == "all")
        losses = [(row.where, one.losses) for row, one in zip(half, encoded, strict=True) if one.losses is not None]
        report_losses(chat, name, losses)
        _say_what_is_left_out(encoded, name)
        return [DemonstrationExample(*sequence) for one in encoded for sequence in one.sequences]

    if data.world is not None:
        rows = _world_demonstrations(data.world)
    else:
        rows = read_halves(data, seed, read, lambda row: hash_prompt(row.asked, row.tools, nearly=True))
        _say_how_texts_are_learned(rows, tokenizer, name)
    return encode_halves(rows, data, encode)


def _say_what_is_left_out(encoded: Sequence[EncodedDemonstration], name: str) -> None:
    """Say how many answers of conversations do not fit, where others of the same conversation do."""
    answers = sum(one.too_long for one in encoded)
    if answers:
        get_logger("data").info(
            "%s: %d answers of %d conversations end behind data.max_tokens and are not learned; those before them are",
            name, answers, sum(one.too_long > 0 for one in encoded),
        )  # fmt: skip


def _say_how_texts_are_learned(rows: Halves[Demonstration], tokenizer: Any, name: str) -> None:
    """Say once that plain texts do not go through a chat template, where there is one."""
    demonstrations = [row for half in (*rows.files, rows.held_out) for row in half]
    texts = sum(row.messages is None for row in demonstrations)
    if texts and tokenizer.chat_template is not None:
        get_logger("data").warning(
            "%s: %d of %d demonstrations are plain texts, which are learned as they stand, although the tokenizer has a chat "
            "template; data.apply_chat_template=true makes turns of them", name, texts, len(demonstrations),
        )  # fmt: skip


def load_pairs(data: DataConfig, tokenizer: Any, seed: int, *, graded: bool = True) -> Split[PairExample]:
    """Encoded preference pairs of the generated world or of files; labels of the world's held-out pairs are never flipped.

    Without ``graded`` the loss reads no grades: ties, which have no better side, are dropped and counted.
    """
    cut_prompt = data.too_long == "cut_prompt"
    chat = ChatFormat(tokenizer, data.template_variables)

    def read(name: str, source: SourceConfig, max_rows: int | None) -> list[PairRow]:
        file = PairFile(source.rows, data.preference_reader(source), data.max_tokens, cut_prompt, max_rows)
        return encode_pair_file(file, chat, data.cache, source=name)

    def keep(half: Sequence[PairRow], drops: Drops) -> list[PairExample]:
        drops.update(row.pair for row in half if isinstance(row.pair, str))
        pairs = [row.pair for row in half if isinstance(row.pair, PairExample)]
        return pairs if graded else without_ties(pairs, drops)

    if data.world is not None:
        rows = _world_pairs(data.world, chat, data.max_tokens, cut_prompt=cut_prompt)
    else:
        rows = read_halves(data, seed, read, lambda row: row.prompt)
    examples = encode_halves(rows, data, keep)
    _check_labels(examples.train, sources_name(data))
    _say_what_is_cut(sum(pair.cut > 0 for pair in chain(examples.train, examples.held_out)), sources_name(data))
    return examples


def _say_what_is_cut(count: int, name: str) -> None:
    if count:
        get_logger("data").info("%s: %d prompts were cut at their beginning (data.too_long)", name, count)


def load_judged(data: DataConfig, tokenizer: Any, seed: int) -> Split[JudgedExample]:
    """Encoded answers with labels of files, or both sides of the generated world's pairs; each with another one's answer.

    Raises :class:`DataError` where all answers to train on have the same label, or the same prompt.
    """
    cut_prompt = data.too_long == "cut_prompt"
    chat, name, cut = ChatFormat(tokenizer, data.template_variables), sources_name(data), 0

    def read(name: str, source: SourceConfig, max_rows: int | None) -> list[JudgedAnswer]:
        bad_rows: list[str] = []
        rows = list(read_file(source.rows, data.judged_reader(source), max_rows=max_rows, bad_rows=bad_rows))
        if data.bad_rows == "drop":
            rows = without_refused_answers(chat, rows, bad_rows)
        report_bad_rows(source.rows, bad_rows)
        return rows

    def encode(half: Sequence[JudgedAnswer], drops: Drops) -> list[JudgedExample]:
        nonlocal cut
        encoded = encode_judged_answers(chat, half, data.max_tokens, drops, cut_prompt=cut_prompt)
        kept = [(row, one) for row, one in zip(half, encoded, strict=True) if one is not None]
        report_losses(chat, name, [(row.where, one.losses) for row, one in kept if one.losses is not None])
        cut += sum(one.cut > 0 for _, one in kept)
        return [JudgedExample(one.prompt, one.answer, row.desirable) for row, one in kept]

    if data.world is not None:
        rows = _world_judged(data.world)
    else:
        rows = read_halves(data, seed, read, lambda row: hash_prompt(row.prompt, row.tools, nearly=True))
    examples = encode_halves(rows, data, encode)
    _say_what_is_cut(cut, name)
    _check_kinds(examples.train, name)
    return replace(
        examples,
        train=with_other_answers(examples.train, data.max_tokens, seed, name),
        held_out=with_other_answers(examples.held_out, data.max_tokens, seed, f"{name}, held out", examples.train),
    )


def with_other_answers(
    examples: Sequence[JudgedExample], max_tokens: int, seed: int, name: str, more: Sequence[JudgedExample] = ()
) -> list[JudgedExample]:
    """Give each example the answer of another one, which has another prompt; its end is cut off where it does not fit.

    Every answer is given once, but for those whose next one has the same prompt. An example whose prompt all have is given one
    of ``more``. Raises :class:`DataError` where all those have its prompt too.
    """
    order, spare = list(range(len(examples))), list(range(len(examples), len(examples) + len(more)))
    random.Random(f"{seed}/other answers").shuffle(order)
    random.Random(f"{seed}/spare answers").shuffle(spare)
    pool = [*examples, *more]
    prompts = [tuple(example.prompt) for example in pool]
    given = list(examples)
    for place, number in enumerate(order):
        later = (order[(place + step) % len(order)] for step in range(1, len(order)))
        further = (spare[(place + step) % len(spare)] for step in range(len(spare)))
        other = next((one for one in chain(later, further) if prompts[one] != prompts[number]), None)
        if other is None:
            raise DataError(
                f"{name}: all {len(pool)} answers have the same prompt, and KTO compares with answers to other prompts: "
                "add rows with other prompts, or train on pairs (loss.name=sigmoid)"
            )
        room = max_tokens - len(prompts[number])
        given[number] = replace(examples[number], other_answer=pool[other].answer[:room])
    return given


def _check_kinds(examples: Sequence[JudgedExample], name: str) -> None:
    desirable = sum(example.desirable for example in examples)
    if desirable in (0, len(examples)):
        kind, other = ("true", "false") if desirable else ("false", "true")
        raise DataError(
            f"{name}: all {len(examples)} answers to train on have the label {kind}, and KTO learns from both kinds: add "
            f"answers with the label {other}, or train on pairs (loss.name=sigmoid)"
        )


def load_prompts(
    data: DataConfig, tokenizer: Any, seed: int, make_reader: Callable[[SourceConfig], RowReader[Prompt]] | None = None
) -> Split[TokenizedPrompt]:
    """Encoded prompts of the generated world or of files; those held out continue the numbers.

    ``make_reader`` makes what a file is read with, for jobs that ask more of a row than the ``data`` section says.
    """
    make_reader = make_reader or data.prompt_reader
    chat = ChatFormat(tokenizer, data.template_variables)

    def read(name: str, source: SourceConfig, max_rows: int | None) -> list[Prompt]:
        bad_rows: list[str] = []
        rows = list(read_file(source.rows, make_reader(source), max_rows=max_rows, bad_rows=bad_rows))
        if data.bad_rows == "drop":
            rows = without_refused_prompts(chat, rows, bad_rows)
        report_bad_rows(source.rows, bad_rows)
        return [row if row.source else replace(row, source=name) for row in rows]

    def encode(half: Sequence[Prompt], drops: Drops) -> list[TokenizedPrompt]:
        encoded = encode_prompts(chat, half, data.max_prompt_tokens, drops)
        return [_tokenized(chat, row, ids) for row, ids in zip(half, encoded, strict=True) if ids is not None]

    rows = _world_prompts(data.world) if data.world is not None else read_halves(data, seed, read, _prompt_key)
    _say_how_texts_are_read(rows, tokenizer, sources_name(data))
    _say_what_is_lost(rows, chat, sources_name(data))
    return encode_halves(_numbered_through(rows), data, encode, limit="data.max_prompt_tokens")


def _say_what_is_lost(rows: Halves[Prompt], chat: ChatFormat, name: str) -> None:
    prompts = [row for half in (*rows.files, rows.held_out) for row in half]
    talks = [
        (row.where, Conversation(row.messages, row.tools, row.template_variables, row.where))
        for row in prompts
        if row.messages is not None
    ]
    report_losses(chat, name, [(where, prompt_losses(talk, chat.prompt_text(talk))) for where, talk in talks])


def _say_how_texts_are_read(rows: Halves[Prompt], tokenizer: Any, name: str) -> None:
    """Say once that plain texts do not go through a chat template, where there is one."""
    prompts = [row for half in (*rows.files, rows.held_out) for row in half]
    texts = sum(row.messages is None for row in prompts)
    if texts and tokenizer.chat_template is not None:
        get_logger("data").warning(
            "%s: %d of %d prompts are plain texts, which are sampled to as they stand, although the policy's tokenizer has a "
            "chat template; data.apply_chat_template=true makes them turns of the user", name, texts, len(prompts),
        )  # fmt: skip


def without_ties(pairs: Sequence[PairExample], drops: Drops) -> list[PairExample]:
    """The pairs that have a better side, without their grades; ``drops`` counts the others."""
    kept = [pair for pair in pairs if pair.grade != 0]
    if len(kept) < len(pairs):
        drops[TIE] += len(pairs) - len(kept)
    return [replace(pair, grade=None) for pair in kept]


def _tokenized(chat: ChatFormat, row: Prompt, ids: Sequence[int]) -> TokenizedPrompt:
    messages = None if row.messages is None else tuple(row.messages)
    text = render_prompt(chat, row)
    return TokenizedPrompt(
        row.prompt_id, text, tuple(ids), row.label, messages, row.source, row.tools, row.template_variables
    )


def _numbered_through(rows: Halves[Prompt]) -> Halves[Prompt]:
    """Prompts numbered over all files and the held-out rows, in that order."""
    halves, first = [], 0
    for half in (*rows.files, rows.held_out):
        halves.append([replace(row, prompt_id=number) for number, row in enumerate(half, first)])
        first += len(half)
    return Halves(halves[:-1], halves[-1])


def _prompt_key(row: Prompt) -> Hashable:
    """The same for two rows with the same prompt, but for how it is written."""
    return hash_prompt(row.text if row.messages is None else row.messages, row.tools, nearly=True)


def _world_demonstrations(config: WorldConfig) -> Halves[Demonstration]:
    world = World(config.seed, config.raters)
    make = world.arithmetic_demonstrations if config.task == "arithmetic" else world.demonstrations
    return Halves([make(config.demonstrations)], make(WORLD_EVALUATION_DEMONSTRATIONS, "evaluation"))


def _world_pairs(config: WorldConfig, chat: ChatFormat, max_tokens: int, *, cut_prompt: bool) -> Halves[PairRow]:
    world = World(config.seed, config.raters)
    halves = (
        world.preferences(config.pairs),
        world.preferences(config.evaluation_pairs, "evaluation", flipped=0.0),
    )
    train, held_out = (encode_pair_rows(rows, chat, max_tokens, cut_prompt=cut_prompt) for rows in halves)
    return Halves([train], held_out)


def _world_judged(config: WorldConfig) -> Halves[JudgedAnswer]:
    world = World(config.seed, config.raters)
    train, held_out = (
        world.preferences(config.pairs),
        world.preferences(config.evaluation_pairs, "evaluation", flipped=0.0),
    )
    return Halves([list(chain(*map(both_sides, train)))], list(chain(*map(both_sides, held_out))))


def _world_prompts(config: WorldConfig) -> Halves[Prompt]:
    world = World(config.seed, config.raters)
    if config.task == "arithmetic":
        train, held_out = world.arithmetic_prompts("ppo"), world.arithmetic_prompts("evaluation")
        return Halves([train[: config.prompts]], held_out[: config.evaluation_prompts])
    return Halves([world.prompts("ppo", config.prompts)], world.prompts("evaluation", config.evaluation_prompts))


def _check_labels(pairs: Sequence[PairExample], name: str) -> None:
    """Refuse numbers that only some pairs have and grades that never differ; warn of a side that never does."""
    for column in PAIR_NUMBERS:
        count = sum(getattr(pair, column) is not None for pair in pairs)
        if 0 < count < len(pairs):
            raise DataError(f"{name}: {count} of {len(pairs)} pairs have a {column!r}: fill it in all files or none")
    grades = {pair.grade for pair in pairs}
    if len(pairs) > 1 and len(grades) == 1 and None not in grades:
        raise DataError(
            f"{name}: 'grade' is {pairs[0].grade:g} in all {len(pairs)} pairs, from which no grade can be learned: leave the "
            "column out, or give pairs of several grades"
        )
    for side in ("chosen", "rejected"):
        answers = (tuple(getattr(pair, side)[pair.prompt_length :]) for pair in pairs)
        first = next(answers)
        if len(pairs) > 1 and all(answer == first for answer in answers):
            get_logger("data").warning("%s: the %s answer is the same in all %d pairs", name, side, len(pairs))
