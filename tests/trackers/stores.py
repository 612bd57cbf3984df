"""What each tracker has of a run, read from its own store: values by step for each metric, with every point that is there."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

Points = Mapping[str, list[tuple[int, float]]]
"""Steps and values of each metric, in the order in which they were written."""


def gathered(points: Iterable[tuple[str, int, float]]) -> Points:
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for name, step, value in points:
        found[name].append((step, value))
    return dict(found)


def of_jsonl(path: Path) -> Points:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    known = ("run", "id", "step", "timestamp")
    return gathered((name, line["step"], line[name]) for line in lines for name in line if name not in known)


def of_tensorboard(directory: Path) -> Points:
    """As TensorBoard itself reads it, event by event, files in the order in which they were begun."""
    from tensorboard.backend.event_processing.directory_watcher import DirectoryWatcher
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.backend.event_processing.io_wrapper import IsTensorFlowEventsFile
    from tensorboard.util.tensor_util import make_ndarray

    watcher = DirectoryWatcher(str(directory), EventFileLoader, IsTensorFlowEventsFile)
    events = [event for event in watcher.Load() if event.summary.value]
    return gathered(
        (value.tag, event.step, float(make_ndarray(value.tensor))) for event in events for value in event.summary.value
    )


def of_wandb(folder: Path) -> Points:
    """Of all files of one run, by wandb's own class of records."""
    from wandb.proto import wandb_internal_pb2

    from rlhf_ray.trackers.wandb_files import records

    points = []
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for raw in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(raw)
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    points.append((name, record.history.step.num, float(json.loads(item.value_json))))
    return gathered(points)


def of_mlflow(uri: str, project: str = "rlhf-ray") -> Points:
    """Of the one run that there is, by mlflow's client."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(project)
    (run,) = client.search_runs([experiment.experiment_id])
    return gathered(
        (name, point.step, point.value)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    )


def of_trackio(directory: Path, project: str = "rlhf-ray") -> Points:
    """Of the one run that there is, from the database."""
    with sqlite3.connect(directory / f"{project}.db") as database:
        rows = database.execute("SELECT step, metrics, run_name FROM metrics ORDER BY id").fetchall()
    assert len({name for _, _, name in rows}) == 1
    return gathered((name, step, float(value)) for step, text, _ in rows for name, value in json.loads(text).items())
