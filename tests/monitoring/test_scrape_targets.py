"""What a run tells Prometheus stands there for as long as the run lives, and nothing of a run that is gone does."""

from __future__ import annotations

import fcntl
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from rlhf_ray.monitoring.scrape_targets import published

OTHER = """
import sys, pathlib
from rlhf_ray.monitoring.scrape_targets import published
with published(pathlib.Path(sys.argv[1]), "127.0.0.1:2") as path:
    print(path, flush=True)
    sys.stdin.read()
"""


def test_the_page_is_named_until_the_end_in_a_file_that_prometheus_reads(tmp_path: Path) -> None:
    with published(tmp_path, "127.0.0.1:1") as path:
        assert json.loads(path.read_text()) == [{"labels": {"job": "ray"}, "targets": ["127.0.0.1:1"]}]
        assert [*tmp_path.glob("rlhf_ray_targets_*.json")] == [path] == [*tmp_path.iterdir()]
    assert not [*tmp_path.iterdir()]


def test_what_a_dead_writer_left_goes_and_what_another_one_holds_stays(tmp_path: Path) -> None:
    others = [
        subprocess.Popen(
            [sys.executable, "-c", OTHER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    ray = tmp_path / "prom_metrics_service_discovery.json"
    ray.write_text("[]")
    first, second = (Path((other.stdout or sys.stdin).readline().strip()) for other in others)
    others[0].kill()
    others[0].wait(30)
    assert first.exists()
    with published(tmp_path, "127.0.0.1:1") as own:
        assert {*tmp_path.iterdir()} == {own, second, ray}
    others[1].communicate(timeout=30)
    assert [*tmp_path.iterdir()] == [ray]


def test_a_file_whose_writer_was_killed_before_it_was_whole_goes_too(tmp_path: Path) -> None:
    killed, just_begun, written = (tmp_path / f"rlhf_ray_targets_{number}.partial" for number in (1, 2, 3))
    for partial in (killed, just_begun, written):
        partial.write_text("[")
    for partial in (killed, written):
        os.utime(partial, (1e9, 1e9))
    with written.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with published(tmp_path, "127.0.0.1:1"):
            assert {*tmp_path.glob("*.partial")} == {just_begun, written}


def test_a_place_that_cannot_be_written_to_costs_a_warning(tmp_path: Path, project_log: io.StringIO) -> None:
    with published(tmp_path / "none", "127.0.0.1:1") as path:
        assert not path.exists()
    assert f"Prometheus does not see this run: {path} cannot be written" in " ".join(project_log.getvalue().split())
