"""What a job needs to find on this machine: data, model directories, functions, tokens.

Always true: nothing is loaded, started or downloaded; weights are seen to be there, never read; a missing ``org/name``
is a hub id and no problem.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray import environment
from rlhf_ray.config.schema import (
    DataConfig,
    MakeConfig,
    ModelConfig,
    PpoConfig,
    RewardConfig,
    RewardModelConfig,
    Section,
    ServeConfig,
    SftConfig,
    SourceConfig,
)
from rlhf_ray.config.tokenizer_identity import same_tokenizer_files
from rlhf_ray.config.validation import Problem, attempt
from rlhf_ray.errors import ConfigError
from rlhf_ray.rows.demonstrations import DemonstrationReader
from rlhf_ray.rows.read import RowReader, first_problem

PICKLES = ("*.bin", "*.pt", "*.pth")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_files(config: Section) -> list[str]:
    """Every problem with the files that ``config`` names, one message each."""
    return [f"{key}: {text}" for key, text in file_problems(config)]


def require_files(config: Section, source: str = "config") -> None:
    """Raise :class:`ConfigError` with every problem with the files that ``config`` names."""
    problems = check_files(config)
    if problems:
        raise ConfigError(problems, source)


def file_problems(config: Section, *, partial: bool = False) -> list[Problem]:
    """The same as (key, text); of a partial config, as far as its values go."""
    return attempt(_rules(config), partial=partial)


def hub_ids(config: Section) -> list[str]:
    """The models and data sets of ``config`` that only a hub can have, so that the job must be allowed to ask it."""
    names = [model.path for _, model in _models(config)]
    names += [path for data in _datas(config) for _, path in _data_paths(data)]
    return sorted({name for name in names if name is not None and _on_hub(name)})


def _rules(config: Section) -> Iterator[Callable[[], Iterable[Problem]]]:
    own_data = [path for data in _datas(config) for _, path in _data_paths(data)]
    for key, model in _models(config):
        yield lambda key=key, model=model: _model_problems(key, model, own_data)  # type: ignore[misc]
    for data in _datas(config):
        yield lambda data=data: _data_problems(config, data)  # type: ignore[misc]
    if isinstance(config, SftConfig):
        yield lambda: _context_problems("policy.model", config.policy.model, config.data)
    if isinstance(config, RewardModelConfig):
        yield lambda: _context_problems("reward.model", config.reward.model, config.data)
    if isinstance(config, PpoConfig):
        yield lambda: _same_tokenizers(config)
        yield lambda: _rollout_serves(config)
        yield lambda: _reward_problems(config)
        yield lambda: _stop_token_problems(config)
        yield lambda: _token_problems("expose.token_file", config.expose.token_file if config.expose else None)
    if isinstance(config, ServeConfig):
        yield lambda: _token_problems("token_file", config.token_file)
    else:
        yield lambda: _root_problems(config)


def _models(config: Section) -> Iterator[tuple[str, ModelConfig]]:
    """Every model section that is there, whatever else is wrong."""
    roles = {name: config.__dict__.get(name) for name in type(config).model_fields}
    if isinstance(roles.get("reward"), RewardConfig):
        mixture = roles["reward"].__dict__.get("mixture", {})
        roles |= {f"reward.mixture.{name}": term for name, term in mixture.items()}
    if isinstance(config, ServeConfig):
        roles |= {f"models.{name}": role for name, role in config.__dict__.get("models", {}).items()}
    for name, role in roles.items():
        model = role.__dict__.get("model") if isinstance(role, Section) else None
        if isinstance(model, ModelConfig):
            yield f"{name}.model", model


def _datas(config: Section) -> Iterator[DataConfig]:
    data = config.__dict__.get("data")
    if isinstance(data, DataConfig):
        yield data


def _on_hub(name: str) -> bool:
    """A hub id; ``folder/name`` is a path where ``folder`` stands on this machine."""
    return environment.is_hub_id(name) and not Path(name).parent.is_dir()


# -------------------------------------------------------------------------------------------------------------- models


def _model_problems(key: str, model: ModelConfig, own_data: Sequence[str]) -> Iterator[Problem]:
    if model.make is not None and model.make.tokenizer_from not in own_data:
        yield from _made_problems(f"{key}.make.tokenizer_from", model.make)
    if model.path is None or _on_hub(model.path):
        return
    path = Path(model.path)
    if not path.is_dir():
        yield f"{key}.path", _no_directory(path)
        return
    if (path / "adapter_config.json").is_file():
        yield from _adapter_problems(f"{key}.path", path)
    else:
        yield from ((f"{key}.path", text) for text in _checkpoint_problems(path))


def _made_problems(key: str, make: MakeConfig) -> Iterator[Problem]:
    if make.tokenizer_from != "world" and not Path(make.tokenizer_from).exists() and not _on_hub(make.tokenizer_from):
        yield key, f"{make.tokenizer_from} does not exist: name a data file, world, or data for the job's own data"


def _no_directory(path: Path) -> str:
    if path.exists():
        return f"{path} is a file, but a model is a directory"
    trained = f" It would be the result of run {path.parent.name}: train that first." if path.name == "final" else ""
    return f"{path} does not exist: name a model directory, or a hub id as org/name.{trained}"


def _checkpoint_problems(path: Path) -> Iterator[str]:
    config = _read_json(path / "config.json")
    if isinstance(config, str):
        yield config
    elif "model_type" not in config:
        yield f"{path / 'config.json'} names no model_type, so it is not the config of a model"
    yield from _weight_problems(path)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        yield f"{path} has no tokenizer.json: save the tokenizer beside the model"
    elif (path / "tokenizer.json").is_file():
        tokenizer = _read_json(path / "tokenizer.json")
        if isinstance(tokenizer, str):
            yield tokenizer


def _weight_problems(path: Path) -> Iterator[str]:
    if any(path.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        yield f"{path} holds weights only as pickle ({pickles[0]}), which may run code: save them as safetensors"
    else:
        yield f"{path} holds no weights (*.safetensors)"


def _adapter_problems(key: str, path: Path) -> Iterator[Problem]:
    config = _read_json(path / "adapter_config.json")
    if isinstance(config, str):
        yield key, config
        return
    base = str(config.get("base_model_name_or_path"))
    if not Path(base).is_dir() and not _on_hub(base):
        yield key, f"{path} is an adapter of {base}, which does not exist on this machine"
    for text in _weight_problems(path):
        yield key, text


def _read_json(path: Path) -> dict[str, Any] | str:
    """A JSON object, or what is wrong with the file."""
    if not path.is_file():
        return f"{path.parent} has no {path.name}: it is not a model directory"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return f"{path}:{error.lineno}: not JSON: {error.msg}"
    except (OSError, UnicodeDecodeError) as error:
        return f"{path}: cannot be read: {error}"
    return content if isinstance(content, dict) else f"{path}: not a JSON object"


def _config_of(model: ModelConfig) -> Mapping[str, Any]:
    """The ``config.json`` of a model on this machine; empty where there is none to read."""
    content = _read_json(Path(model.path) / "config.json") if model.path is not None else {}
    return content if isinstance(content, dict) else {}


# ----------------------------------------------------------------------------------------------------------------- ppo


def _same_tokenizers(config: PpoConfig) -> Iterator[Problem]:
    """Critic and reference read the policy's token ids, so they must have the policy's tokenizer."""
    policy = config.policy.model
    others = [] if config.critic is None else [("critic", config.critic.model)]
    if config.reference is not None:
        others.append(("reference", config.reference.model))
    for key, model in others:
        if _tokenizers_differ(policy, model):
            yield (
                f"{key}.model",
                f"its tokenizer ({_origin(model)}) is not the policy's ({_origin(policy)}), whose token ids the {key} "
                "reads: start it from a model with the same tokenizer",
            )


def _origin(model: ModelConfig) -> str:
    if model.make is not None:
        return f"made from {model.make.tokenizer_from}, {model.make.vocabulary} tokens"
    return str(model.path)


def _tokenizers_differ(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two tokenizers are known to differ; one that only a hub or a later step has is not known."""
    if one.make is not None and other.make is not None:
        makes = one.make, other.make
        if one.make.tokenizer_from == "world":
            return other.make.tokenizer_from != "world"
        return len({(make.tokenizer_from, make.vocabulary) for make in makes}) > 1
    if one.path is None or other.path is None or one.path == other.path:
        return False
    files = Path(one.path) / "tokenizer.json", Path(other.path) / "tokenizer.json"
    if not all(isinstance(_read_json(file), dict) for file in files):  # reported where the models are checked
        return False
    return not same_tokenizer_files(*files)


