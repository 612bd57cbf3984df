"""Homes that nobody knows and directories whose names are too long are told in a sentence, before anything is made there."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.cli.main import main
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.paths import with_absolute_paths
from rlhf_ray.environment import expand_home, require_room_for_sockets
from rlhf_ray.errors import RequestError


def test_a_home_is_put_in_the_place_of_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert expand_home("~/a") == Path("/somewhere/a")
    assert expand_home("~root/a") == Path(pwd.getpwnam("root").pw_dir) / "a"
    assert expand_home("a/~b") == Path("a/~b") and expand_home("./~b") == Path("~b")


@pytest.mark.parametrize(
    "command",
    [
        ["export", "~nosuchuser/x", "out"],
        ["check", "serve", "token_file=~nosuchuser/x"],
        ["submit", "--resume", "~nosuchuser/x"],
    ],
)
def test_a_home_of_nobody_is_told(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(command)
    except RuntimeError as error:
        pytest.fail(str(error))
    assert code == 2
    assert "~nosuchuser/x: there is no user nosuchuser, or write the path out" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_user_without_a_home_is_told_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    config = load_config("demo-sft", ["data.cache=~/.cache/rlhf_ray"])
    try:
        with_absolute_paths(config, Path.cwd())
    except RequestError as error:
        assert "~/.cache/rlhf_ray: no home directory is known for user" in str(error) and "set HOME" in str(error)
    except RuntimeError as error:
        pytest.fail(str(error))
    else:
        pytest.fail("the sign was taken for a name")


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_directory_below_which_no_socket_has_room_is_told_before_ray_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    for variable in ("TMPDIR", "RAY_TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    require_room_for_sockets()
    monkeypatch.setenv(name, f"/tmp/{'x' * 105}")
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    config = load_config("demo-sft", ["cluster.num_cpus=64"])
    with pytest.raises(
        RequestError, match=rf"^{name} /tmp/xxx.*x has 110 letters.*set RAY_TMPDIR to a directory of \d\d letters"
    ):
        Cluster.for_job(config).__enter__()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    require_room_for_sockets()
