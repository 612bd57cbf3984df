"""Which tokens end an answer, who says so, and why nearly every answer of a step was cut instead.

Invariants: one set of ids ends answers everywhere: in the rollout engines, in the trainer's masks, and where a reward is read.
It holds every end that the tokenizer, the chat template (of conversations), the policy's own files and ``rollout.stop_tokens``
name. A name that is left out is left out with a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.files.tokenizers import not_one_token
from rlhf_ray.console import get_logger
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.errors import RequestError

GENERATION_CONFIG, CONFIG = "generation_config.json", "config.json"
NEARLY_ALL = 0.9
"""Share of cut answers from which on a step says why."""
OFTEN = 0.1
"""Share of the cut answers from which on a special token in them is named as one that may end answers."""


@dataclass(frozen=True)
class EndTokens:
    """The ids that end an answer."""

    named_by: Mapping[int, tuple[str, ...]]
    """Who names each id: the tokenizer, a file, the template, a key."""
    written: Mapping[int, str]
    """Each id as the tokenizer writes it."""
    left_out: tuple[str, ...] = ()
    """Why an id that a file names is not among them."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids, in the order in which they were found."""
        return tuple(self.named_by)

    def sentence(self) -> str:
        """All ends in one line."""
        ends = (f"{self.written[token]!r} ({token}, {' and '.join(who)})" for token, who in self.named_by.items())
        return f"an answer ends with {' or '.join(ends)}"

    def log(self, logger: str) -> None:
        """Log the ends, and what was left out."""
        get_logger(logger).info("%s", self.sentence())
        for reason in self.left_out:
            get_logger(logger).warning("%s", reason)


def find_end_tokens(
    chat: ChatFormat, recorded: Mapping[str, Sequence[int]], texts: Sequence[str], *, conversations: bool
) -> EndTokens:
    """All ends of answers to prompts of which some are ``conversations``, or none.

    ``recorded`` holds the ids that files of the policy name, by the files; ``texts`` are those of ``rollout.stop_tokens``.
    Raises :class:`RequestError` for a text that is not one token, and where there is no end at all.
    """
    tokenizer, found, left_out = chat.tokenizer, dict[int, list[str]](), []

    def add(token: int, who: str) -> None:
        found.setdefault(token, []).append(who)

    if tokenizer.eos_token_id is not None:
        add(tokenizer.eos_token_id, "the tokenizer")
    if conversations:
        add(chat.end_token_id, "the chat template")
    for file, ids in recorded.items():
        for token in ids:
            reason = _why_not(tokenizer, file, token, recorded)
            if reason is None:
                add(token, file)
            else:
                left_out.append(reason)
    for text in texts:
        add(_only_token(tokenizer, text), "rollout.stop_tokens")
    if not found:
        raise RequestError(
            "rollout.stop_tokens: the tokenizer has no end of sequence, so no answer could end: name a token"
        )
    written = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in found}
    return EndTokens(
        {token: tuple(dict.fromkeys(who)) for token, who in found.items()}, written, tuple(dict.fromkeys(left_out))
    )


def _only_token(tokenizer: Any, text: str) -> int:
    encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(encoded) != 1 or encoded[0] == tokenizer.unk_token_id:
        raise RequestError(not_one_token(text, len(encoded)))
    return int(encoded[0])


def _why_not(tokenizer: Any, file: str, token: int, recorded: Mapping[str, Sequence[int]]) -> str | None:
    """Why an id that ``file`` names ends no answer; none where it does.

    Where a ``generation_config.json`` names ends, transformers and vLLM do not ask ``config.json``, in which an id of the
    class's default may stand that is an ordinary word of this tokenizer.
    """
    if not 0 <= token < len(tokenizer):
        return f"{file} names the end {token}, which is no token of the tokenizer ({len(tokenizer)} tokens): it ends no answer"
    if file == CONFIG and recorded.get(GENERATION_CONFIG) and token not in special_tokens(tokenizer):
        return (
            f"{file} names the end {token}, which is {tokenizer.convert_ids_to_tokens(token)!r}, an ordinary token, and "
            f"{GENERATION_CONFIG} does not: it ends no answer; rollout.stop_tokens adds it where it should"
        )
    return None


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """The ids of all special and added tokens."""
    return frozenset((*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder))


def why_cut(tokenizer: Any, ends: EndTokens, answers: Sequence[Sequence[int]], limit: int) -> str | None:
    """Why nearly all ``answers`` of a step were cut, with the key that helps; none where enough of them ended.

    An answer is the ids that were sampled; ``limit`` is ``rollout.max_new_tokens``.
    """
    cut = [answer for answer in answers if not answer or answer[-1] not in ends.named_by]
    if not answers or len(cut) < NEARLY_ALL * len(answers):
        return None
    tokens, ended = sum(map(len, answers)), len(answers) - len(cut)
    known = ", ".join(f"{text!r} ({token})" for token, text in ends.written.items())
    text = f"{len(cut)} of {len(answers)} answers were cut at rollout.max_new_tokens {limit}: "
    text += (
        f"an end ({known}) came {ended} times in {tokens} tokens"
        if ended
        else f"no end ({known}) came in {tokens} tokens"
    )
    others = [f"{token!r} in {count} of them" for token, count in _often_sampled(tokenizer, cut)]
    if others:
        return f"{text}, but {', '.join(others)}: if that ends an answer, name it in rollout.stop_tokens"
    if ended:
        often = f"once in {tokens // ended}"
        return (
            f"{text}, {often}. Raise rollout.max_new_tokens towards that, or start from a policy with briefer answers"
        )
    return (
        f"{text}. Either answers are longer: raise rollout.max_new_tokens; or the policy was never trained to end: start from "
        "one that was, such as the result of kind: sft; or it ends with another token: name that in rollout.stop_tokens"
    )


def _often_sampled(tokenizer: Any, answers: Sequence[Sequence[int]]) -> Iterator[tuple[str, int]]:
    """Special tokens that stand in many answers, the most frequent first, each with the number of answers."""
    special = special_tokens(tokenizer)
    counts = Counter(token for answer in answers for token in special.intersection(answer))
    for token, count in counts.most_common(3):
        if count >= OFTEN * len(answers) and token != tokenizer.unk_token_id:
            yield str(tokenizer.convert_ids_to_tokens(token)), count