def _rollout_serves(config: PpoConfig) -> Iterator[Problem]:
    rollout, model = config.rollout, _config_of(config.policy.model)
    heads, positions = model.get("num_attention_heads"), model.get("max_position_embeddings")
    if isinstance(heads, int) and heads % rollout.tensor_parallel:
        parallel = rollout.tensor_parallel
        yield (
            "rollout.tensor_parallel",
            f"{parallel} does not divide the {heads} attention heads of {config.policy.model.path}",
        )
    if isinstance(positions, int) and rollout.max_model_tokens > positions:
        tokens = rollout.max_model_tokens
        yield (
            "rollout.max_model_tokens",
            f"{tokens} is more than {config.policy.model.path} reads: lower it to {positions}",
        )


def _reward_problems(config: PpoConfig) -> Iterator[Problem]:
    for key, source in config.reward.sources.items():
        if source.function is not None:
            yield from ((f"{key}.function", text) for text in function_problems(source.function))
        yield from _token_problems(f"{key}.token_file", source.token_file)

    if config.evaluation.gold is not None:
        yield from (("evaluation.gold", text) for text in function_problems(config.evaluation.gold))


def _stop_token_problems(config: PpoConfig) -> Iterator[Problem]:
    """Each stop token must be one token of the policy's tokenizer, where it lies here already."""
    path = config.policy.model.path
    file = Path(path or "") / "tokenizer.json"
    if not config.rollout.stop_tokens or path is None or not file.is_file():
        return
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # what is wrong with it is told where the model is looked at, and by loading it
        return
    for text in config.rollout.stop_tokens:
        count = len(tokenizer.encode(text, add_special_tokens=False).ids)
        if count != 1:
            yield "rollout.stop_tokens", not_one_token(text, count).partition(": ")[2]


