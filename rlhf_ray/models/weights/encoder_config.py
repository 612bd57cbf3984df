"""Whether a model directory holds an encoder, and the one score head that it needs to be a reward model.

Invariants: only config.json is read to tell; an encoder whose head has not exactly one output is refused with what it has.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from rlhf_ray.config.files.encoders import encoder_type, not_trained
from rlhf_ray.config.files.positions import longest_sequence
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.checkpoint import Checkpoint

HEAD = "classifier"
"""The module that holds the head of a sequence classifier, or is it."""
LAST_LAYERS = (f"{HEAD}.out_proj", f"{HEAD}.linear_out", f"{HEAD}.out", HEAD)
"""Names of the layer whose outputs are the scores."""


def is_encoder(config: ModelConfig) -> bool:
    """Whether a config names an encoder. What cannot be read is none: loading it says what is wrong."""
    return encoder_type(_content(config)) is not None


def encoder_positions(config: ModelConfig) -> int | None:
    """How many tokens the encoder that a config names reads; None where nothing limits it."""
    return longest_sequence(_content(config))


def _content(config: ModelConfig) -> dict[str, Any]:
    """What stands in config.json; empty where that cannot be read."""
    if config.path is None:
        return {}
    try:
        content: dict[str, Any] = PreTrainedConfig.get_config_dict(config.path, revision=config.revision)[0]
    except (OSError, ValueError):
        return {}
    return content


def refuse_encoder(checkpoint: Checkpoint) -> None:
    """Refuse an encoder where a causal language model is needed."""
    kind = encoder_type(checkpoint.raw_config())
    if kind is not None:
        raise ModelLoadError(not_trained(str(checkpoint.directory), kind))


class EncoderCheckpoint(Checkpoint):
    """The checkpoint of an encoder with one score; a config that does not say so is put right."""

    def config(self, *, trust_remote_code: bool = False) -> PreTrainedConfig:
        """Read the config, and compare it with the head that is there."""
        config = super().config(trust_remote_code=trust_remote_code)
        outputs = next((self.shape(f"{name}.weight") for name in LAST_LAYERS if f"{name}.weight" in self.names), None)
        if outputs is None:
            raise ModelLoadError(
                f"{self.directory} is an encoder ({config.model_type}) without a score head ({HEAD}.weight), so it is not a "
                "reward model, and encoders are not trained here: choose another checkpoint"
            )
        if outputs[0] != 1:
            raise ModelLoadError(
                f"the head {HEAD} of {self.directory} has {outputs[0]} outputs (num_labels), but a reward model needs 1: "
                "choose another checkpoint"
            )
        config.num_labels = 1
        return config
