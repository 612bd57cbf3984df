"""What ``rlhf-ray serve`` understands of its command line, and what it refuses before anything starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.errors import EXIT_WRONG_REQUEST
from rlhf_ray.launch import serve as launch

TOKEN = "a-token-that-is-long"
pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServeConfig, bool]]:
    """What the command would serve."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    calls: list[tuple[ServeConfig, bool]] = []

    def serve(config: ServeConfig, *, detach: bool) -> int:
        calls.append((config, detach))
        return 0

    monkeypatch.setattr(launch, "serve", serve)
    return calls


def test_options_and_overrides_may_stand_in_any_order(
    served: list[tuple[ServeConfig, bool]], model: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "to: kens"
    tokens.write_text(TOKEN)
    words = ["max_items=7", "--host", "::1", "--token-file", str(tokens), "--port", "0", "max_tokens=9", "--detach"]
    assert main(["serve", str(model), *words, "--normalize"]) == 0
    ((config, detach),) = served
    assert detach
    assert (config.host, config.port, config.token_file, config.normalize) == ("::1", 0, str(tokens), True)
    assert (config.max_items, config.max_tokens) == (7, 9)
    assert config.reward.model.path == str(model)


def test_a_model_is_enough(served: list[tuple[ServeConfig, bool]], model: Path) -> None:
    assert main(["serve", str(model)]) == 0
    ((config, detach),) = served
    assert not detach
    assert (config.host, config.port, config.token_file, config.normalize) == ("127.0.0.1", 5000, None, False)


@pytest.mark.parametrize("words", [["--port", "5001", "max_items"], ["--prot=5"], ["max_items=1", "--nothing"]])
def test_what_is_neither_option_nor_override_is_refused(
    served: list[tuple[ServeConfig, bool]], model: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", str(model), *words])
    assert caught.value.code == EXIT_WRONG_REQUEST
    assert "unrecognized arguments" in capsys.readouterr().err
    assert served == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "host: 0.0.0.0 is open to others: set token_file"),
        (["--token-file", "absent"], "token_file: absent does not exist"),
        (["--port", "70000"], "port: 70000"),
        (["max_itms=3"], "max_items"),
        (["--detach"], "--detach leaves the service on a Ray cluster, but this command would start one"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_starts(
    model: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(launch, "Cluster", None)
    assert main(["serve", str(model), *words]) == EXIT_WRONG_REQUEST
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "ignored"),
    [
        (["--port", "5001"], "port"),
        (["--normalize", "--host", "::1", "max_items=7"], "host, normalize, max_items"),
        (["reward.model.dtype=fp32", "models.other.model.path=x"], "reward.model.dtype, models.other.model.path"),
        (["--detach"], "--detach"),
        (["reward.model={path: x}"], "reward.model"),
    ],
)
def test_reload_refuses_by_name_what_it_could_only_ignore(
    model: Path, words: list[str], ignored: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "Cluster", None)
    (tmp := model.parent / "x").mkdir(exist_ok=True)
    for file in model.iterdir():
        (tmp / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(model.parent)
    assert main(["serve", str(model), "--reload", "cluster.address=auto", *words]) == EXIT_WRONG_REQUEST
    assert f"rlhf-ray: {ignored}: --reload changes the model alone" in capsys.readouterr().err


def test_reload_takes_the_model_its_name_and_where_the_service_runs(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        """Raised in place of joining a cluster."""

    class NoCluster:
        @staticmethod
        def for_job(config: ServeConfig, **_: object) -> None:
            raise Reached(config.run.name, config.name, config.reward.model.revision)

    monkeypatch.setattr(launch, "Cluster", NoCluster)
    words = ["cluster.address=auto", "cluster.call_timeout_s=5", "run.name=s", "name=other", "reward.model.revision=v2"]
    with pytest.raises(Reached) as reached:
        main(["serve", str(model), "--reload", *words])
    assert reached.value.args == ("s", "other", "v2")


def test_a_model_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/no/such/model"]) == EXIT_WRONG_REQUEST
    assert "/no/such/model does not exist" in capsys.readouterr().err


def test_a_taken_port_is_told_before_anything_starts(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "Cluster", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(model), "--port", str(port)]) == EXIT_WRONG_REQUEST
    assert f"127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err
