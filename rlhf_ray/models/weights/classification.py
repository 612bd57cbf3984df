"""Teach transformers to read reward models of architectures for which it has no sequence classification.

Invariants: once this module is imported, ``AutoModelForSequenceClassification`` reads reward models of these architectures.
Architectures that transformers supports itself are left alone.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    Olmo2Config,
    Olmo2PreTrainedModel,
    OlmoeConfig,
    OlmoePreTrainedModel,
    PreTrainedConfig,
)
from transformers.modeling_layers import GenericForSequenceClassification

ADDED: dict[type[PreTrainedConfig], type[Any]] = {Olmo2Config: Olmo2PreTrainedModel, OlmoeConfig: OlmoePreTrainedModel}

REGISTERED = [kind for kind in ADDED if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING]
"""Types of configs whose classifier is made here."""

for _kind in REGISTERED:
    _name = f"{_kind.__name__.removesuffix('Config')}ForSequenceClassification"
    _class = type(
        _name, (GenericForSequenceClassification, ADDED[_kind]), {"config_class": _kind, "__module__": __name__}
    )
    globals()[_name] = _class
    # Without exist_ok, transformers 5.19 silently ignores a class that is registered for one of its own configs.
    AutoModelForSequenceClassification.register(_kind, _class, exist_ok=True)


def classifier_name(config: PreTrainedConfig) -> str | None:
    """Return the class with which ``AutoModelForSequenceClassification`` reads such a model, or None if it cannot."""
    kind = type(config)
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    classifier: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind]
    return str(classifier.__name__)


def reason_unreadable(config: PreTrainedConfig) -> str | None:
    """Return why plain transformers cannot read a reward model of this architecture, or None if it can."""
    if classifier_name(config) is None:
        return f"transformers has no sequence classification for {config.model_type}: only this project reads it"
    if type(config) in REGISTERED:
        return (
            f"transformers itself has no sequence classification for {config.model_type}: this project reads it, vLLM, and "
            f"AutoModelForSequenceClassification after `import {__name__}`"
        )
    return None
