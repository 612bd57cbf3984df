"""The ``data`` section: where the rows of a job come from, and what reads them.

Invariant: exactly one of the generated world, a file, and several files by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from rlhf_ray.config.sections.base import Fraction, NonNegative, Positive, PositiveFloat, Section
from rlhf_ray.rows.demonstrations import DemonstrationReader, TrainOn
from rlhf_ray.rows.formats import is_file_name
from rlhf_ray.rows.judged import LABEL, JudgedReader
from rlhf_ray.rows.labels import LabelReader
from rlhf_ray.rows.layouts import Keys
from rlhf_ray.rows.preferences import PreferenceReader
from rlhf_ray.rows.prompts import PromptReader
from rlhf_ray.rows.published.comparisons import Ratings
from rlhf_ray.rows.row import Columns
from rlhf_ray.rows.sources import RowSource
from rlhf_ray.rows.template_variables import variables_problem


class WorldConfig(Section):
    """The generated world (docs/world.md): how much of it to make, and from which seed."""

    seed: NonNegative = 0
    task: Literal["customers", "arithmetic"] = "customers"
    """``customers``: letters of customers, whose answers a gold score judges. ``arithmetic``: short sums, whose answers a
    function verifies."""
    raters: Literal["careless", "flattered"] = "careless"
    """Who labels the pairs: raters who err by chance, or raters who prefer the answer that flatters more."""
    demonstrations: Positive = 6000
    pairs: Positive = 12000
    evaluation_pairs: Positive = 1000
    prompts: Positive = 4000
    evaluation_prompts: Positive = 300


class SourceConfig(Section):
    """One of several files or data sets of rows; a key that is null is the one of the ``data`` section."""

    path: str
    split: str | None = None
    config: str | None = None
    weight: PositiveFloat = 1.0
    """How many times an epoch uses each row: 2 uses each twice, 0.5 one half of them and the other half in the next."""
    prompt_key: str | None = None
    answer_key: str | None = None
    chosen_key: str | None = None
    rejected_key: str | None = None
    label_key: str | None = None

    @property
    def rows(self) -> RowSource:
        """Where its rows are."""
        return RowSource(self.path, self.split, self.config)


class RowsConfig(Section):
    """What is read of a row, and what of a row that is wrong."""

    ignore_columns: list[str] = []  # noqa: RUF012 (pydantic copies it)
    """Columns that are read as if the files did not have them."""
    rename_columns: dict[str, str] = {}  # noqa: RUF012 (pydantic copies it)
    """Columns that are read under another name, such as ``{strength: margin}``."""
    ratings: Ratings = "ties"
    """What ratings of both sides of a pair say: that equal ones are a tie, also the margin, or nothing."""
    prompt_in_sides: bool | None = None
    """Whether texts beside a prompt begin with it; null: told from the row, or refused where both may be meant."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What happens to a row that is wrong: it ends the job before it starts, or is left out and counted."""

    @property
    def columns(self) -> Columns:
        """Which columns are left out or have another name."""
        return Columns(tuple(self.ignore_columns), tuple(self.rename_columns.items()))

    @property
    def drops_bad_rows(self) -> bool:
        """Whether a row that is wrong is left out and counted."""
        return self.bad_rows == "drop"

    def pair_reader(self, keys: Keys, *, turns: bool) -> PreferenceReader:
        """A reader of preference pairs under ``keys``; with ``turns`` texts become messages."""
        return PreferenceReader(
            keys,
            turns,
            self.ratings,
            self.prompt_in_sides,
            columns=self.columns,
            drops_bad_rows=self.drops_bad_rows,
        )


