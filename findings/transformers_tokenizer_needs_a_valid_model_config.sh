#!/usr/bin/env bash
# transformers 5.19.0 (huggingface_hub 2.4.0): AutoTokenizer fails on a number in config.json that no tokenizer needs.
#
# AutoTokenizer reads the model's config.json to choose the class of the tokenizer, even where tokenizer_config.json names
# it, and the types of all values in it are checked on the way. A field of floats takes 1.0 but not 1. In JSON that is the
# same number, and a tool that rewrites the file may leave the point out (JavaScript does). So a factor of the model's layers
# keeps a text from being turned into ids. The error is neither a ValueError nor a TypeError nor an OSError. The class of the
# tokenizer, called by its name, loads the same folder.
#
# Seen on 2026-11-30 (the last lines of the output):
#   AutoTokenizer, 1.0: [0, 1]
#   AutoTokenizer, 1: StrictDataclassFieldValidationError (not built-in): expected float, got int (value: 1)
#   PreTrainedTokenizerFast, 1: [0, 1]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    transformers==5.19.0 huggingface_hub==2.4.0 tokenizers==0.23.3
cat > "$folder/try.py" <<'PY'
import json
import sys
import tempfile
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

words = Tokenizer(models.WordLevel({"hello": 0, "world": 1}, unk_token="hello"))
words.pre_tokenizer = pre_tokenizers.Whitespace()


def ids(loader: type, number: str) -> str:
    """The ids of two words from a folder whose model has ``number`` as a factor, or the error."""
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(f'{{"model_type": "deepseek_v2", "routed_scaling_factor": {number}}}')
    try:
        return str(loader.from_pretrained(folder)("hello world")["input_ids"])
    except Exception as error:
        kind = "built-in" if isinstance(error, (ValueError, TypeError, OSError)) else "not built-in"
        return f"{type(error).__name__} ({kind}): expected{str(error).rpartition('expected')[2]}"


cases = {
    "AutoTokenizer, 1.0": ids(transformers.AutoTokenizer, "1.0"),
    "AutoTokenizer, 1": ids(transformers.AutoTokenizer, "1"),
    "PreTrainedTokenizerFast, 1": ids(transformers.PreTrainedTokenizerFast, "1"),
}
expected = {
    "AutoTokenizer, 1.0": "[0, 1]",
    "AutoTokenizer, 1": "StrictDataclassFieldValidationError (not built-in): expected float, got int (value: 1)",
    "PreTrainedTokenizerFast, 1": "[0, 1]",
}
print("transformers", transformers.__version__)
for name, found in cases.items():
    print(f"{name}: {found}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder"
