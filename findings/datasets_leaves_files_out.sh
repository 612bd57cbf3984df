#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1): load_dataset on a folder leaves files out without a word.
#
# 1. A file whose name holds the word of a split makes the folder a folder of splits: "test-of-time.jsonl" becomes the split
#    "test", and "more.jsonl" beside it, which names no split, is gone. There is no split "train" at all.
# 2. Of several formats in one folder only one is read: "b.csv" beside "a.jsonl" is gone.
# 3. Files are read in the order of their names as text: part-10 before part-2.
#
# Seen on 2026-11-29 (the last lines of the output):
#   split word in a name: {'test': ['from test-of-time']}
#   two formats: {'train': ['from a.jsonl']}
#   numbered parts: {'train': ['part 10', 'part 2', 'part 9']}
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


def load(name: str, files: dict[str, str]) -> dict[str, list[str]]:
    """The texts that each split holds when ``files`` stand in one folder."""
    folder = root / name
    folder.mkdir()
    for file, text in files.items():
        line = text + "\n" if file.endswith(".csv") else json.dumps({"text": text}) + "\n"
        (folder / file).write_text(("text\n" if file.endswith(".csv") else "") + line)
    loaded = datasets.load_dataset(str(folder), cache_dir=str(root / "cache"))
    return {split: rows["text"][:] for split, rows in loaded.items()}


cases = {
    "split word in a name": load("words", {"test-of-time.jsonl": "from test-of-time", "more.jsonl": "from more"}),
    "two formats": load("formats", {"a.jsonl": "from a.jsonl", "b.csv": "from b.csv"}),
    "numbered parts": load("parts", {f"part-{n}.jsonl": f"part {n}" for n in (2, 9, 10)}),
}
expected = {
    "split word in a name": {"test": ["from test-of-time"]},
    "two formats": {"train": ["from a.jsonl"]},
    "numbered parts": {"train": ["part 10", "part 2", "part 9"]},
}
print("datasets", datasets.__version__)
for name, seen in cases.items():
    print(f"{name}: {seen}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder"
