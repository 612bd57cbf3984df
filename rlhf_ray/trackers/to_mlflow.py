"""Send rows to MLflow: a server, or a database on this machine (by default ``mlflow.db`` beside the run directory).

Invariants: a curve is one run of MLflow, found by its tag, so that no kill makes a second one. What is sent twice is kept once:
points carry the times of ``metrics.jsonl``. The metric ``step`` comes last of its step, so that MLflow's latest value of it is
the last step that is there whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from rlhf_ray.trackers.base import Curve
from rlhf_ray.trackers.rows import Row

TAG = "rlhf_ray.run"
LAST = "step"
METRICS_A_CALL, PARAMS_A_CALL = 1000, 100
"""What a server may be sent at once."""
LONGEST = 6000
"""Letters of a parameter."""


class MlflowTracker:
    """An experiment of the name of the project, with a run for each curve."""

    def __init__(self, place: str) -> None:
        self._uri = place or os.environ.get("MLFLOW_TRACKING_URI", "")
        self._held: list[list[Metric]] = []
        self._client: Any = None
        self._run = ""

    def open(self, curve: Curve) -> int:
        self._client = MlflowClient(tracking_uri=self._uri or default_uri(curve.directory))
        experiment = self._experiment(curve.project)
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{curve.unique}'", max_results=1)
        if found:
            run = found[0]
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = self._client.create_run(experiment, run_name=curve.name, tags={TAG: curve.unique})
        self._run = run.info.run_id
        if not run.data.params:
            params = [Param(key, str(value)[:LONGEST]) for key, value in curve.config.items()]
            for first in range(0, len(params), PARAMS_A_CALL):
                self._client.log_batch(self._run, params=params[first : first + PARAMS_A_CALL])
        return int(run.data.metrics.get(LAST, -1))

    def _experiment(self, name: str) -> str:
        known = self._client.get_experiment_by_name(name)
        if known is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run has made it meanwhile
                known = self._client.get_experiment_by_name(name)
                if known is None:
                    raise
        return str(known.experiment_id)

    def log(self, row: Row) -> None:
        at = round(1000 * row.timestamp)
        values = {**row.values, LAST: float(row.step)}
        self._held.append([Metric(name, value, at, row.step) for name, value in values.items()])

    def flush(self) -> None:
        """Send whole rows, as many at once as a server takes."""
        call: list[Metric] = []
        held, self._held = self._held, []
        for row in held:
            if call and len(call) + len(row) > METRICS_A_CALL:
                self._client.log_batch(self._run, metrics=call)
                call = []
            call += row
        if call:
            self._client.log_batch(self._run, metrics=call)

    def close(self, *, finished: bool) -> None:
        self.flush()
        self._client.set_terminated(self._run, status="FINISHED" if finished else "KILLED")


def default_uri(directory: Path) -> str:
    """One database for all runs of a root, so that MLflow compares them."""
    return f"sqlite:///{directory.parent / 'mlflow.db'}"
