"""Sequence classification for architectures that transformers' own mapping lacks.

Always true: once this module is imported, ``AutoModelForSequenceClassification`` reads reward models of these
architectures; what transformers maps itself is left alone.
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

OURS: dict[type[PreTrainedConfig], type[Any]] = {Olmo2Config: Olmo2PreTrainedModel, OlmoeConfig: OlmoePreTrainedModel}

REGISTERED = [kind for kind in OURS if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING]
"""Configs whose class is this project's."""

for _kind in REGISTERED:
    _name = f"{_kind.__name__.removesuffix('Config')}ForSequenceClassification"
    _class = type(
        _name, (GenericForSequenceClassification, OURS[_kind]), {"config_class": _kind, "__module__": __name__}
    )
    globals()[_name] = _class
    # transformers 5.19 leaves out, without a word, what is registered for a config of its own unless exist_ok is given
    AutoModelForSequenceClassification.register(_kind, _class, exist_ok=True)


def classifier_of(config: PreTrainedConfig) -> str | None:
    """Name of the class that ``AutoModelForSequenceClassification`` reads such a model with; None where it has none."""
    kind = type(config)
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    classifier: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind]
    return str(classifier.__name__)


def unreadable(config: PreTrainedConfig) -> str | None:
    """Why plain transformers cannot read a reward model of this architecture; None where it can."""
    if classifier_of(config) is None:
        return f"transformers has no sequence classification for {config.model_type}: only this project reads it"
    if type(config) in REGISTERED:
        return (
            f"transformers itself has no sequence classification for {config.model_type}: this project reads it, vLLM, and "
            f"AutoModelForSequenceClassification after `import {__name__}`"
        )
    return None
