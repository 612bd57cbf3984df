"""The script that starts what is installed of Prometheus, Alertmanager and Grafana: with stand-ins of these three programs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "monitoring" / "start.sh"
STAND_IN = """#!/bin/sh
echo "$0 $* $GF_PATHS_LOGS $GF_PATHS_PLUGINS $GF_PATHS_PROVISIONING" > "$SAID/$(basename "$0")"
exec sleep 60
"""


def begin(directory: Path, programs: dict[str, str]) -> subprocess.Popen[str]:
    """The script, on a machine that has these programs and the usual ones."""
    for name in ("bin", "said"):
        (directory / name).mkdir()
    for usual in ("bash", "dirname", "mkdir", "sleep", "basename", "tail", "cat"):
        (directory / "bin" / usual).symlink_to(
            f"/bin/{usual}" if Path(f"/bin/{usual}").exists() else f"/usr/bin/{usual}"
        )
    for name, text in programs.items():
        (directory / "bin" / name).write_text(text)
        (directory / "bin" / name).chmod(0o755)
    variables = {
        "PATH": str(directory / "bin"), "SAID": str(directory / "said"), "RLHF_RAY_MONITORING_DATA": str(directory / "data"),
        "GRAFANA_HOME": str(directory / "grafana"),
    }  # fmt: skip
    return subprocess.Popen(
        [SCRIPT], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def expect_nothing_left_of(script: subprocess.Popen[str]) -> None:
    """What was ended may take a moment to go, until the first process of the machine has seen it."""
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(script.pid, 0)
            time.sleep(0.02)


def wait_for(place: Path) -> str:
    deadline = time.monotonic() + 30
    while not place.exists() or not place.read_text().endswith("\n"):
        assert time.monotonic() < deadline, f"{place.name} was not started"
        time.sleep(0.02)
    return place.read_text()


def test_what_is_installed_starts_and_ends_with_the_script_and_the_rest_is_named(tmp_path: Path) -> None:
    script = begin(tmp_path, {"prometheus": STAND_IN, "grafana": STAND_IN})
    said = {name: wait_for(tmp_path / "said" / name) for name in ("prometheus", "grafana")}
    script.send_signal(signal.SIGTERM)
    shown, _ = script.communicate(timeout=30)
    assert script.returncode == 0
    expect_nothing_left_of(script)
    assert f"--config.file={SCRIPT.parent}/prometheus.yml" in said["prometheus"]
    own, home = tmp_path / "data" / "grafana", tmp_path / "grafana"
    assert said["grafana"].split() == [
        str(tmp_path / "bin" / "grafana"), "server", "--homepath", str(home), str(own / "logs"), str(own / "plugins"),
        f"{SCRIPT.parent}/grafana/provisioning",
    ]  # fmt: skip
    assert (own / "logs").is_dir() and (own / "plugins").is_dir()
    assert (
        "alertmanager is not installed: apt-get install prometheus-alertmanager, then systemctl disable --now" in shown
    )
    assert "prometheus is not installed" not in shown and "grafana: http://127.0.0.1:3000" in shown


def test_the_program_below_its_home_comes_before_that_of_the_path_which_reads_a_file_of_the_system(
    tmp_path: Path,
) -> None:
    program = tmp_path / "grafana" / "bin" / "grafana"
    program.parent.mkdir(parents=True)
    program.write_text(STAND_IN)
    program.chmod(0o755)
    script = begin(tmp_path, {"grafana": "#!/bin/sh\nexit 1\n"})
    said = wait_for(tmp_path / "said" / "grafana")
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=30)
    assert said.startswith(f"{program} server --homepath {tmp_path / 'grafana'} ")


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        ({}, "prometheus is not installed: apt-get install prometheus, then systemctl disable --now prometheus"),
        (
            {"prometheus": "#!/bin/sh\necho address already in use >&2\nexit 3\n", "prometheus-alertmanager": STAND_IN},
            "prometheus ended with 3; the last lines of its log:\naddress already in use",
        ),
    ],
    ids=["nothing is installed", "one ends"],
)
def test_without_any_of_them_and_where_one_ends_it_fails_and_says_why(
    tmp_path: Path, programs: dict[str, str], message: str
) -> None:
    script = begin(tmp_path, programs)
    shown, _ = script.communicate(timeout=30)
    assert script.returncode == 1 and message in shown
    expect_nothing_left_of(script)
