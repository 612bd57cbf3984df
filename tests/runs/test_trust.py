"""A run directory that somebody else can have written is not obeyed, and the sentence says how to go on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.errors import EXIT_WRONG_REQUEST, RequestError
from rlhf_ray.launch.driver import continue_run
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.trust import TRUSTED_USERS, refuse_untrusted

STRANGER = 54321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
CONFIG = "kind: sft\nrun: {name: run}\n"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "run", CONFIG)
    pending = made.checkpoints.begin(1)
    (pending.path / "policy").mkdir()
    (pending.path / "policy" / "shard.pt").write_bytes(b"numbers")
    made.checkpoints.commit(pending)
    made.path.chmod(0o755)
    made.release()
    return made


PLACES = [".", "config.yaml", "checkpoints", "checkpoints/step-000001", "checkpoints/step-000001/policy/shard.pt"]


def test_a_run_of_ones_own_is_obeyed(run: RunDirectory) -> None:
    for mode in (0o700, 0o755, 0o775):
        run.path.chmod(mode)
        refuse_untrusted(run.path)
    refuse_untrusted(run.path / "missing")


@pytest.mark.parametrize("place", PLACES)
def test_what_everybody_can_write_is_not_obeyed(run: RunDirectory, place: str) -> None:
    (run.path / place).chmod(0o777)
    with pytest.raises(RequestError, match=rf"can be written by every user.*close it with `chmod -R o-w {run.path}`"):
        refuse_untrusted(run.path)
    os.system(f"chmod -R o-w {run.path}")
    refuse_untrusted(run.path)


def test_what_nobody_else_can_reach_may_have_any_mode(run: RunDirectory) -> None:
    run.config_path.chmod(0o666)
    run.path.chmod(0o750)
    refuse_untrusted(run.path)


@needs_root
@pytest.mark.parametrize("place", PLACES)
def test_what_belongs_to_another_user_is_not_obeyed(
    run: RunDirectory, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(run.path / place, STRANGER, -1)
    way = rf"resume it as {STRANGER}, take it over with `chown -R root {run.path}` .* or name {STRANGER} in {TRUSTED_USERS}"
    with pytest.raises(RequestError, match=rf"belongs to {STRANGER}, not to root, .*{way}"):
        refuse_untrusted(run.path)
    monkeypatch.setenv(TRUSTED_USERS, f"nobody, {STRANGER}")
    refuse_untrusted(run.path)
    monkeypatch.setenv(TRUSTED_USERS, "no-such-user")
    with pytest.raises(RequestError, match="there is no user 'no-such-user' here"):
        refuse_untrusted(run.path)


@needs_root
def test_a_user_resumes_a_run_that_root_made(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    refuse_untrusted(run.path)


@pytest.mark.parametrize(
    "resume",
    [RunDirectory.resume, RunDirectory.take, continue_run, lambda path: main(["resume", str(path)])],
    ids=["directory", "take", "driver", "command"],
)
def test_nothing_of_such_a_run_is_read_whoever_resumes_it(
    run: RunDirectory, resume: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config is no YAML, so that whoever reads it first says so."""
    run.config_path.write_text("{")
    run.path.chmod(0o777)
    try:
        assert resume(run.path) == EXIT_WRONG_REQUEST
        message = capsys.readouterr().err
    except RequestError as error:
        message = str(error)
    assert "can be written by every user of this machine" in message
