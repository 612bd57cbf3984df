"""``rlhf-ray evaluate``: its figures are those that plain transformers' scores give, by source and by section; what it is
given wrong is told before anything is started; no text of a pair reaches the terminal.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.cli.main import main
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.sections.models import MakeConfig, ModelConfig
from rlhf_ray.launch.evaluate import evaluate
from rlhf_ray.models import load_tokenizer, save_pretrained
from rlhf_ray.models.from_config import load_regression
from rlhf_ray.rows.preferences import PreferenceReader
from rlhf_ray.storage import OutputFile
from rlhf_ray.trainers.supervised import reward_evaluation
from rlhf_ray.world.generate import World

SUBSETS = ("hep-go", "hep-rust", "math-prm", "house")
pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    model_config = ModelConfig(
        make=MakeConfig(shape="llama-tiny", tokenizer_from="world"), head_init="inv_sqrt", dtype="fp32"
    )
    directory = tmp_path_factory.mktemp("evaluate") / "model"
    save_pretrained(load_regression(model_config, "reward", seed=4), load_tokenizer(model_config), directory)
    return directory


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Pairs in RewardBench's layout, one of them with equal sides, one too long."""
    pairs = World(5).preferences(40)
    written = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "subset": SUBSETS[number % 4],
         "chosen_model": "a", "rejected_model": "b", "id": number}
        for number, pair in enumerate(pairs)
    ]  # fmt: skip
    extra = [{**written[0], "rejected": written[0]["chosen"]}, {**written[1], "chosen": "Hello. " * 400}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*written, *extra]))
    return written


def plain_margins(model: Path, rows: list[dict[str, Any]]) -> list[float]:
    """Chosen minus rejected by plain transformers, one text at a time."""
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def score(text: str) -> float:
        ids = tokenizer(text)["input_ids"]
        ids += [tokenizer.eos_token_id] if ids[-1] != tokenizer.eos_token_id else []
        with torch.no_grad():
            return float(plain(torch.tensor([ids])).logits)

    return [score(row["prompt"] + row["chosen"]) - score(row["prompt"] + row["rejected"]) for row in rows]


@pytest.mark.parametrize("at_once", [reward_evaluation.PAIRS_PER_CALL, 7])
def test_figures_are_those_of_plain_transformers(
    at_once: int,
    model: Path,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    project_log: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reward_evaluation, "PAIRS_PER_CALL", at_once)
    config = load_config("serve", [f"reward.model.path={model}", "max_tokens=100"], kind="serve", files=True)
    place, output = ThisProcess(config.cluster), tmp_path / "figures.json"
    code = evaluate(config, tmp_path / "pairs.jsonl", PreferenceReader(), output=OutputFile(output), place=place)
    figures_file, printed, logged = json.loads(output.read_text()), capsys.readouterr(), project_log.getvalue()
    margins = plain_margins(model, rows)
    assert code == 0
    assert figures_file["figures"]["pairs"] == 40 and "of 42 pairs dropped: 1 " in logged
    assert figures_file["figures"]["margin"] == pytest.approx(sum(margins) / 40, abs=1e-5)
    right = [margin > 0 for margin in margins]
    shares = {subset: sum(right[place::4]) / 10 for place, subset in enumerate(SUBSETS)}
    assert {source: part["accuracy"] for source, part in figures_file["sources"].items()} == pytest.approx(shares)
    code_share = (shares["hep-go"] + shares["hep-rust"]) / 2
    section = (984 * shares["math-prm"] + 328 * code_share) / (984 + 328)
    assert figures_file["rewardbench"] == {"Reasoning": pytest.approx(section)}
    assert f"{section:.4f}" in printed.err and all(subset in printed.err for subset in SUBSETS)
    assert "not the leaderboard's scores: hep-cpp" in logged
    wrong = sorted(margin for margin in margins if margin <= 0)
    assert [float(row[0]) for row in figures_file["worst"]["rows"]] == pytest.approx(wrong, abs=0.006)
    assert not any(row["chosen"] in printed.out + printed.err + logged for row in rows)


@pytest.mark.parametrize("candidates", [False, True])
def test_the_figures_are_written_before_the_cluster_is_left(
    model: Path, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, candidates: bool
) -> None:
    """A cluster that has died may take the process along when it is left."""
    if candidates:
        written = [
            {"prompt": "a", "chosen": ["b"], "rejected": ["c", "d"], "subset": "Math", "id": "1", "num_correct": 1}
        ]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    config = load_config("serve", [f"reward.model.path={model}", "max_tokens=100"], kind="serve", files=True)
    output, seen = tmp_path / "figures.json", []

    @contextmanager
    def cluster(config: Any, *, together: bool) -> Iterator[ThisProcess]:
        assert together, "all its places are taken at once"
        yield ThisProcess(config.cluster)
        seen.append(output.exists())

    monkeypatch.setattr(Cluster, "for_job", cluster)
    assert evaluate(config, tmp_path / "pairs.jsonl", PreferenceReader(), output=OutputFile(output)) == 0
    assert seen == [True]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ("pairs.jsonl does not exist", "name a file")),
        ("", ("pairs.jsonl", "holds no rows")),
        ('{"chosen": "a"}\n', ("pairs.jsonl:1", "'rejected'")),
        ('{"chosen": "a", "rejected": 3}\n', ("pairs.jsonl:1", "'rejected'", "int")),
        ('{"chosen": "a", "rejected": ""}\n', ("pairs.jsonl:1", "'rejected'", "empty")),
        ('{"chosen": "a", "rejected": "b", "margin": "much"}\n', ("pairs.jsonl:1", "'margin'", "finite number")),
        ('{"chosen": "a", "rejected": "a"}\n', ("no pair is left", "1 ")),
        ('{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}], '
         '"rejected": [{"role": "assistant", "content": "c"}]}\n', ("chat template",)),
    ],
    ids=["missing", "no rows", "no key", "a number", "an empty side", "a margin in words", "equal sides", "no template"],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_told_before_anything_starts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, expected: tuple[str, ...]
) -> None:
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_text(content)
    assert main(["evaluate", str(model), "--data", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    for part in expected:
        assert part in captured.err


def test_a_folder_for_the_figures_that_is_not_there(
    model: Path, rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "gone/figures.json")]
    assert main(["evaluate", str(model), *arguments]) == 2
    assert "gone does not exist" in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path / "gone"), "--data", "pairs.jsonl"]) == 2
    assert "gone does not exist" in capsys.readouterr().err
