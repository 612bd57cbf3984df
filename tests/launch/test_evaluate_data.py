"""``rlhf-ray evaluate --data-only``: its figures are those of constructed files; it loads neither Ray nor torch; shared
prompts end it unless they are allowed; what it would not read is refused by name; no text of a pair reaches the terminal.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import rlhf_ray
from rlhf_ray.cli.main import main
from rlhf_ray.config.files.reward_record import KEY
from rlhf_ray.data.tokenizers import make_tokenizer
from rlhf_ray.errors import EXIT_DONE, EXIT_WRONG_REQUEST
from rlhf_ray.models.reward_reading import make_reward_record

SECRET = "quokka"


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(prompt: str, chosen: str, rejected: str, source: str = "a") -> dict[str, str]:
    return {"prompt": f"{SECRET} {prompt}", "chosen": chosen, "rejected": rejected, "source": source}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three different pairs, of which one is repeated and one contradicted."""
    return write(
        tmp_path / "pairs.jsonl",
        row("one", " longer", " b"),
        row("one", " longer", " b"),
        row("two", " b", " longer", "b"),
        row("two", " longer", " b", "b"),
        row("three", " same", " same", "b"),
    )


@pytest.fixture
def tokenizer(pairs: Path, tmp_path: Path) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(pairs, 300)
    tokenizer.save_pretrained(tmp_path / "model")
    return tokenizer


