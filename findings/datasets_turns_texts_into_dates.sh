#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1): load_dataset turns JSON strings into dates when all of a column look like one.
#
# JSON has no dates: "2024-01-02" is a string there. Read from a .jsonl file, a column of such strings comes back as
# datetime objects. One other text anywhere in the column, and all of them stay strings. An answer that is a date, as in
# questions about history or calendars, is then no text any more, depending on the other rows of the file. A CSV file does
# not do this; there "007" becomes the number 7 instead, which the JSON file keeps as it is.
#
# Seen on 2026-11-29 (the last lines of the output):
#   json, only dates: datetime 2024-01-02 00:00:00
#   json, dates and another text: str 2024-01-02
#   json, leading zeros: str 007
#   csv, only dates: str 2024-01-02
#   csv, leading zeros: int 7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cat > "$folder/try.py" <<'PY'
import json
import sys
from pathlib import Path

import datasets

datasets.disable_progress_bars()
root = Path(sys.argv[1])


def first(name: str, texts: list[str]) -> str:
    """The type and the value of the first cell when ``texts`` are the only column of a file."""
    file = root / name
    as_json = name.endswith(".jsonl")
    lines = [json.dumps({"answer": text}) for text in texts] if as_json else ["answer", *texts]
    file.write_text("\n".join(lines) + "\n")
    rows = datasets.load_dataset("json" if as_json else "csv", data_files=str(file), cache_dir=str(root / "cache"))
    value = rows["train"][0]["answer"]
    return f"{type(value).__name__} {value}"


cases = {
    "json, only dates": first("dates.jsonl", ["2024-01-02", "2024-03-04"]),
    "json, dates and another text": first("mixed.jsonl", ["2024-01-02", "never"]),
    "json, leading zeros": first("zeros.jsonl", ["007", "008"]),
    "csv, only dates": first("dates.csv", ["2024-01-02", "2024-03-04"]),
    "csv, leading zeros": first("zeros.csv", ["007", "008"]),
}
expected = {
    "json, only dates": "datetime 2024-01-02 00:00:00",
    "json, dates and another text": "str 2024-01-02",
    "json, leading zeros": "str 007",
    "csv, only dates": "str 2024-01-02",
    "csv, leading zeros": "int 7",
}
print("datasets", datasets.__version__)
for name, seen in cases.items():
    print(f"{name}: {seen}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder"
