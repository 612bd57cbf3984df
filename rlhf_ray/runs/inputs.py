"""What a run is made from besides its config: its data, its models and the user's own code, by their content.

Invariants: the fingerprints of all inputs are kept when the run begins, and compared whenever it goes on. An input whose
content is another than that which the run knows is refused by its key, with both fingerprints and the way out, unless the
change was accepted, or its key was changed to something that may be another thing. Other weights below an adapter that the run
trains cannot be accepted: each checkpoint was made on the weights that the run began with.

What lies at a URL or in an installed package has no fingerprint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.config.keys import join
from rlhf_ray.config.paths import PYTHON_OBJECT
from rlhf_ray.config.sections.base import Section
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ConfigError, RequestError, RlhfRayError
from rlhf_ray.models.weights.fingerprint import fingerprint_model
from rlhf_ray.rows.sources import RowSource, content_files
from rlhf_ray.runs.changes import Change
from rlhf_ray.runs.record import Inputs
from rlhf_ray.storage.fingerprint import Fingerprint, fingerprint_content

SHOWN_FILES = 3
WEIGHT_FILES = (".safetensors", "adapter_config.json")
"""How the names of files end that decide the weights of a model."""


@dataclass(frozen=True)
class Accepted:
    """An input whose content changed between two attempts, which the user accepted."""

    key: str
    before: Fingerprint
    after: Fingerprint

    def to_json(self) -> dict[str, str]:
        """As it stands in ``attempts.jsonl``."""
        return {"key": self.key, "from": self.before.digest, "to": self.after.digest}


def fingerprint_inputs(config: TrainingJob) -> dict[str, Fingerprint]:
    """The fingerprints of everything that ``config`` names, as it is on disk now. Every byte is read.

    What cannot be read has none, which is said: whoever needs it says more.
    """
    inputs = {}
    for key, take in _inputs(config):
        try:
            inputs[key] = take()
        except RlhfRayError as error:
            get_logger("runs").warning("%s has no fingerprint: %s", key, error)
    return inputs


def _inputs(config: TrainingJob) -> Iterator[tuple[str, Callable[[], Fingerprint]]]:
    """The key of each input, and what takes its fingerprint."""
    for key, source in _sources(config):
        yield key, partial(_fingerprint_rows, source)
    for key, model in config.model_sections():
        yield join(key, "path" if model.make is None else "make.tokenizer_from"), partial(fingerprint_model, model)
    for key, name in _own_code(config, ""):
        yield key, partial(fingerprint_content, [Path(name.rpartition(":")[0])], name)


def _fingerprint_rows(source: RowSource) -> Fingerprint:
    return fingerprint_content(content_files(source), str(source))


def _sources(config: TrainingJob) -> Iterator[tuple[str, RowSource]]:
    """The key of each source of rows."""
    data = config.data
    for name, source in data.files.items():
        yield f"data.sources.{name}.path" if name else "data.path", source.rows
    held_out = data.evaluation_file
    if held_out is not None and (data.evaluation_path is not None or held_out.rows.is_on_hub):
        yield "data.evaluation_split" if data.evaluation_path is None else "data.evaluation_path", held_out.rows
    for key, path in config.further_data_paths():
        yield key, RowSource(path)


def frozen_models(config: TrainingJob) -> set[str]:
    """The keys of the models whose weights stay as they are while the run trains an adapter on them."""
    trained = {f"{key}.model" for key, role in config.roles().items() if role.trained}
    return {join(key, "path") for key, model in config.model_sections() if key in trained and model.lora is not None}


def compare_inputs(
    known: Inputs | None,
    now: Inputs,
    *,
    run: Path,
    changes: Sequence[Change] = (),
    accept: Collection[str] = (),
    frozen: Collection[str] = (),
) -> list[Accepted]:
    """The changed inputs that were accepted; raises :class:`ConfigError` with each one that was not.

    ``known`` is none for a run that kept no fingerprints: that is said, and nothing is refused. Other weights of the models
    in ``frozen`` are refused even if they were accepted.
    """
    strange = sorted(set(accept) - now.keys())
    if strange:
        raise RequestError(
            f"--accept {strange[0]}: this is no input of the run {run}: its inputs are {', '.join(sorted(now)) or 'none'}"
        )
    if known is None:
        names = ", ".join(sorted(now)) or "its inputs"
        get_logger("runs").warning(
            "%s kept no fingerprints when it began, so nobody knows whether these are as they were then: %s", run, names
        )
        return []
    differing = [Accepted(key, known[key], now[key]) for key in now if key in known and known[key] != now[key]]
    replaced = [change.key for change in changes if change.rule.kind == "said"]
    lasting = {one.key for one in differing if one.key in frozen and _has_other_weights(one)}
    taken = {*accept} - lasting
    refused = [one for one in differing if one.key not in taken and not _is_within(one.key, replaced)]
    if refused:
        moved = {change.key: change for change in changes}
        raise ConfigError(
            [_refusal(one, run, moved.get(one.key), lasting=one.key in lasting) for one in refused], str(run)
        )
    return [one for one in differing if one.key in taken]


def _has_other_weights(one: Accepted) -> bool:
    """Whether files of weights differ. Of a hub's model only the commit is known, which may be another for other files."""
    return any(name.endswith(WEIGHT_FILES) for name in one.before.changed_files(one.after))


def _refusal(one: Accepted, run: Path, moved: Change | None, *, lasting: bool) -> str:
    """What changed, and what to do; ``moved`` is the change of the path itself, if there is one.

    What is ``lasting`` cannot be accepted.
    """
    files = [name for name in one.before.changed_files(one.after) if re.search(r"[^\W_]", name)]
    several = len(one.before.files) > 1 or len(one.after.files) > 1
    more = f" and {len(files) - SHOWN_FILES} more" if len(files) > SHOWN_FILES else ""
    where = f" (in {', '.join(files[:SHOWN_FILES])}{more})" if several else ""
    if moved is not None:
        what, back = f"{moved.after} does not hold what {moved.before} held", "Name a copy of that"
    else:
        what, back = "what lies there has changed since the run took it up", "Put the earlier content back"
    commit = dict(one.before.files).get("commit")
    if commit is not None and commit != dict(one.after.files).get("commit"):
        back = f"Name the earlier commit ({one.key.removesuffix('path')}revision={commit})"
    differs = f"{one.key}: {what}{where}: the fingerprint was {one.before} and is {one.after}. {back}, or "
    if lasting:
        return (
            f"{differs}start a new run: other weights cannot be accepted here, since the adapter in each checkpoint was "
            "trained on those of the run"
        )
    return f"{differs}go on with the new content: rlhf-ray resume {run} --accept {one.key}"


def _is_within(key: str, changed: Collection[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in changed)


def _own_code(section: Section, at: str) -> Iterator[tuple[str, str]]:
    """The key and the value of every ``path.py:name`` in a config; free parameters are not looked into."""
    for name in type(section).model_fields:
        key, value = join(at, name), section.__dict__.get(name)
        if isinstance(value, Section) and name != "parameters":
            yield from _own_code(value, key)
        elif isinstance(value, Mapping) and name != "parameters":
            for entry, inner in value.items():
                if isinstance(inner, Section):
                    yield from _own_code(inner, join(key, entry))
        elif isinstance(value, str) and PYTHON_OBJECT.fullmatch(value):
            yield key, value
