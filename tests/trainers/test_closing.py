"""What fails after the last step costs nothing that was trained, and a cluster that has died is no failure any more."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.errors import EXIT_DONE, EXIT_FAILED, ClosingError, ClusterLostError, DeadRankError, RlhfRayError
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers import closing as module
from rlhf_ray.trainers.closing import closing


@pytest.mark.parametrize(
    "error", [DeadRankError("policy", 0, "log_probs", "its process died"), ValueError("lost object")]
)
@pytest.mark.parametrize("lost", [None, "the head of the Ray cluster at 127.0.0.1:6379 does not answer (refused)"])
def test_a_run_with_a_result_has_failed_only_if_its_cluster_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, lost: str | None
) -> None:
    monkeypatch.setattr(module, "lost_cluster", lambda: lost)
    with pytest.raises(RlhfRayError) as caught, closing(RunDirectory(tmp_path), 7, "the last evaluation"):
        raise error
    assert isinstance(caught.value, ClosingError) and isinstance(caught.value, ClusterLostError) == (lost is not None)
    assert caught.value.exit_code == (EXIT_FAILED if lost is None else EXIT_DONE)
    assert (lost or str(error)) in str(caught.value) and "all 7 steps are done and committed" in str(caught.value)
