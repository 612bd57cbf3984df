"""What a reward model remembers of its training: the record that ``train rm`` leaves in its ``config.json``.

Invariants: a record is read back as it was written, or refused with the file, the entry and the way out; a model without a
record was trained elsewhere, or before there were records, and nothing is known of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from rlhf_ray.config.facts import Role
from rlhf_ray.config.files.models import model_config_file
from rlhf_ray.config.problems import Problem
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import Form, ScoredToken, ScoringRole
from rlhf_ray.errors import ModelLoadError

KEY = "rlhf_ray_reward"
"""The key of the record in ``config.json``."""


@dataclass(frozen=True)
class RewardRecord:
    """How a reward model was trained."""

    forms: tuple[Form, ...]
    """The forms of the pairs that it was trained on: one, or both."""
    end_token: str
    """The token at which it was scored, as a text."""
    tokenizer: str
    """The fingerprint of its tokenizer, as it was written beside the model."""
    template: str | None = None
    """The fingerprint of the chat template; null where it was trained on texts alone."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template was given besides the messages, in every row."""
    scored_token: ScoredToken = "end"

    def as_json(self) -> dict[str, Any]:
        """The record as plain JSON."""
        return {**asdict(self), "forms": list(self.forms)}


def read_reward_record(config: Mapping[str, Any], where: str) -> RewardRecord | None:
    """The record in the content of a ``config.json``, or None if it holds none; ``where`` names the file in errors."""
    written = config.get(KEY)
    if written is None:
        return None
    problem = _problem(written)
    if problem is not None:
        raise ModelLoadError(
            f"{where}: {KEY}, the record of how this reward model was trained, {problem}: copy config.json again from where "
            f"it was trained, or remove {KEY} and say reward.form and reward.scored_token"
        )
    return RewardRecord(**{**written, "forms": tuple(written["forms"])})


def _problem(written: Any) -> str | None:
    """What is wrong with a record, or None."""
    if not isinstance(written, Mapping):
        return f"is a {type(written).__name__}, not an object"
    names = RewardRecord.__dataclass_fields__.keys()
    unknown, missing = sorted(written.keys() - names), sorted(names - written.keys())
    if unknown:
        return f"holds {', '.join(unknown)}, which this version does not know"
    if missing:
        return f"lacks {', '.join(missing)}"
    forms, known = written["forms"], get_args(Form)
    if not isinstance(forms, list) or not forms or not all(form in known for form in forms):
        return f"has forms {forms!r}, not a list of {' and '.join(known)}"
    if written["scored_token"] not in get_args(ScoredToken):
        return f"has scored_token {written['scored_token']!r}, which is not one of {', '.join(get_args(ScoredToken))}"
    if not isinstance(written["template_variables"], Mapping):
        return f"has template_variables {written['template_variables']!r}, not an object"
    texts = {name: written[name] for name in ("end_token", "tokenizer")}
    if written["template"] is not None:
        texts["template"] = written["template"]
    wrong = [name for name, value in texts.items() if not isinstance(value, str) or not value]
    return f"has no text under {', '.join(wrong)}" if wrong else None


def recorded_training(model: ModelConfig) -> RewardRecord | None:
    """The record of a model whose directory is on this machine; None where there is none, or none that can be read."""
    try:
        return read_reward_record(model_config_file(model), str(model.path))
    except ModelLoadError:  # record_problems says it
        return None


def record_problems(key: str, role: Role) -> Iterator[Problem]:
    """A reward model that scores remembers its training in a form that is known, and its section says nothing else."""
    section = role.config
    if not isinstance(section, ScoringRole):
        return
    model = section.model
    try:
        record = read_reward_record(model_config_file(model), str(Path(str(model.path)) / "config.json"))
    except ModelLoadError as error:
        yield f"{key}.model.path", str(error)
        return
    if record is None:
        return
    if section.form is not None and section.form not in record.forms:
        was = " and ".join(record.forms)
        yield (
            f"{key}.form",
            f"{section.form}, but {model.path} was trained on the form {was} (its config.json): remove it",
        )
    if section.scored_token not in (None, record.scored_token):
        yield (
            f"{key}.scored_token",
            f"{section.scored_token}, but {model.path} was trained to be read at {record.scored_token} (its config.json): "
            "remove it",
        )
