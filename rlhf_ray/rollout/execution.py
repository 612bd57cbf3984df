"""The execution contract: how a process computes log-probs, compared between trainer and engines and over the life of a run.

Invariants: a record says what the process has loaded, not what a config asks for. Every field has one rule in :data:`RULES`,
which says for each kind of comparison whether it must be equal. A difference is named by its field, with both values and the
way out. What one side does not have (None) is not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any, Literal

from rlhf_ray.errors import RequestError

PROCESSED = "processed_logprobs"
"""Log-probs of the distribution that tokens are drawn from, as vLLM calls them; the trainer computes no others."""

Relation = Literal["alike", "across", "over_time"]
"""``alike``: ranks of the policy among each other, and engines; ``across``: an engine and the policy; ``over_time``: a run that
goes on, and the same run before."""
Verdict = Literal["equal", "warn", "record"]


@dataclass(frozen=True)
class Execution:
    """What decides the log-probs of a process, besides the weights. None where the process has no such thing."""

    dtype: str
    """Of weights and activations: bf16, fp16 or fp32."""
    head: str
    """The dtype in which logits leave the output layer. The softmax after it is in fp32 everywhere."""
    log_probs: str
    """Of which distribution they are, in vLLM's words."""
    temperature: float
    attention: str
    """The attention backend."""
    vocabulary: int
    """Rows of the output layer, padding included."""
    tokenizer: str | None = None
    """A hash of what decides which ids a text gets (:func:`rlhf_ray.data.tokenizers.fingerprint`)."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    lora: str | None = None
    """Whether weights come whole, with LoRA ``merged`` where there is any, or an ``adapter`` beside them."""
    quantization: str | None = None
    context: int | None = None
    """The most tokens that a sequence may have."""
    transport: str | None = None
    """How the weights last came (:mod:`rlhf_ray.rollout.transport`); None before the first update."""
    torch: str | None = None
    transformers: str | None = None
    tokenizers: str | None = None
    vllm: str | None = None
    deepspeed: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``execution.json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Execution:
        """Read what :meth:`to_json` wrote, also where another version of this project had other fields."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})


@dataclass(frozen=True)
class Rule:
    """What a difference in a field means in each comparison, and what to do about it."""

    alike: Verdict
    across: Verdict
    over_time: Verdict
    way_out: str

    def verdict(self, relation: Relation) -> Verdict:
        """What a difference means in ``relation``."""
        return {"alike": self.alike, "across": self.across, "over_time": self.over_time}[relation]


SAME_PACKAGES = "install the same version on all nodes"
_OF_CONFIG = "it follows from the config, and every rank and engine has the same: report it"

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "dtype": Rule("equal", "warn", "record", "set policy.model.dtype and rollout.dtype to one of them"),
        "head": Rule("equal", "record", "warn", SAME_PACKAGES),
        "log_probs": Rule("equal", "equal", "equal", "vLLM must give processed_logprobs: install the version of setup.sh"),
        "temperature": Rule("equal", "equal", "record", _OF_CONFIG),
        "attention": Rule("warn", "record", "warn", "rollouts repeat to the bit only where it is the same"),
        "vocabulary": Rule("equal", "equal", "equal", "start a new run from the model that has it"),
        "tokenizer": Rule(
            "equal", "equal", "equal", "put the tokenizer back that the run began with; all nodes must read the same files"
        ),
        "top_p": Rule("equal", "equal", "record", _OF_CONFIG),
        "top_k": Rule("equal", "equal", "record", _OF_CONFIG),
        "min_p": Rule("equal", "equal", "record", _OF_CONFIG),
        "lora": Rule("equal", "equal", "record", _OF_CONFIG),
        "quantization": Rule("equal", "record", "record", _OF_CONFIG),
        "context": Rule("equal", "record", "record", _OF_CONFIG),
        "transport": Rule("equal", "equal", "record", "an engine must take the publication that it answers: report it"),
        "torch": Rule("equal", "equal", "warn", SAME_PACKAGES),
        "transformers": Rule("equal", "equal", "warn", SAME_PACKAGES),
        "tokenizers": Rule("equal", "equal", "warn", SAME_PACKAGES),
        "vllm": Rule("equal", "equal", "warn", SAME_PACKAGES),
        "deepspeed": Rule("equal", "equal", "warn", SAME_PACKAGES),
    }
)  # fmt: skip
"""The contract. docs/rollout.md says why."""


def versions(*packages: str) -> dict[str, Any]:
    """The installed versions of ``packages``, by the fields that hold them; they are not imported."""
    return {package: _installed(package) for package in packages}


@cache
def _installed(package: str) -> str | None:
    """The version when it was first asked for: a record is of what the process has loaded, whatever is installed later."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def digest(policy: Execution, engine: Execution) -> str:
    """12 hexadecimal digits of the hash of what both keep to: all fields that must be equal, from whichever has them."""
    names = [name for name, rule in RULES.items() if rule.across == "equal"]
    pairs = {name: (getattr(policy, name), getattr(engine, name)) for name in names}
    shared = {name: other if one is None else one for name, (one, other) in pairs.items()}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]


def differences(
    ours: Execution, theirs: Execution, relation: Relation, *, here: str, there: str
) -> tuple[list[str], list[str]]:
    """What must be equal and is not, and what is only worth a warning: each with its field, both values and the way out."""
    broken: list[str] = []
    noted: list[str] = []
    for name, rule in RULES.items():
        one, other, verdict = getattr(ours, name), getattr(theirs, name), rule.verdict(relation)
        if name == "tokenizer" and ours.tokenizers != theirs.tokenizers:
            verdict = "warn"  # other versions may write the same tokenizer in another way
        if one is None or other is None or one == other or verdict == "record":
            continue
        text = f"{name} is {one} in {here} and {other} in {there}: {rule.way_out}"
        (broken if verdict == "equal" else noted).append(text)
    return broken, noted


def require_agreement(ours: Execution, theirs: Execution, relation: Relation, *, here: str, there: str) -> list[str]:
    """The warnings; raises :class:`RequestError` with everything that must be equal and is not."""
    broken, noted = differences(ours, theirs, relation, here=here, there=there)
    if broken:
        raise RequestError("log-probs are not computed alike: " + "; ".join(broken))
    return noted
