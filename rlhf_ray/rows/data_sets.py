"""Rows of data sets that the ``datasets`` library reads: folders of data files, folders it saved, and data sets of a hub.

Single files are read by :mod:`rlhf_ray.rows.formats` instead, which names the line of what is wrong and takes every value as
it is written; the library names no line, and guesses types (docs/configuration.md lists what that does to rows).

Invariants: rows come in the library's order, and what it says about a row's content is never repeated; a folder is read
where it lies, and only a data set of a hub, or a slice of a folder, is copied into the library's own cache.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_ray.console import get_logger
from rlhf_ray.errors import DataError
from rlhf_ray.rows.formats import READERS

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset

Result = TypeVar("Result")

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files by which a folder is known that ``save_to_disk`` wrote: one split, or several."""
USUAL_SPLIT = "train"
FILES_SHOWN = 10
"""How many files that are left out are named in the log."""


def data_set_rows(path: str, config: str | None, split: str | None, *, on_hub: bool) -> Iterator[dict[str, Any]]:
    """The rows of one split; opened at once, read as far as they are taken."""
    data_set = _open(path, config, split, on_hub=on_hub)
    rows = iter(data_set)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _unreadable(path, error) from error
        yield dict(row)


def split_names(path: str, config: str | None) -> list[str]:
    """The names of all splits, in the data set's order; of a saved data set of one split none."""
    folder = Path(path)
    if (folder / SAVED).is_file():
        return []
    if (folder / SAVED_SPLITS).is_file():
        return list(_try(path, lambda: _library().load_from_disk(path)))
    return _split_names(_builder(path, config))


def downloaded_files(path: str, config: str | None, split: str | None) -> list[Path]:
    """The files into which a data set of a hub was copied, in the order of its rows."""
    data_set = _open_hub(path, config, split)
    return [Path(file["filename"]) for file in data_set.cache_files]


def _open(path: str, config: str | None, split: str | None, *, on_hub: bool) -> Dataset | IterableDataset:
    if on_hub:
        return _open_hub(path, config, split)
    folder = Path(path)
    if (folder / SAVED).is_file() or (folder / SAVED_SPLITS).is_file():
        return _open_saved(folder, config, split)
    return _open_folder(folder, config, split)


def _open_hub(path: str, config: str | None, split: str | None) -> Dataset:
    builder = _builder(path, config)
    chosen = _chosen_split(path, split, _split_names(builder))
    get_logger("data").info(
        "%s: reading split %s, which is downloaded unless it is in %s", path, chosen, builder.cache_dir
    )
    return _prepared(path, builder, chosen)


def _open_folder(folder: Path, config: str | None, split: str | None) -> Dataset | IterableDataset:
    path = str(folder)
    if not any(file.is_file() for file in folder.rglob("*")):
        raise DataError(f"{path}: holds no files: name a data file, or the folder of a data set")
    builder = _builder(path, config)
    names = _split_names(builder)
    _warn_of_files_left_out(folder, builder)
    chosen = _chosen_split(path, split, names)
    if chosen not in names:  # a slice or a sum of splits, which the library cuts out of a copy only
        return _prepared(path, builder, chosen)
    with _no_import_of_torch():
        return _try(path, lambda: builder.as_streaming_dataset(split=chosen))


def _open_saved(folder: Path, config: str | None, split: str | None) -> Dataset:
    from datasets import DatasetDict

    path = str(folder)
    if config is not None:
        raise DataError(f"{path}: a saved data set has no configurations: remove config")
    saved = _try(path, lambda: _library().load_from_disk(path))
    if isinstance(saved, DatasetDict):
        return _cut(path, saved, _chosen_split(path, split, list(saved)))
    if split is None:
        return saved
    name = str(saved.split or USUAL_SPLIT)
    return _cut(path, {name: saved}, _chosen_split(path, split, [name]))


def _cut(path: str, splits: Mapping[str, Dataset], chosen: str) -> Dataset:
    """A split of a saved data set, or a slice or sum of splits, as the library reads the words."""
    from datasets import ReadInstruction, concatenate_datasets

    if chosen in splits:
        return splits[chosen]
    try:
        cuts = ReadInstruction.from_spec(chosen).to_absolute({name: len(rows) for name, rows in splits.items()})
    except (ValueError, AssertionError) as error:
        raise DataError(f"{path}: no such split as {chosen!r}: {_first_line(error)}") from error
    parts = [splits[cut.splitname].select(range(cut.from_, cut.to)) for cut in cuts]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _library() -> Any:
    """The library, quiet: its log quotes what it cannot parse."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    return datasets


@contextmanager
def _no_import_of_torch() -> Iterator[None]:
    """Keep the library from importing torch for a stream: that takes seconds and serves only torch's data loaders."""
    library_config = _library().config
    available = library_config.TORCH_AVAILABLE
    library_config.TORCH_AVAILABLE = available and "torch" in sys.modules
    try:
        yield
    finally:
        library_config.TORCH_AVAILABLE = available


