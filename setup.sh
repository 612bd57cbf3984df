#!/usr/bin/env bash
# Makes .venv with the pinned CPU environment and this project in it; does nothing when .venv already holds these pins.
# PYTHON chooses the interpreter (3.11 to 3.13). Installs from the index that pip is configured with; only torch's CPU build
# is also looked for in PyTorch's own wheel index, and only where the configured index does not have it.
set -euo pipefail
cd "$(dirname "$0")"

stamp=".venv/.pins-$({ cat requirements/*.txt setup.sh; sed '/^\[tool\.ruff\]/,$d' pyproject.toml; } | sha256sum | cut -c1-16)"
[ -e "$stamp" ] && exit 0

find_python() {
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.11, 3.12 or 3.13 found: install one, or name it: PYTHON=/path/to/python3 make ..." >&2
    exit 2
}

python=$(find_python)
echo "setting up .venv with $("$python" --version) (once; about two minutes)"
rm -rf .venv
"$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }

pip install --quiet -r requirements/build.txt
pip install --quiet --no-deps -r requirements/torch-cpu.txt ||
    pip install --quiet --no-deps --timeout 15 --retries 2 --index-url https://download.pytorch.org/whl/cpu -r requirements/torch-cpu.txt
pip install --quiet --no-deps -r requirements/cpu.txt -r requirements/dev.txt
DS_BUILD_OPS=0 pip install --quiet --no-deps --no-build-isolation -r requirements/deepspeed.txt
pip install --quiet --no-deps --no-build-isolation --editable .
touch "$stamp"
