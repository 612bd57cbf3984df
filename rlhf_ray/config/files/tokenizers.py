"""Whether the tokenizers of a job's models agree, and know the tokens that stop an answer.

Invariant: a tokenizer that is on a hub, that is made, or that an earlier job has still to write, is unknown beside one in
files, and is not a problem here. A run compares the tokenizers that its ranks have loaded; ``check`` those that it can load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rlhf_ray.config.files.models import read_json
from rlhf_ray.config.files.tokenizer_identity import same_tokenizer_files
from rlhf_ray.config.problems import Problem
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig


def tokenizer_problems(policy: ModelConfig, readers: Mapping[str, RoleConfig | None]) -> Iterator[Problem]:
    """Roles that read the policy's token ids have the policy's tokenizer; ``readers`` are roles by their keys."""
    for key, role in readers.items():
        model = policy if role is None else role.model
        if _tokenizers_differ(policy, model):
            yield f"{key}.model", different_tokenizer(key, model, policy)


def different_tokenizer(key: str, model: ModelConfig, policy: ModelConfig) -> str:
    """What is wrong with a model at ``key`` that reads the policy's ids and has another tokenizer."""
    return (
        f"its tokenizer ({_origin(model)}) is not the policy's ({_origin(policy)}), whose token ids the {key} reads: start it "
        "from a model with the same tokenizer"
    )


def _origin(model: ModelConfig) -> str:
    if model.make is not None:
        return f"made from {model.make.tokenizer_from}, {model.make.vocabulary} tokens"
    return str(model.path)


def _tokenizers_differ(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two tokenizers are known to differ; one that is not on this machine is not known."""
    if one.make is not None and other.make is not None:
        makes = one.make, other.make
        if one.make.tokenizer_from == "world":
            return other.make.tokenizer_from != "world"
        return len({(make.tokenizer_from, make.vocabulary) for make in makes}) > 1
    if one.path is None or other.path is None or one.path == other.path:
        return False
    files = Path(one.path) / "tokenizer.json", Path(other.path) / "tokenizer.json"
    if not all(isinstance(read_json(file), dict) for file in files):  # reported where the models are checked
        return False
    return not same_tokenizer_files(*files)


def stop_token_problems(stop_tokens: Sequence[str], policy: ModelConfig) -> Iterator[Problem]:
    """Each stop token must be one token of the policy's tokenizer, where it lies here already."""
    path = policy.path
    file = Path(path or "") / "tokenizer.json"
    if not stop_tokens or path is None or not file.is_file():
        return
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the check of the model reports what is wrong with the file
        return
    for text in stop_tokens:
        count = len(tokenizer.encode(text, add_special_tokens=False).ids)
        if count != 1:
            yield "rollout.stop_tokens", not_one_token(text, count).partition(": ")[2]


def not_one_token(text: str, count: int) -> str:
    """What is wrong with a stop token of which the tokenizer makes ``count`` tokens, or none that it knows."""
    return (
        f"rollout.stop_tokens: {text!r} is not one token of the policy's tokenizer ({count} tokens): name one that it has, "
        "such as '<|im_end|>' of ChatML models"
    )


NO_TEMPLATE = (
    "holds a conversation, but the tokenizer has no chat template: start from a model whose tokenizer has one, put a "
    "chat_template.jinja beside its tokenizer.json, or write the rows as plain texts"
)
"""What is wrong with a row; it follows its place."""


def read_chat_template(model: ModelConfig) -> str | None:
    """What the chat templates of a model's tokenizer say, one after the other; empty where it has none, as a made one.

    None where its files are not here.
    """
    if model.make is not None:
        return ""
    folder = Path(model.path or "")
    settings = read_json(folder / "tokenizer_config.json")
    if model.path is None or not isinstance(settings, dict):
        return None
    files = [folder / "chat_template.jinja", folder / "chat_template.json"]
    files += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return str(settings.get("chat_template") or "") + "".join(
        file.read_text("utf-8", errors="replace") for file in files if file.is_file()
    )


def unread_variable(template: str, variables: Iterable[str]) -> str:
    """What is wrong with the first of the variables that a chat template does not read; empty where it reads them all."""
    unread = next((name for name in variables if not re.search(rf"\b{re.escape(name)}\b", template)), None)
    if unread is None:
        return ""
    return (
        f"the chat template reads no variable {unread!r}, so it would change nothing: correct its name, or leave it out"
    )
