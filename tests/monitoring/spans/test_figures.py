"""The figures of a step come from the files of the attempt that is under way, of which no more is kept than a step needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.monitoring.spans.figures import StepFigures
from rlhf_ray.monitoring.spans.reading import CLOCKS_DIFFER_US
from rlhf_ray.processes import spans


@pytest.mark.parametrize("own", [True, False], ids=["its own file is there", "its own file is missing"])
def test_what_ended_long_before_a_step_is_forgotten(own: bool, tmp_path: Path) -> None:
    driver = spans.Recorder(tmp_path, "driver")
    rank = spans.Recorder(tmp_path, "policy/0", driver=driver.name)
    now = spans.now_us()
    if own:
        driver.add("update", "phase", now, now + 100)
    figures = StepFigures(tmp_path, driver.name)
    for step in range(5):
        begin = now + 10 * step * CLOCKS_DIFFER_US
        rank.add("apply", "call", begin + 10, begin + 60)
        assert bool(figures.measure(begin, begin + 100)) is own
        figures._next_look = 0.0
    (file,) = [file for file in figures._files.files.values() if file.header["lane"] == "policy/0"]
    assert len(file.spans) == 1
    assert set(figures._files.files) == {rank.name, *([driver.name] if own else [])}


def test_the_figures_of_a_run_that_goes_on_are_those_of_its_own_processes(tmp_path: Path) -> None:
    before = spans.Recorder(tmp_path, "driver", driver="driver.1.1")
    before.add("update", "phase", 0, 100)
    before.path.rename(before.path.with_stem("driver.1.1"))  # as of one that began earlier
    spans.Recorder(tmp_path, "critic/0", driver="driver.1.1").add("apply", "call", 0, 100)
    driver = spans.Recorder(tmp_path, "driver")
    driver.add("update", "phase", 0, 100)
    figures = StepFigures(tmp_path, driver.name)
    assert figures.measure(0, 100) == {"critical_path/driver": pytest.approx(1e-4)}
    assert set(figures._files.files) == {driver.name}
