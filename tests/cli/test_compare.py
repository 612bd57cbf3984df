"""``compare`` writes one page for runs of one kind, and names what cannot be compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.record import Record, write_record
from rlhf_ray.storage.fingerprint import Fingerprint

CONFIG = "kind: sft\nrun: {{name: {name}, seed: {seed}}}\nreward: {{parameters: {{note: {note}}}, token_file: /home/{note}}}\n"


def make(path: Path, *, seed: int = 1, kind: str = "sft", steps: int = 2, note: str = "x") -> RunDirectory:
    config = CONFIG.format(name=path.name, seed=seed, note=note).replace("sft", kind)
    run = RunDirectory.create(path, config)
    for step in range(1, steps + 1):
        run.metrics.append({"step": step, "timestamp": 1e9 + step, "loss/sft": 1.0 / step / seed})
    write_record(run.inputs_path, Record(config, {"data.path": Fingerprint((("rows", f"{seed:064x}"),))}))
    run.release()
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [str(make(tmp_path / "a/first").path), str(make(tmp_path / "b/first", seed=2, note="canary-77").path)]


def test_a_page_shows_what_differs_and_no_secret(runs: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *runs]) == 0
    assert capsys.readouterr().out == "comparison.html\n"
    page = (tmp_path / "comparison.html").read_text()
    assert "<td>run.seed</td><td>1</td><td>2</td>" in page and "content of data.path" in page
    assert "<td>reward.parameters.note</td><td>(withheld)</td><td>(withheld)</td>" in page
    assert "reward.token_file" in page and "canary-77" not in page and "run.name" not in page
    assert f"<b>{runs[0]}</b>" in page, "runs of one name are told apart by their directories"
    assert main(["compare", *runs]) == 2
    assert "comparison.html: exists already" in capsys.readouterr().err
    assert main(["compare", *runs, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ([], "compare takes 2 to 6 run directories, not 1"),
        (["first"] * 6, "compare takes 2 to 6 run directories, not 7"),
        (["first"], "is named twice"),
        (["none"], "none is not a run directory: it has no config.yaml"),
        (["rm"], "is a run of kind sft and"),
        (["empty"], "empty has no step on record"),
        (["torn"], "metrics.jsonl:1 is damaged"),
        (["broken"], "config.yaml is damaged"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path: Path, extra: list[str], said: str, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, kind, steps in (("first", "sft", 2), ("rm", "rm", 2), ("empty", "sft", 0), ("torn", "sft", 2)):
        make(tmp_path / name, kind=kind, steps=steps)
    torn = tmp_path / "torn/metrics.jsonl"
    torn.write_text('{"step": 1, "times\n' + torn.read_text())
    make(tmp_path / "broken").config_path.write_text("kind: sft\nrun: {name: [\n")
    assert main(["compare", "first", *extra]) != 0
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "comparison.html").exists()


def test_a_line_that_is_being_written_costs_nothing(runs: list[str], tmp_path: Path) -> None:
    with open(Path(runs[0]) / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "timest')
    assert main(["compare", *runs, "--output", str(tmp_path / "page.html")]) == 0


def test_a_report_withholds_what_a_comparison_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of the config and of its changes, and secrets of the environment; a config that is damaged is not shown."""
    monkeypatch.setenv("ITS_API_KEY", "canary-79")
    made = make(tmp_path / "of-canary-79", note="canary-77")
    run, _ = RunDirectory.resume(made.path)
    run.release()
    change = {"key": "reward.parameters.note", "from": "canary-76", "to": ["canary-77"]}
    run.attempts.amend_last({"changes": [change, {"key": "reward.token_file.x", "from": "canary-78", "to": None},
                                         {"key": "run.seed", "from": 1, "to": 2}]})  # fmt: skip
    out = str(tmp_path / "page.html")
    assert main(["report", str(run.path), "--output", out]) == 0
    page = Path(out).read_text()
    assert not re.search("canary-7[678]", page)
    config = page.partition("<summary>Config</summary>")[2]
    assert "canary-79" not in config and "name: (withheld)" in config and "seed: 1" in config
    assert "note: (withheld)" in config and "token_file: (withheld)" in config
    assert "reward.parameters.note (withheld) -&gt; [(withheld)], reward.token_file.x (withheld)" in page
    assert "run.seed 1 -&gt; 2" in page
    run.config_path.write_text("kind: sft\nreward: {url: [canary-77\n")
    assert main(["report", str(run.path), "--output", out, "--overwrite"]) == 0
    page = Path(out).read_text()
    assert "config.yaml is damaged, so it is not shown" in page and "canary-77" not in page