def test_figures_in_tables_and_json(pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.json"
    assert main(["evaluate", "--data-only", "--data", str(pairs), "--output", str(output)]) == EXIT_DONE
    report = json.loads(output.read_text())
    expected = {"pairs": 5, "prompts": 3, "duplicate_rows": 1, "contradicting_pairs": 1, "equal_sides": 1,
                "longer_chosen": 3 / 4, "labelled_again": 2, "disagreement": 0.5, "label_noise": 0.5}  # fmt: skip
    assert {name: report["figures"][name] for name in expected} == pytest.approx(expected)
    assert report["unit"] == "characters" and report["lengths"]["chosen"]["largest"] == len(" longer")
    assert {source: figures["pairs"] for source, figures in report["sources"].items()} == {"b": 3, "a": 2}
    assert report["places"]["contradicting"] == [f"{pairs}:3 and {pairs}:4"]
    assert report["dropped"] == {"with two equal sides": 1}
    printed = capfd.readouterr().err
    assert "contradicting_pairs" in printed and SECRET not in printed
    assert SECRET not in output.read_text()


def test_python_gives_the_same_report(pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    assert main(["evaluate", "--data-only", "--data", str(pairs), "--output", str(output)]) == EXIT_DONE
    report = rlhf_ray.evaluate_data(pairs)
    assert report.figures == json.loads(output.read_text())["figures"]


def test_a_tokenizer_counts_tokens_as_training_does(
    pairs: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    report = rlhf_ray.evaluate_data(pairs, tokenizer_from=tmp_path / "model")
    longest = len(tokenizer(" longer")["input_ids"]) + 1
    assert report.unit == "tokens" and report.lengths["chosen"]["largest"] == longest
    prompt = len(tokenizer(f"{SECRET} one")["input_ids"])
    assert report.lengths["prompt"]["largest"] == prompt
    for limit, dropped in ((prompt + longest, 0), (prompt + longest - 1, 4)):
        output = tmp_path / f"{limit}.json"
        words = ["evaluate", str(tmp_path / "model"), f"max_tokens={limit}", "--data-only", "--data", str(pairs)]
        assert main([*words, "--output", str(output)]) == EXIT_DONE
        expected = {"with two equal sides": 1} | ({"too long": dropped} if dropped else {})
        assert json.loads(output.read_text())["dropped"] == expected


def test_shared_prompts_end_it_unless_they_are_allowed(
    pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    held_out = write(
        tmp_path / "held.jsonl", row("TWO!", " x", " y"), row("three", " x", " y"), row("four", " x", " y")
    )
    words = ["evaluate", "--data-only", "--data", str(pairs), "--held-out", str(held_out)]
    output = tmp_path / "figures.json"
    assert main([*words, "--output", str(output)]) == EXIT_WRONG_REQUEST
    assert f"{held_out}: 2 of its prompts are also in {pairs}" in capfd.readouterr().err
    shared = {"held_out_pairs": 3, "held_out_prompts": 3, "shared_prompts": 1, "nearly_shared_prompts": 1}
    assert json.loads(output.read_text())["shared"] == shared, "the report is written before the command ends"
    assert main([*words, "--allow-shared-prompts"]) == EXIT_DONE
    other = write(tmp_path / "other.jsonl", row("four", " x", " y"))
    assert main([*words[:-1], str(other)]) == EXIT_DONE


def test_rows_that_cannot_be_read_are_counted_and_left_out(pairs: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(
        pairs.read_text() + '{"prompt": "p", "chosen": "a"}\n' + '{"prompt": "p", "chosen": "", "rejected": "b"}\n'
    )
    output = tmp_path / "figures.json"
    words = ["evaluate", "--data-only", "--data", str(mixed), "--output", str(output)]
    assert main(words) == EXIT_WRONG_REQUEST, "training would end at the first of them too"
    assert main([*words, "data.bad_rows=drop"]) == EXIT_DONE
    report = json.loads(output.read_text())
    assert report["figures"] == {**rlhf_ray.evaluate_data(pairs).figures, "bad_rows": 2}
    assert [place.partition(": ")[0] for place in report["places"]["bad_rows"]] == [f"{mixed}:6", f"{mixed}:7"]


def test_what_the_chat_template_leaves_out_is_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A template that writes no system turn and refuses an answer of ``no``."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}"
        "{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    asked = [{"role": "user", "content": "why?"}]
    told = [{"role": "system", "content": "Be brief."}, *asked]
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    refused = [{"role": "user", "content": "no"}]
    path = write(tmp_path / "talks.jsonl", *({"prompt": prompt, **sides} for prompt in (asked, told, told, refused)))
    output = tmp_path / "figures.json"
    words = ["evaluate", str(tmp_path / "chat"), "--data-only", "--data", str(path), "--output", str(output)]
    assert main([*words, "data.bad_rows=drop"]) == EXIT_DONE
    report = json.loads(output.read_text())
    assert report["left_out_by_template"] == {"the text of messages of the system": 2}
    assert (report["figures"]["pairs"], report["figures"]["bad_rows"]) == (3, 1)
    assert report["places"]["bad_rows"][0].startswith(f"{path}:4: the tokenizer's chat template refuses")


def test_tokens_are_counted_with_the_template_variables_that_a_reward_model_remembers(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt and enable_thinking | default(true) %}abc{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "reward")
    asked, answer = [{"role": "user", "content": "w"}], [{"role": "assistant", "content": "x"}]
    path = write(
        tmp_path / "talks.jsonl", {"prompt": asked, "chosen": answer, "rejected": [{**answer[0], "content": "y"}]}
    )
    largest = []
    for variables in ({}, {"enable_thinking": False}):
        record = make_reward_record(tokenizer, {"conversation"}, variables)
        written = {"model_type": "llama", KEY: asdict(record)}
        (tmp_path / "reward" / "config.json").write_text(json.dumps(written))
        report = rlhf_ray.evaluate_data(path, tokenizer_from=tmp_path / "reward")
        largest.append(report.lengths["prompt"]["largest"])
    assert largest[0] - largest[1] == len(tokenizer("abc")["input_ids"]) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data-only", "--data", "absent.jsonl"], "absent.jsonl does not exist: name a file of preference pairs"),
        (["--data-only", "--data", "PAIRS", "--held-out", "absent.jsonl"], "absent.jsonl does not exist"),
        (["--data-only", "--data", "PAIRS", "--output", "no/folder.json"], "--output no/folder.json: the folder no does not"),
        (["--data-only", "--data", "PAIRS", "reward.ranks=2"], "reward.ranks: --data-only loads no model"),
        (["--data-only", "--data", "PAIRS", "max_tokens=8"], "max_tokens=8: tokens are counted by the tokenizer of a model"),
        (["m", "max_tokens=many", "--data-only", "--data", "PAIRS"], "max_tokens: 'many' is not a whole number above 0"),
        (["--data-only", "--data", "PAIRS", "--allow-shared-prompts"], "add --held-out"),
        (["--data", "PAIRS"], "evaluate needs a reward model"),
        (["m", "--data", "PAIRS", "--held-out", "PAIRS"], "add --data-only, or leave them out"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_told(
    pairs: Path, words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *(str(pairs) if word == "PAIRS" else word for word in words)]) == EXIT_WRONG_REQUEST
    printed = capfd.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_neither_torch_nor_ray_is_imported(pairs: Path) -> None:
    program = (
        "import sys; from rlhf_ray.cli.main import main;"
        f"assert main(['evaluate', '--data-only', '--data', {str(pairs)!r}]) == 0;"
        "print(*sorted({'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_rows_are_read_as_the_settings_say(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], project_log: io.StringIO
) -> None:
    """The keys that an error about a row names are taken here too, and only those."""
    path = write(tmp_path / "labelled.jsonl", row("one", " a", " b") | {"labels": 1}, row("two", " a", ""))
    words = ["evaluate", "--data-only", "--data", str(path), "--output", str(tmp_path / "figures.json")]
    assert main(words) == EXIT_WRONG_REQUEST
    assert "data.ignore_columns=[labels]" in capfd.readouterr().err
    assert main([*words, "data.ignore_columns=[labels]", "data.bad_rows=drop"]) == EXIT_DONE
    assert json.loads((tmp_path / "figures.json").read_text())["figures"]["pairs"] == 1
    assert "1 bad rows are left out" in project_log.getvalue()
    assert main([*words, "data.ratings=often", "data.cache=null"]) == EXIT_WRONG_REQUEST
    printed = capfd.readouterr().err
    assert "data.ratings" in printed and "data.cache" in printed
