#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1): a text that reads as JSON comes out of a Json column as the value that it reads as.
#
# A Json column holds values of mixed types, each as JSON. A text is put in as it stands when it is JSON already, and decoded
# on the way out like all others: "null" comes back as None, "007" as the number 7, "NaN" as None, and a text in quotes
# without them. Nobody has to ask for such a column: load_dataset makes one of its own where the rows of a .jsonl file mix
# texts with a number or an object. So one row with a bare number changes the answers of other rows, which are texts in the
# file, and no row keeps a sign of what it was.
#
# Seen on 2026-11-30 (the last lines of the output):
#   file, only texts: ['null', '007', 'true', '"quoted"', '{"a": 1}', 'NaN', 'plain']
#   file, texts and the number 5: [None, 7, True, 'quoted', {'a': 1}, None, 'plain', 5]
#   from_dict, Json column: [None, 7, True, 'quoted', {'a': 1}, None, 'plain']
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
texts = ["null", "007", "true", '"quoted"', '{"a": 1}', "NaN", "plain"]


def load(name: str, answers: list[object]) -> list[object]:
    """The answers that come back from a file whose rows hold ``answers``."""
    file = root / name
    file.write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in answers))
    rows = datasets.load_dataset("json", data_files=str(file), cache_dir=str(root / "cache"))["train"]
    return rows["answer"][:]


json_column = datasets.Features({"answer": datasets.Json()})
cases = {
    "file, only texts": load("texts.jsonl", texts),
    "file, texts and the number 5": load("mixed.jsonl", [*texts, 5]),
    "from_dict, Json column": datasets.Dataset.from_dict({"answer": texts}, features=json_column)["answer"][:],
}
values = [None, 7, True, "quoted", {"a": 1}, None, "plain"]
expected = {
    "file, only texts": texts,
    "file, texts and the number 5": [*values, 5],
    "from_dict, Json column": values,
}
print("datasets", datasets.__version__)
for name, seen in cases.items():
    print(f"{name}: {seen}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder"
