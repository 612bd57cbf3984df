"""The wheel holds all that the package needs: modules, the template and stylesheet of the report, recipes, ``py.typed``."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_every_file_of_the_package_and_every_recipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("rlhf_ray/")}
    files = {path for path in (ROOT / "rlhf_ray").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    needed = {str(path.relative_to(ROOT)) for path in files}
    needed |= {f"rlhf_ray/configs/{recipe.name}" for recipe in (ROOT / "configs").glob("*.yaml")}
    assert {
        "rlhf_ray/py.typed",
        "rlhf_ray/monitoring/report/page.html",
        "rlhf_ray/monitoring/report/style.css",
    } <= needed
    assert needed - packed == set()
