"""Encoders: models that read a text in both directions, such as BERT and DeBERTa. They are scored with and not trained.

Invariants: a job that would train an encoder, or give it what only causal language models have, is refused before it starts. An
encoder that is on a hub is unknown here and is not a problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_ray.config.facts import Role
from rlhf_ray.config.files.models import model_config_file
from rlhf_ray.config.problems import Problem, unless_absent
from rlhf_ray.config.sections.engine import EngineConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole

ENCODERS = {
    "albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2",
    "distilbert", "electra", "ernie", "eurobert", "fnet", "gte", "jina_embeddings_v3",
    "longformer", "megatron-bert", "mobilebert", "modernbert", "mpnet", "mra", "nomic_bert", "nystromformer",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert", "xlm-roberta",
    "xlm-roberta-xl", "xmod", "yoso",
}  # fmt: skip
"""Values of ``model_type`` in config.json: those that transformers both fills masks and classifies texts with
(``architectures.py`` names two more that do not run here)."""

IN_VLLM = {"modernbert", "roberta", "xlm-roberta"}
"""Encoders that vLLM's pooling runner scores right. It knows BERT too, but would leave out the types of its tokens."""


def encoder_type(content: Mapping[str, Any]) -> str | None:
    """The ``model_type`` of an encoder's config.json; None for any other model."""
    kind = content.get("model_type")
    return kind if kind in ENCODERS and not content.get("is_decoder") else None


def not_trained(name: str, kind: str) -> str:
    """Why an encoder is neither trained nor a policy, and what it can do."""
    return (
        f"{name} is an encoder (model_type {kind}), which reads a text in both directions: it can score, in a reward section "
        "that is not trained, with rlhf-ray score, serve or evaluate, but only causal language models are trained or write "
        "answers"
    )


def not_in_vllm(name: str, kind: str) -> str | None:
    """Why vLLM does not score with an encoder; None if it does."""
    if kind in IN_VLLM:
        return None
    return (
        f"{name} is an encoder of a kind ({kind}) that vLLM's pooling runner does not have, or reads without the types of its "
        "tokens: set scorer to packed"
    )


def encoder_problems(key: str, role: Role) -> Iterator[Problem]:
    """What an encoder at ``key`` cannot do, if the model there is one."""
    model: ModelConfig | None = unless_absent(lambda: role.config.model, None)
    kind = None if model is None else encoder_type(model_config_file(model))
    if model is None or kind is None:
        return
    if role.trained or role.head is False:
        yield f"{key}.model.path", not_trained(str(model.path), kind)
        return
    unserved = not_in_vllm(str(model.path), kind) if _said(role, "scorer") == "vllm" else None
    if unserved is not None:
        yield f"{key}.scorer", unserved
    alone = f"{model.path} is an encoder ({kind}), which scores with its own head and weights as they are: remove it"
    given = {
        "model.lora": model.lora is not None,
        "model.quantization": model.quantization is not None,
        "model.head_init": model.head_init is not None,
        "model.attention": model.attention != "auto",
        "model.value_head_prefix": model.value_head_prefix != "score",
        "form": _said(role, "form") is not None,
        "scored_token": _said(role, "scored_token") is not None,
        "engine": unless_absent(lambda: role.config.engine, EngineConfig()) != EngineConfig(),
    }
    yield from ((f"{key}.{name}", alone) for name, is_given in given.items() if is_given)


def _said(role: Role, key: str) -> Any:
    """What a role that only scores says under a key; None where it says nothing."""
    return unless_absent(lambda: getattr(role.config, key), None) if isinstance(role.config, ScoringRole) else None
