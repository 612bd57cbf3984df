"""What a command reads it never writes over, whatever it is allowed to replace."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.cli.main import main


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "{model}", "--prompts", "{rows}", "--output", "{rows}", "--overwrite", "--in-process"],
        ["rescore", "{rows}", "--reward", "gsm8k", "--output", "{rows}", "--overwrite"],
    ],
    ids=["generate", "rescore"],
)
def test_a_file_that_is_read_stays(
    words: list[str], tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    assert main([word.format(model=policy, rows=rows) for word in words]) == 2
    assert str(rows) in capsys.readouterr().err
    assert rows.read_text() == '{"prompt": "a"}\n'
