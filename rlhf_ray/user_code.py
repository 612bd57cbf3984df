"""Find, load and call Python code of the user's own, which a config names.

Invariants:

- A name is ``path.py:name``, ``package.module:name``, or the name of an installed entry point; there is no other spelling.
- Looking for problems executes none of the user's code; loading executes the module once per call.
- Whatever the user's code raises while it is loaded or called becomes one :class:`RequestError` that names the config key.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from rlhf_ray.errors import RequestError

SPELLINGS = "package.module:name, path.py:name"
OBJECTIVES = "rlhf_ray.objectives"
ADVANTAGES = "rlhf_ray.advantages"
REWARD_SOURCES = "rlhf_ray.reward_sources"
COLLECTORS = "rlhf_ray.collectors"
ENVIRONMENTS = "rlhf_ray.environments"
"""Groups of entry points (``[project.entry-points."rlhf_ray.objectives"]`` in the pyproject.toml of a package)."""


def spelling_problem(name: str, shipped: tuple[str, ...], group: str | None = None) -> str | None:
    """What is wrong with ``name`` as the name of a shipped part or of code; None where it is well spelt."""
    is_code = name.count(":") == 1 and all(name.split(":"))
    if name in shipped or is_code or (group is not None and _entry_point(name, group) is not None):
        return None
    allowed = ", ".join([SPELLINGS, *shipped])
    if group is None:
        return f"{name!r} is not one of {allowed}"
    installed = ", ".join(sorted(point.name for point in entry_points(group=group))) or "none"
    return (
        f"{name!r} is not one of {allowed}, nor an installed entry point of the group {group} (installed: {installed})"
    )


def existence_problems(name: str) -> Iterator[str]:
    """Say where ``name`` leads nowhere: its file or module does not exist, is not Python, or does not define the name.

    The code is read and never executed. The name of an entry point has nothing to look at, nor has a name badly spelt.
    """
    origin, colon, attribute = name.rpartition(":")
    if not (origin and colon and attribute):  # an entry point, or badly spelt, which is a problem of its own
        return
    if origin.endswith(".py"):
        path: Path | None = Path(origin)
        if not Path(origin).is_file():
            yield f"{path} does not exist: name a Python file, as path.py:name"
            return
    else:
        exists, path = _find_module(origin)
        if not exists:
            yield f"there is no module {origin}: install its package, or name a Python file, as path.py:name"
            return
    if path is not None:
        yield from _definition_problems(path, attribute)


def required_parameters(name: str) -> frozenset[str]:
    """The parameters without a default of the function that ``name`` names, as far as its text shows; nothing is executed."""
    origin, _, attribute = name.rpartition(":")
    path = Path(origin) if origin.endswith(".py") else _find_module(origin)[1] if origin else None
    try:
        tree = ast.parse(path.read_bytes()) if path is not None else ast.Module([], [])
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    found = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == attribute
    ]
    return frozenset().union(*(_required(node.args) for node in found[-1:]))


def load_object(key: str, name: str, *, group: str | None = None, kind: str = "object") -> Any:
    """Import the object that ``name`` names at the config key ``key``; ``kind`` is the word for it in errors."""
    point = _entry_point(name, group) if group is not None and ":" not in name else None
    origin, colon, attribute = (point.value if point is not None else name).rpartition(":")
    if not colon:
        raise RequestError(f"{key} {name!r}: write it as package.module:{kind} or path.py:{kind}")
    try:
        module = _execute_file(Path(origin)) if origin.endswith(".py") else importlib.import_module(origin)
    except (Exception, SystemExit) as error:  # the module is the user's program, and fails in its own ways
        raise RequestError(f"{key} {name!r}: {origin} cannot be imported ({error!r})") from error
    value = getattr(module, attribute, None)
    if not callable(value):
        raise RequestError(f"{key} {name!r}: {origin} has no {kind} {attribute}")
    return value


def construct(key: str, name: str, factory: Callable[..., Any], parameters: Mapping[str, Any], **provided: Any) -> Any:
    """Call ``factory`` with what the run provides and with the user's ``parameters``, after :func:`check_parameters`.

    A keyword that the run provides is passed only where the factory has a parameter of that name.
    """
    accepted = check_parameters(key, name, factory, parameters, tuple(provided))
    passed = {word: value for word, value in provided.items() if word in accepted}
    try:
        return factory(**passed, **parameters)
    except Exception as error:  # the constructor is the user's program too
        raise RequestError(f"{key} {name!r}: making it with {dict(parameters)} raised {error!r}") from error


def check_parameters(
    key: str, name: str, factory: Callable[..., Any], parameters: Mapping[str, Any], provided: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Refuse ``parameters`` that ``factory`` does not take, or that it lacks beside the ``provided`` keywords.

    Returns the names of all keywords that it takes.
    """
    try:
        signature = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise RequestError(f"{key} {name!r}: its parameters cannot be read ({error})") from error
    keywords = [word for word, parameter in signature.items() if _is_keyword(parameter)]
    own = [word for word in keywords if word not in provided]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())
    unknown = [word for word in parameters if word in provided or (word not in own and not takes_any)]
    if unknown:
        raise RequestError(f"{key} {name!r}: it takes no parameter {_list(unknown)}; it takes {_list(own)}")
    missing = [word for word in own if signature[word].default is inspect.Parameter.empty and word not in parameters]
    if missing:
        raise RequestError(
            f"{key} {name!r}: it needs the parameter {_list(missing)}: add it to the parameters in the config"
        )
    by_position = [
        word
        for word, parameter in signature.items()
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty
    ]
    if by_position:
        raise RequestError(
            f"{key} {name!r}: its parameter {_list(by_position)} cannot be given by name: remove the '/'"
        )
    return (*keywords, *(provided if takes_any else ()))


