"""Make the tracker that a config names.

Invariant: the package of a tracker is imported by the process that feeds it, and by no other.
"""

from __future__ import annotations

from rlhf_ray.config.trackers import Target
from rlhf_ray.trackers.base import Tracker


def make_tracker(target: Target) -> Tracker:
    """The tracker that ``target`` names."""
    if target.name == "tensorboard":
        from rlhf_ray.trackers.to_tensorboard import TensorBoardTracker

        return TensorBoardTracker(target.place)
    if target.name == "wandb":
        from rlhf_ray.trackers.to_wandb import WandbTracker

        return WandbTracker(target.place)
    if target.name == "mlflow":
        from rlhf_ray.trackers.to_mlflow import MlflowTracker

        return MlflowTracker(target.place)
    if target.name == "trackio":
        from rlhf_ray.trackers.to_trackio import TrackioTracker

        return TrackioTracker(target.place)
    from rlhf_ray.trackers.to_jsonl import JsonLinesTracker

    return JsonLinesTracker(target.place)