def not_one_token(text: str, count: int) -> str:
    """What is wrong with a stop token of which the tokenizer makes ``count`` tokens, or none that it knows."""
    return (
        f"rollout.stop_tokens: {text!r} is not one token of the policy's tokenizer ({count} tokens): name one that it has, "
        "such as '<|im_end|>' of ChatML models"
    )


def function_problems(name: str) -> Iterator[str]:
    """What is wrong with ``path.py:name``; a function in a package is looked for where it is imported."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        return
    path = Path(file)
    if not path.is_file():
        yield f"{path} does not exist: name a Python file, as path.py:name"
        return
    try:
        names = list(_names(ast.parse(path.read_text())))
    except SyntaxError as error:
        yield f"{path}:{error.lineno}: not Python: {error.msg}"
        return
    if function not in names:
        yield f"{path} defines no {function!r}; it defines {', '.join(names) or 'nothing'}"


def _names(module: ast.Module) -> Iterator[str]:
    """What importing ``module`` would define, as far as its text says."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


# ------------------------------------------------------------------------------------------------------------- the rest


def _data_paths(data: DataConfig) -> Iterator[tuple[str, str]]:
    """Every file of rows after its key, as far as the section goes."""
    found = [("data.path", data.__dict__.get("path")), ("data.evaluation_path", data.__dict__.get("evaluation_path"))]
    for name, source in data.__dict__.get("sources", {}).items():
        found.append((f"data.sources.{name}.path", source.__dict__.get("path")))
    yield from ((key, path) for key, path in found if path is not None)


def _row_reader(config: Section, data: DataConfig, source: SourceConfig) -> RowReader[Any]:
    """What the job reads the rows of a file with."""
    if isinstance(config, RewardModelConfig):
        return data.preference_reader(source)
    if isinstance(config, SftConfig):
        return data.demonstration_reader(source)
    return data.prompt_reader(source)


def _data_problems(config: Section, data: DataConfig) -> Iterator[Problem]:
    files = [(f"data.sources.{name}.path" if name else "data.path", file) for name, file in data.files.items()]
    if data.evaluation_file is not None:
        key = "data.evaluation_split" if data.evaluation_path is None else "data.evaluation_path"
        files.append((key, data.evaluation_file))
    for key, source in files:
        if _on_hub(source.path):
            continue
        path = Path(source.path)
        if not path.exists():
            yield key, f"{path} does not exist: name a data file, as in {key}=pairs.jsonl.gz"
        elif problem := first_problem(source.rows, _row_reader(config, data, source)):
            yield key, problem
    if isinstance(config, RewardModelConfig) and config.normalization.demonstrations_path is not None:
        yield from _demonstration_problems(Path(config.normalization.demonstrations_path), data)


def _demonstration_problems(path: Path, data: DataConfig) -> Iterator[Problem]:
    key = "normalization.demonstrations_path"
    if not path.exists():
        yield key, f"{path} does not exist: name a file whose rows have a prompt and an answer"
        return
    if problem := first_problem(path, DemonstrationReader(data.prompt_key, data.answer_key)):
        yield key, problem


def _context_problems(key: str, model: ModelConfig, data: DataConfig) -> Iterator[Problem]:
    """The longest row must fit the positions that the model knows, where it lies here."""
    positions = _config_of(model).get("max_position_embeddings")
    if isinstance(positions, int) and data.max_tokens > positions:
        yield "data.max_tokens", f"{data.max_tokens} is more than {model.path} reads ({key}): lower it to {positions}"


def _root_problems(config: Section) -> Iterator[Problem]:
    if isinstance(config, SftConfig | RewardModelConfig | PpoConfig) and Path(config.run.root).is_file():
        yield "run.root", f"{config.run.root} is a file, but runs are written under a directory: name another"


def _token_problems(key: str, name: str | None) -> Iterator[Problem]:
    if name is None:
        return
    path = Path(name)
    if not path.is_file():
        yield key, f"{path} does not exist: write a token into it, readable for you alone"
    elif not path.read_text().strip():
        yield key, f"{path} is empty: write a token into it"