def _builder(path: str, config: str | None) -> DatasetBuilder:
    """The library's builder of the data set. No row is read yet, so the library's own message about a failure quotes none."""
    library = _library()
    try:
        return library.load_dataset_builder(path, config)
    except Exception as error:
        if _is_unreachable(error):
            raise _unreachable(path, error) from error
        if _holds_no_data(error):
            raise _without_data(path) from error
        text = _first_line(error)
        if text.startswith("Config name is missing"):
            names = str(error).partition("[")[2].partition("]")[0]
            text = f"holds several configurations, one is expected: set data.config to one of {names}"
        elif text.startswith("BuilderConfig") and "not found" in text:
            text = f"{text}: set data.config to one of them, or remove it"
        else:
            text = f"the datasets library finds no data set in it: {text}"
        raise DataError(f"{path}: {text}") from error


def _split_names(builder: DatasetBuilder) -> list[str]:
    return [str(name) for name in builder.info.splits or builder.config.data_files or ()]


def _chosen_split(path: str, split: str | None, names: Sequence[str]) -> str:
    """The split that is meant: the named one, or else the only one, or else ``train``."""
    if split is None:
        if len(names) == 1 or USUAL_SPLIT in names:
            return USUAL_SPLIT if USUAL_SPLIT in names else names[0]
        raise DataError(
            f"{path}: holds several splits, one is expected: set the split (data.split, or data.evaluation_split) to one "
            f"of {', '.join(map(repr, names))}"
        )
    unknown = [part for part in split.split("+") if names and part.partition("[")[0].strip() not in names]
    if unknown:
        raise DataError(f"{path}: no split is called {unknown[0]!r}: name one of {', '.join(map(repr, names))}")
    return split


def _prepared(path: str, builder: DatasetBuilder, split: str) -> Dataset:
    """The split, downloaded and copied into the library's cache unless it lies there."""
    _try(path, builder.download_and_prepare)
    try:
        return builder.as_dataset(split=split)
    except ValueError as error:
        raise DataError(f"{path}: no such split as {split!r}: {_first_line(error)}") from error


def _try(path: str, call: Callable[[], Result]) -> Result:
    try:
        return call()
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> DataError:
    """Why rows cannot be read: what the system says, or else the kind of the error, whose text may quote the rows."""
    if _is_unreachable(error):
        return _unreachable(path, error)
    if _holds_no_data(error):
        return _without_data(path)
    causes = [cause for cause in (error, error.__cause__) if cause is not None]
    of_system = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno), None)
    if of_system is not None:
        return DataError(f"{path}: cannot be read: {_first_line(of_system)}")
    return DataError(
        f"{path}: the datasets library cannot read it ({' from '.join(type(cause).__name__ for cause in causes)}): "
        f"datasets.load_dataset({path!r}) shows why; of a single data file an error names the line"
    )


def _is_unreachable(error: Exception) -> bool:
    """Whether the hub could not be asked, or has no such data set."""
    return isinstance(error, ConnectionError) or type(error).__name__ in (
        "OfflineModeIsEnabled",
        "DatasetNotFoundError",
    )


def _unreachable(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path}: no such file or folder here, and the hub does not give a data set of this name ({_first_line(error)}): "
        "name a folder of this machine; or save the data set where there is a network, with "
        f"datasets.load_dataset({path!r}, split='train').save_to_disk('rows'), and name that folder; or let this process "
        "ask the hub, by starting it with HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0"
    )


def _holds_no_data(error: Exception) -> bool:
    return type(error).__name__ in ("DataFilesNotFoundError", "EmptyDatasetError")


def _without_data(path: str) -> DataError:
    return DataError(f"{path}: holds no data files: name a data file, or a folder of files in {', '.join(READERS)}")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _warn_of_files_left_out(folder: Path, builder: DatasetBuilder) -> None:
    """The library reads files of one format, and where some are named after splits only those."""
    used = {Path(str(file)).resolve() for files in (builder.config.data_files or {}).values() for file in files}
    present = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name.endswith(tuple(READERS))]
    left_out = [str(file.relative_to(folder)) for file in present if file.resolve() not in used]
    further = len(left_out) - FILES_SHOWN
    if left_out and builder.config.name == "default":
        get_logger("data").warning(
            "%s: the datasets library takes splits from the names of files, and one format of several: it leaves out %s",
            folder,
            ", ".join(left_out[:FILES_SHOWN]) + (f" and {further} more" if further > 0 else ""),
        )
