"""What ``train`` finds out only in the driver is still told before Ray starts, and leaves nothing behind."""

from __future__ import annotations

import json


def test_a_bad_row_past_those_that_check_looks_at(command_line, tmp_path):
    rows = [{"prompt": f"{number} and one?", "answer": "some"} for number in range(150)]
    del rows[140]["answer"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ("demo-sft", "data.world=null", "data.path=rows.jsonl", "policy.model.make.tokenizer_from=world")
    assert command_line("check", *own).code == 0
    done = command_line("train", "sft", *own)
    assert done.code == 2
    assert "rows.jsonl:141" in done.err and "'answer'" in done.err
    assert "Traceback" not in done.err and "Started a local Ray instance" not in done.err
    assert list((tmp_path / "runs").iterdir()) == []
