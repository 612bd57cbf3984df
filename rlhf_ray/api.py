"""The command line's functions for Python: train, resume, evaluate and score, and finished runs as objects.

Invariants: a call does what the command of the same name does, with the same configs and checks, and raises what the
command would print. Importing this module imports neither torch nor Ray. Calls that load a model in this process (all but
``train`` and ``resume`` by default) first set the environment variables of :mod:`rlhf_ray.environment` here, except those
that are set already.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray import environment
from rlhf_ray.errors import (
    EXIT_DONE,
    EXIT_NO_CAPACITY,
    EXIT_RESUMABLE,
    EXIT_WRONG_REQUEST,
    SIGNALLED,
    CapacityError,
    Interrupted,
    RequestError,
    ResumableStop,
    RlhfRayError,
)

if TYPE_CHECKING:
    import pandas

    from rlhf_ray.config.jobs.base import Job
    from rlhf_ray.config.jobs.serve import ServeConfig
    from rlhf_ray.launch.evaluate_data import DataReport
    from rlhf_ray.launch.reward_report import RewardReport
    from rlhf_ray.launch.sampling.figures import GenerationReport
    from rlhf_ray.launch.sampling.policy_figures import PolicyReport
    from rlhf_ray.launch.sampling.rescore import RescoreReport
    from rlhf_ray.rewards.request import ScoreResult
    from rlhf_ray.runs.directory import RunDirectory

Overrides = Mapping[str, Any]
"""Values by dotted key, such as ``{"data.path": "pairs.jsonl", "run.seed": 1}``."""

_ENDINGS: Mapping[int, type[RlhfRayError]] = {
    EXIT_WRONG_REQUEST: RequestError,
    EXIT_NO_CAPACITY: CapacityError,
    EXIT_RESUMABLE: ResumableStop,
}


class Run:
    """A run directory, to be read while the run goes on or after its end."""

    def __init__(self, directory: str | Path) -> None:
        """Open the run in ``directory``; raises :class:`RequestError` where none is."""
        from rlhf_ray.runs.directory import RunDirectory

        self._files: RunDirectory = RunDirectory.open(directory)

    @property
    def directory(self) -> Path:
        """Where the run lies."""
        return self._files.path

    @property
    def final(self) -> Path:
        """The trained model as a Hugging Face directory; it exists once the run has finished."""
        return self._files.final

    @property
    def best(self) -> Path:
        """The model of the best evaluation; it exists where an earlier evaluation was better than the last."""
        return self._files.best

    @cached_property
    def config(self) -> Job:
        """The resolved config."""
        from rlhf_ray.config.loading import load_config

        return load_config(self._files.config_path)

    @property
    def status(self) -> dict[str, str]:
        """How far the run is, as ``rlhf-ray status`` prints it."""
        from rlhf_ray.runs.reporting import status

        return status(self._files)

    def metrics(self) -> pandas.DataFrame:
        """Every logged metric: one row a step, one column a metric, NaN where a step has no value of it.

        An evaluation and the step that it follows are one row. What each metric means is in ``docs/monitoring.md``.
        """
        import pandas

        lines = pandas.DataFrame(self._files.metrics.read())
        return lines if lines.empty else lines.groupby("step").last()

    def report(self, output: str | Path | None = None, *, overwrite: bool = False) -> Path:
        """Write the HTML report, by default into the run directory, and return its path.

        A file that stands at ``output`` is refused unless ``overwrite`` allows to write over it.
        """
        from rlhf_ray.runs.reporting import write_report

        return write_report([self._files], output, overwrite=overwrite)

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"


def train(config: str | Path, overrides: Overrides | None = None, *, in_process: bool = False) -> Run:
    """Train what ``config``, a file or the name of a shipped recipe, describes, and return the finished run.

    The run has a driver process of its own, whose messages appear on standard error. With ``in_process`` everything runs
    here instead, without Ray: breakpoints work, and speed does not matter. Raises :class:`ConfigError` with every problem
    of the config, :class:`CapacityError` where the machine or cluster is too small, :class:`ResumableStop` after an
    interruption, and :class:`RlhfRayError` for other failures.
    """
    from rlhf_ray.config.loading import load_config
    from rlhf_ray.config.paths import run_directory
    from rlhf_ray.launch.in_process import train_in_process
    from rlhf_ray.launch.parent import start_run

    job = load_config(config, _texts(overrides), files=True).to_train()
    directory = run_directory(job).absolute()
    if in_process:
        train_in_process(job)
    else:
        _require_done(start_run(job), directory)
    return Run(directory)


def resume(directory: str | Path, overrides: Overrides | None = None, *, accept: Sequence[str] = ()) -> Run:
    """Go on with the run in ``directory`` from its last commit, and return it when it has finished.

    ``overrides`` change its config for the rest of the run, as far as it may change, such as ``{"steps": 80}``; ``accept``
    names keys of inputs whose content has changed on disk. A run that has finished is returned as it is.
    """
    from rlhf_ray.launch.parent import resume_run

    run = Run(directory)
    _require_done(resume_run(directory, _texts(overrides), accept), run.directory)
    return Run(run.directory)


def evaluate(
    model: str | Path,
    data: str | Path,
    overrides: Overrides | None = None,
    *,
    prompt_key: str = "prompt",
    chosen_key: str = "chosen",
    rejected_key: str = "rejected",
    apply_chat_template: bool = False,
    in_process: bool = False,
) -> RewardReport:
    """Compare what a reward model prefers with the preferences in ``data``; returns all figures.

    ``overrides`` are keys of the recipe ``serve``, such as ``{"reward.ranks": 2}``, or of how rows are read, such as
    ``{"data.bad_rows": "drop"}``. With ``in_process`` the model is loaded here, with one rank and without Ray.
    """
    from rlhf_ray.config.loading import take_rows_settings
    from rlhf_ray.launch.evaluate import evaluate_pairs
    from rlhf_ray.launch.in_process import place_for_scoring
    from rlhf_ray.rows.layouts import Keys

    rows, _ = take_rows_settings(_texts(overrides))
    reader = rows.pair_reader(Keys(prompt_key, chosen_key, rejected_key), turns=apply_chat_template)
    of_model = {key: value for key, value in (overrides or {}).items() if not key.startswith("data.")}
    config = _load_serving(model, "evaluate", of_model)
    place = place_for_scoring(config) if in_process else None
    return evaluate_pairs(config, Path(data), reader, place=place)


def evaluate_data(
    data: str | Path,
    held_out: str | Path | None = None,
    *,
    tokenizer_from: str | Path | None = None,
    max_tokens: int = 4096,
    prompt_key: str = "prompt",
    chosen_key: str = "chosen",
    rejected_key: str = "rejected",
    apply_chat_template: bool = False,
) -> DataReport:
    """Measure the preference pairs in ``data`` without a reward model, and the prompts that ``held_out`` shares with them.

    ``tokenizer_from`` is a model whose tokenizer and chat template count tokens; without one characters are counted. Pairs
    of more than ``max_tokens`` tokens are counted as dropped.
    """
    from rlhf_ray.launch.evaluate_data import DataRequest, measure_data
    from rlhf_ray.rows.layouts import Keys
    from rlhf_ray.rows.preferences import PreferenceReader

    request = DataRequest(
        Path(data),
        None if held_out is None else Path(held_out),
        PreferenceReader(Keys(prompt_key, chosen_key, rejected_key), apply_chat_template),
        tokenizer_from=None if tokenizer_from is None else str(tokenizer_from),
        max_tokens=max_tokens,
    )
    return measure_data(request)


def score(
    model: str | Path,
    items: Sequence[str | Mapping[str, Any]],
    overrides: Overrides | None = None,
    *,
    truncate: bool = False,
) -> list[ScoreResult]:
    """Score ``items`` with the reward model in ``model``; returns one result per item, in order.

    An item is a text, or a mapping with ``text``, ``messages``, ``token_ids``, or ``prompt`` and ``response``. An item that
    cannot be scored has an ``error`` instead of a ``reward``. To score a large file use ``rlhf-ray score``, which continues
    after an interruption.
    """
    from rlhf_ray.launch.score import score_items

    if isinstance(items, str | Mapping):
        raise RequestError("items is one item, a sequence of them was expected: write [item]")
    rows = [{"text": item} if isinstance(item, str) else item for item in items]
    return score_items(_load_serving(model, "score", overrides), rows, truncate=truncate)


def generate(
    model: str | Path,
    prompts: str | Path,
    output: str | Path,
    overrides: Overrides | None = None,
    *,
    samples: int = 1,
    reward: str | None = None,
    select: str | None = None,
    top: int | None = None,
    overwrite: bool = False,
    in_process: bool = False,
) -> GenerationReport:
    """Answer every row of ``prompts`` with ``model``, and write the rows that ``select`` takes to ``output``.

    ``reward`` is a reward model, the URL of a scoring service, or a function by its name. ``overrides`` are keys of the recipe
    ``generate``. All answers are kept beside ``output``; the same call goes on after an interruption. With ``in_process``
    everything runs here, without Ray.
    """
    from rlhf_ray.launch.in_process import place_for_generating
    from rlhf_ray.launch.sampling.generate import generate as generate_all
    from rlhf_ray.launch.sampling.request import generate_config
    from rlhf_ray.storage import OutputFile

    environment.prepare(environment.for_process(hub=environment.is_hub_id(str(model))))
    keys: dict[str, Any] = {"samples": samples, "select": select, "top": top}
    config = generate_config(model, prompts, reward=reward, overrides=_texts(overrides), **keys)
    place = place_for_generating(config) if in_process else None
    return generate_all(config, OutputFile(Path(output), "output", overwrite=overwrite, ending=".jsonl"), place=place)


def evaluate_policies(
    model: str | Path,
    prompts: str | Path,
    output: str | Path,
    overrides: Overrides | None = None,
    *,
    reward: str,
    against: str | Path | None = None,
    samples: int = 1,
    pass_at: Sequence[int] = (),
    overwrite: bool = False,
    in_process: bool = False,
) -> PolicyReport:
    """Answer every row of ``prompts`` with ``model``, and with ``against`` too, and compare their rewards.

    ``reward`` and ``overrides`` are those of :func:`generate`; ``pass_at`` holds the k of each pass@k. Returns all figures, and
    writes them to ``output``, a .json file, with a page and all answers beside it; the same call goes on after an
    interruption. With ``in_process`` everything runs here, without Ray.
    """
    from rlhf_ray.launch.in_process import place_for_generating
    from rlhf_ray.launch.sampling.policies import PolicyEvaluation
    from rlhf_ray.launch.sampling.policies import evaluate_policies as evaluate_all
    from rlhf_ray.launch.sampling.request import generate_config
    from rlhf_ray.storage import OutputFile

    models = [model] if against is None else [model, against]
    environment.prepare(environment.for_process(hub=any(environment.is_hub_id(str(one)) for one in models)))
    texts = _texts({"run.name": "evaluate", **(overrides or {})})
    configs = [generate_config(one, prompts, reward=reward, overrides=texts, samples=samples) for one in models]
    places = [place_for_generating(config) if in_process else None for config in configs]
    file = OutputFile(Path(output), "output", overwrite=overwrite, reads=(Path(prompts),), ending=".json")
    return evaluate_all(PolicyEvaluation(configs, sorted({*pass_at})), file, places=places)


def rescore(run: str | Path, reward: str, overrides: Overrides | None = None) -> RescoreReport:
    """What ``reward`` makes of the samples of a PPO run, or of a file in which ``generate`` kept its answers.

    ``reward`` is a reward model, the URL of a scoring service, or a function by its name.
    """
    from rlhf_ray.launch.sampling.request import other_reward, rescore_samples

    environment.prepare(environment.for_process(hub=environment.is_hub_id(reward)))
    return rescore_samples(run, other_reward(reward, _texts(overrides)))


def _load_serving(model: str | Path, name: str, overrides: Overrides | None) -> ServeConfig:
    """The recipe ``serve`` for ``model``: it says how a reward model that only scores is loaded."""
    from rlhf_ray.config.jobs.serve import ServeConfig
    from rlhf_ray.config.loading import load_job

    environment.prepare(environment.for_process(hub=environment.is_hub_id(str(model))))
    keys = {"reward.model.path": str(model), "run.name": name, **(overrides or {})}
    return load_job(ServeConfig, "serve", _texts(keys), files=True)


def _texts(overrides: Overrides | None) -> list[str]:
    """Overrides as the command line writes them; JSON is YAML too."""
    if not isinstance(overrides, Mapping | None):
        example = '{"run.seed": 1}'
        raise RequestError(f"overrides is a {type(overrides).__name__}, a mapping was expected, such as {example}")
    return [f"{key}={json.dumps(value, default=partial(_plain, key))}" for key, value in (overrides or {}).items()]


def _plain(key: str, value: Any) -> Any:
    """A path as text, and what NumPy or torch computed as plain numbers or lists of them."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(to_list := getattr(value, "tolist", None)):
        return to_list()
    raise RequestError(
        f"{key}: a {type(value).__name__} cannot stand in a config: give a number, a text, a list or a mapping"
    )


def _require_done(code: int, directory: Path) -> None:
    """Raise the error of an exit code; its message is on standard error already."""
    if code > SIGNALLED:
        raise Interrupted(code - SIGNALLED)
    if code != EXIT_DONE:
        raise _ENDINGS.get(code, RlhfRayError)(
            f"{directory}: the run ended with exit code {code}; its last messages on standard error say why"
        )
