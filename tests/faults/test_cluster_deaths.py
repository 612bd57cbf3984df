"""Real runs whose raylet or GCS is killed, and real processes that are stopped or hang: `make faults`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import cluster_deaths, detection


@pytest.mark.long
@pytest.mark.parametrize("name", cluster_deaths.DEATHS)
def test_a_run_whose_raylet_or_gcs_dies_ends_or_goes_on_as_configured(tmp_path: Path, name: str) -> None:
    seconds, troubles = cluster_deaths.troubles(cluster_deaths.DEATHS[name], tmp_path)
    assert not troubles and seconds < cluster_deaths.WITHIN_S


@pytest.mark.long
@pytest.mark.parametrize("name", detection.CASES)
def test_a_process_that_is_stopped_or_hangs_is_found_out_in_time(tmp_path: Path, name: str) -> None:
    found = detection.find(detection.CASES[name], tmp_path)
    assert not found.troubles and found.seconds <= detection.WITHIN_S
