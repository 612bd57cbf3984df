"""How a reward model reads an item: in which form, and at which token its score is read.

Invariants: a model that remembers its training is read as it was trained, or not at all; of one that does not, the caller may
say how it was trained, and what is assumed otherwise is said with its reason. Scores without a record whose pad token ends an
answer are those that transformers computes.

A causal model's hidden state depends on nothing that follows it, so to read a score before the end is to leave out the end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.files.reward_record import RewardRecord, read_reward_record
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import Form, ScoredToken
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.chat_template import Ending
from rlhf_ray.data.tokenizers import fingerprint, template_fingerprint
from rlhf_ray.errors import DataError, ModelLoadError
from rlhf_ray.models.weights.checkpoint import Checkpoint
from rlhf_ray.models.weights.tokenizer import add_pad_token

FORM_WORDS: Mapping[Form, str] = {
    "conversation": "conversations, written by its chat template",
    "text": "plain texts, joined as they are",
}


@dataclass(frozen=True)
class RewardReading:
    """How one reward model reads its items."""

    forms: tuple[Form, ...]
    """What it reads; where it reads both, a prompt and a response that are texts are joined."""
    scored_token: ScoredToken
    end_token: str
    """The token that ends an answer."""
    reason: str
    """Why it is read so."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    unread: frozenset[int] = frozenset()
    """Tokens that are left out at the end of an item."""
    tail: str = ""
    """What the chat template that it was trained with writes after the token that ends an answer."""
    recorded: bool = False
    """Whether the model itself says so."""
    warnings: tuple[str, ...] = ()
    """What has changed since its training."""

    def scored_ids(self, token_ids: Sequence[int]) -> list[int]:
        """The ids up to the token at which the score is read; one is left, whatever they are."""
        length = len(token_ids)
        while length > 1 and token_ids[length - 1] in self.unread:
            length -= 1
        return list(token_ids[:length])

    def without_tail(self, text: str) -> str:
        """A text up to the end of its answer, without what the chat template writes after it."""
        ended = self.tail and text.endswith(f"{self.end_token}{self.tail}")
        return text.removesuffix(self.tail) if ended else text

    def describe(self) -> dict[str, Any]:
        """The same as plain JSON, for those who ask the model."""
        return {
            "forms": list(self.forms),
            "scored_token": self.scored_token,
            "end_token": self.end_token,
            "template_variables": dict(self.template_variables),
            "recorded": self.recorded,
            "sentence": self.sentence(),
        }

    def sentence(self) -> str:
        """What the line on loading says of it."""
        places: Mapping[ScoredToken, str] = {
            "end": f"at {self.end_token!r}, the end of the answer",
            "before_end": f"at the last token before {self.end_token!r}, the end of the answer",
            "rendering": "at the last token that its chat template writes",
        }
        return f"reads {_words(self.forms)}, scored {places[self.scored_token]} ({self.reason})"


def load_reward_reading(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    form: Form | None = None,
    scored_token: ScoredToken | None = None,
) -> RewardReading:
    """How the reward model of ``config`` reads; ``form`` and ``scored_token`` say it where its directory does not.

    Raises :class:`ModelLoadError` where they contradict what the model remembers, or its tokenizer has no template to read
    conversations with.
    """
    name, (record, pad) = config.path or "the made model", _read_directory(config)
    if record is not None:
        return _as_recorded(name, tokenizer, record, form, scored_token)
    return assumed_reading(name, tokenizer, pad, form=form, scored_token=scored_token)


def training_reading(tokenizer: PreTrainedTokenizerBase) -> RewardReading:
    """How every reward model is read while it is trained here: at the last of the ids that it is given."""
    return RewardReading(("conversation", "text"), "end", str(tokenizer.eos_token or ""), "as it is trained")


def end_token_id(tokenizer: PreTrainedTokenizerBase, end_token: str) -> int | None:
    """The id of the token that ends an answer; none where the tokenizer has no such token."""
    token_id = tokenizer.convert_tokens_to_ids(end_token) if end_token else None
    return token_id if isinstance(token_id, int) else None