class DataConfig(RowsConfig):
    """The rows of a job: exactly one of ``world``, ``path`` and ``sources`` is set."""

    world: WorldConfig | None = None
    path: str | None = None
    """A data file, a folder of a data set, or ``org/name`` on a hub."""
    split: str | None = None
    """Which split of a data set holds the training rows; null: its only one, or else ``train``."""
    config: str | None = None
    """Which configuration (subset) of a data set; null where it has only one."""
    sources: dict[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")], SourceConfig] = {}  # noqa: RUF012 (pydantic copies it)
    """Several files, by names; a row that does not name its source has the name of its file."""
    evaluation_path: str | None = None
    evaluation_split: str | None = None
    """The split of ``evaluation_path``, or where that is null of ``path``, whose rows are held out."""
    evaluation_fraction: Fraction | None = None
    """Share of the training rows that is held out, by whole prompts; 0 holds out nothing."""
    shared_prompts: Literal["refuse", "drop", "keep"] = "refuse"
    """What happens to rows of ``evaluation_path`` or ``evaluation_split`` whose prompt is trained on: they end the job before
    it starts, are left out and counted, or are kept with a warning."""
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    label_key: str | None = None
    """The column that reward functions compare answers with, or a field in it; null: the one column that could be it."""
    train_on: TrainOn = "answers"
    """What is learned of a demonstration: the answers of the assistant, the last one alone, or every token."""
    apply_chat_template: bool = False
    """Whether plain texts become a conversation: the prompt a message of the user, the answer one of the assistant."""
    template_variables: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies it)
    """Variables that the chat template is given, such as ``enable_thinking``; those of a row (its column
    ``chat_template_kwargs``) win."""
    max_tokens: Positive = 512
    """Tokens of the longest training sequence, prompt included."""
    too_long: Literal["drop", "cut_prompt"] = "drop"
    """What happens to longer pairs: they are dropped and counted, or their prompt loses its beginning. An answer is never
    cut."""
    max_prompt_tokens: Positive = 256
    """Tokens of the longest prompt that answers are sampled to."""
    max_rows: Positive | None = None
    cache: str | None = "~/.cache/rlhf_ray"
    """Where encoded rows are kept for the next run over the same files; null keeps none."""

    @property
    def files(self) -> dict[str, SourceConfig]:
        """The files of training rows by the names of their sources, with all keys set; the name of ``path`` is empty."""
        names = [""] if self.path is not None else [*self.sources]
        return {name: file for name in names if (file := self.file(name)) is not None}

    def file(self, name: str) -> SourceConfig | None:
        """One file of ``files``, with all keys set; the file ``path``, if there is one, under the empty name."""
        if name:
            return self._with_keys(self.sources[name])
        if self.path is None:
            return None
        return self._with_keys(SourceConfig(path=self.path, split=self.split, config=self.config))

    @property
    def evaluation_file(self) -> SourceConfig | None:
        """The file or split of rows that are held out, if there is one."""
        path = self.evaluation_path or (self.path if self.evaluation_split is not None else None)
        if path is None:
            return None
        return self._with_keys(SourceConfig(path=path)).model_copy(update={"split": self.evaluation_split})

    def over(self, path: str) -> DataConfig:
        """The same section over all rows of another file."""
        own = (
            "world",
            "sources",
            "split",
            "config",
            "evaluation_path",
            "evaluation_split",
            "evaluation_fraction",
            "max_rows",
        )
        empty = {key: type(self).model_fields[key].default for key in own}
        return self.model_copy(update={**empty, "path": path})

    def preference_reader(self, source: SourceConfig) -> PreferenceReader:
        """A reader of preference pairs for ``source``, which is one of ``files`` or the ``evaluation_file``."""
        return self.pair_reader(_pair_keys(source), turns=self.apply_chat_template)

    def prompt_reader(self, source: SourceConfig) -> PromptReader:
        """A reader of prompts for ``source``."""
        return PromptReader(
            _pair_keys(source),
            self.apply_chat_template,
            LabelReader(source.label_key),
            columns=self.columns,
            drops_bad_rows=self.drops_bad_rows,
        )

    def demonstration_reader(self, source: SourceConfig) -> DemonstrationReader:
        """A reader of demonstrations for ``source``."""
        return DemonstrationReader(
            str(source.prompt_key),
            str(source.answer_key),
            self.apply_chat_template,
            self.train_on,
            columns=self.columns,
            drops_bad_rows=self.drops_bad_rows,
        )

    def judged_reader(self, source: SourceConfig) -> JudgedReader:
        """A reader of single answers with labels for ``source``."""
        return JudgedReader(
            str(source.prompt_key),
            str(source.answer_key),
            source.label_key or LABEL,
            self.apply_chat_template,
            self.prompt_in_sides,
            columns=self.columns,
            drops_bad_rows=self.drops_bad_rows,
        )

    def _with_keys(self, source: SourceConfig) -> SourceConfig:
        of_data_set = () if is_file_name(source.path) else ("split", "config")  # a file beside data sets has none
        keys = (*of_data_set, "prompt_key", "answer_key", "chosen_key", "rejected_key", "label_key")
        own = {key: getattr(self, key) for key in keys if getattr(source, key) is None}
        return source.model_copy(update=own)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if problem := variables_problem(self.template_variables):
            yield "template_variables", f"must be a mapping{problem}"
        origins = [name for name in ("world", "path", "sources") if getattr(self, name) not in (None, {})]
        if len(origins) > 1:
            ways = " or ".join(f"data.{name}={'{}' if name == 'sources' else 'null'}" for name in origins)
            path = f" ({self.path})" if self.path is not None else ""
            yield "", f"{' and '.join(origins)}{path} exclude each other: add {ways}"
        if not origins:
            yield "", "set one of world (the generated world: {}), path (a data file) and sources (several)"
        held_out = [name for name in ("evaluation_path", "evaluation_split") if getattr(self, name) is not None]
        if held_out and self.evaluation_fraction is not None:
            yield "", f"{held_out[0]} and evaluation_fraction exclude each other: remove one (set it to null)"
        if self.shared_prompts != "refuse" and not held_out:
            yield (
                "shared_prompts",
                f"{self.shared_prompts} is about rows of evaluation_path or evaluation_split, and neither is set: remove it",
            )
        if held_out == ["evaluation_split"] and self.path is None and self.world is None:
            yield "", "evaluation_split is a split of evaluation_path, or else of path: set one of them"
        if self.world is not None:
            yield from self._conflicts_of_world(self.world)

    def _conflicts_of_world(self, world: WorldConfig) -> Iterator[tuple[str, str]]:
        if self.evaluation_path is not None or self.evaluation_fraction is not None:
            yield "", "the generated world holds out its own rows: remove evaluation_path and evaluation_fraction"
        for key in ("split", "config", "evaluation_split"):
            if getattr(self, key) is not None:
                yield key, "the rows of the generated world are made and have no splits or configurations: remove it"
        if self.max_rows is not None:
            yield (
                "max_rows",
                f"{self.max_rows} limits a file, but the rows are made: set demonstrations, pairs or prompts",
            )
        if world.task == "arithmetic" and world.raters != "careless":
            yield "world.raters", f"{world.raters} raters judge letters, and sums have none: set it to careless"
        if self.apply_chat_template:
            yield (
                "apply_chat_template",
                "the generated world is plain text, whose words have no template: set it to false",
            )


def _pair_keys(source: SourceConfig) -> Keys:
    return Keys(str(source.prompt_key), str(source.chosen_key), str(source.rejected_key))