def accepts(function: Any, *names: str) -> bool:
    """Whether ``function`` can be called with one positional argument for each of ``names``."""
    try:
        inspect.signature(function).bind(*names)
    except (TypeError, ValueError):
        return False
    return True


def attribute_of(value: Any, name: str) -> Any:
    """The attribute ``name`` of an object of the user's; None where it has none."""
    return getattr(value, name, None)


def _required(parameters: ast.arguments) -> frozenset[str]:
    by_position = [*parameters.posonlyargs, *parameters.args]
    by_name = zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)
    required = by_position[: len(by_position) - len(parameters.defaults)]
    return frozenset(
        [parameter.arg for parameter in required] + [parameter.arg for parameter, default in by_name if default is None]
    )


def _entry_point(name: str, group: str) -> EntryPoint | None:
    return next(iter(entry_points(group=group, name=name)), None)


def _is_keyword(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _list(words: list[str]) -> str:
    return ", ".join(words) or "none"


def _find_module(dotted: str) -> tuple[bool, Path | None]:
    """Whether there is such a module, and the file of its source; no package is imported on the way."""
    places: list[str] | None = [*sys.path, str(Path.cwd())]
    path = None
    for end in range(1, dotted.count(".") + 2):
        part = ".".join(dotted.split(".")[:end])
        spec = PathFinder.find_spec(part, places)
        if spec is None:
            return part in sys.builtin_module_names, None
        places = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else []
        path = Path(spec.origin) if spec.origin is not None and spec.origin.endswith(".py") else None
    return True, path


def _definition_problems(path: Path, attribute: str) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())  # bytes may say in which encoding they are
    except OSError as error:
        yield f"{path} cannot be read: {error.strerror}"
        return
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        yield f"{path}{line}: not Python: {error.msg}"
        return
    except ValueError as error:  # of null bytes, from Python 3.11 before 3.11.4
        yield f"{path}: not Python: {error}"
        return
    names = list(_defined_names(tree.body))
    unreadable = {"*", "__getattr__"} & set(names)  # the module may define more than its text shows
    if attribute not in names and not unreadable:
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        imported = {name for node in imports for name in _defined_names([node])}
        own = [name for name in names if name not in imported]
        yield f"{path} defines no {attribute!r}; it defines {', '.join(own) or 'nothing'}"


def _defined_names(statements: list[ast.stmt]) -> Iterator[str]:
    """The names that these statements define when a module is imported, as far as the text shows."""
    for node in statements:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))
        elif isinstance(node, ast.If | ast.Try | ast.With):
            inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            handlers = node.handlers if isinstance(node, ast.Try) else []
            yield from _defined_names([*inner, *(child for handler in handlers for child in handler.body)])


def _execute_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]  # files of one name in two directories
    spec = importlib.util.spec_from_file_location(f"rlhf_ray_user_{path.stem}_{digest}", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    # Compiled here: the loader takes what it compiled before of a file with the same size and second of change.
    exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    return module