def answer_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of the tokens that end an answer: of a text, and of a conversation."""
    ending = _find_ending(tokenizer, {})
    ids = {tokenizer.eos_token_id, None if ending is None else ending.token_id}
    return frozenset(token_id for token_id in ids if token_id is not None)


def make_reward_record(
    tokenizer: PreTrainedTokenizerBase, forms: Collection[Form], template_variables: Mapping[str, Any] | None = None
) -> RewardRecord:
    """What a reward model that was trained on pairs of these ``forms`` is to remember."""
    variables = dict(template_variables or {})
    written = deepcopy(tokenizer)  # with the pad token that it has beside the model
    add_pad_token(written, ends=answer_ends(tokenizer))
    known: tuple[Form, ...] = ("conversation", "text")
    ordered = tuple(form for form in known if form in forms)
    talks = "conversation" in forms
    return RewardRecord(
        ordered,
        end_token=_end_token(tokenizer, ordered, variables),
        tokenizer=fingerprint(written),
        template=template_fingerprint(tokenizer) if talks else None,
        template_variables=variables if talks else {},
    )


def _read_directory(config: ModelConfig) -> tuple[RewardRecord | None, int | None]:
    """The record of a model, and the pad token by which transformers finds the token to read."""
    if config.path is None:
        return None, None
    checkpoint = Checkpoint.open(config.path, config.revision, trust_remote_code=config.trust_remote_code)
    where = str((checkpoint.adapter or checkpoint.directory) / "config.json")
    record = read_reward_record(checkpoint.raw_config(), where)
    text_config = checkpoint.config(trust_remote_code=config.trust_remote_code).get_text_config()
    return record, getattr(text_config, "pad_token_id", None)


def _as_recorded(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    record: RewardRecord,
    form: Form | None,
    scored_token: ScoredToken | None,
) -> RewardReading:
    if form is not None and form not in record.forms:
        raise ModelLoadError(
            f"{name} was trained on {_words(record.forms)}, as its config.json says, but form is {form}: remove form, or "
            f"give a model that was trained on {FORM_WORDS[form]}"
        )
    if scored_token not in (None, record.scored_token):
        raise ModelLoadError(
            f"{name} was trained to be read at {record.scored_token}, as its config.json says, but scored_token is "
            f"{scored_token}: remove scored_token"
        )
    changed = []
    if fingerprint(tokenizer) != record.tokenizer:
        changed.append(f"the tokenizer of {name} is not the one it was trained with: put back its tokenizer files")
    if record.template is not None and template_fingerprint(tokenizer) != record.template:
        changed.append(
            f"the chat template of {name} is not the one it was trained with, or the tokens that it names are others: put back "
            "its chat_template.jinja and tokenizer_config.json, or train it again with this one"
        )
    end_token = _end_token(tokenizer, record.forms, record.template_variables)
    if not changed and end_token != record.end_token:
        changed.append(
            f"answers end in {end_token!r} by the tokenizer of {name}, and ended in {record.end_token!r} when it was trained: "
            "put back its tokenizer_config.json"
        )
    return RewardReading(
        record.forms if form is None else (form,),
        record.scored_token,
        record.end_token,
        "as it was trained",
        template_variables=record.template_variables,
        tail=_tail(tokenizer, record.template_variables) if "conversation" in record.forms else "",
        recorded=True,
        warnings=tuple(f"{change}; scores are not what they were" for change in changed),
    )


def assumed_reading(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    pad: int | None,
    *,
    form: Form | None = None,
    scored_token: ScoredToken | None = None,
) -> RewardReading:
    """How the model ``name``, which remembers nothing, reads; ``pad`` is the pad token by which transformers reads it."""
    if form == "conversation" and tokenizer.chat_template is None:
        raise ModelLoadError(
            f"form is conversation, but the tokenizer of {name} has no chat template: put its chat_template.jinja beside it, "
            "or remove form"
        )
    forms: tuple[Form, ...] = (form or ("text" if tokenizer.chat_template is None else "conversation"),)
    end_token = _end_token(tokenizer, forms, {})
    end = end_token_id(tokenizer, end_token)
    pads_end = end is not None and pad == end
    token = scored_token or ("before_end" if pads_end else "end")
    skipped = {pad} & answer_ends(tokenizer) if scored_token != "end" else set()  # what transformers skips
    unread = skipped | ({end} if token == "before_end" else set())
    return RewardReading(
        forms,
        token,
        end_token,
        _reason(tokenizer, form, scored_token, pads_end=pads_end),
        unread=frozenset(token_id for token_id in unread if token_id is not None),
    )


def _reason(
    tokenizer: PreTrainedTokenizerBase, form: Form | None, scored_token: ScoredToken | None, *, pads_end: bool
) -> str:
    """Why a model without a record is read as it is, and what else may be said."""
    reasons = []
    if form is None and tokenizer.chat_template is not None:
        reasons.append("its config.json does not say how it was trained; form=text reads plain texts")
    tail = _tail(tokenizer, {})
    if scored_token is None and tail and form != "text":
        reasons.append(f"its chat template writes {tail!r} after that, which scored_token=rendering reads")
    if scored_token is None and pads_end:
        reasons.append(
            "it pads with the token that ends an answer, and transformers reads the token before that one; scored_token=end "
            "reads the end"
        )
    return "; ".join(reasons) or "its config.json does not say how it was trained"


def _tail(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> str:
    """What the chat template writes after the token that ends an answer."""
    ending = _find_ending(tokenizer, variables)
    return "" if ending is None else ending.tail.partition(ending.token)[2]


def _words(forms: Collection[Form]) -> str:
    return " and ".join(FORM_WORDS[form] for form in forms)


def _end_token(tokenizer: PreTrainedTokenizerBase, forms: Collection[Form], variables: Mapping[str, Any]) -> str:
    """The token at which a score is read; of conversations, where it reads both."""
    ending = _find_ending(tokenizer, variables) if "conversation" in forms else None
    return str(tokenizer.eos_token or "") if ending is None else ending.token


def _find_ending(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> Ending | None:
    """How the chat template ends an answer; none where there is no template, or it leaves out what is said."""
    if tokenizer.chat_template is None:
        return None
    try:
        return ChatFormat(tokenizer, variables).ending
    except DataError:  # conversations are refused one by one, with this error
        return None
