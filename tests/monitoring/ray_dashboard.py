"""Take the picture of Ray's own dashboard during a run of PPO: the page of actors.

    python -m tests.monitoring.ray_dashboard [DIRECTORY]

A small run starts Ray with its dashboard and a token of its own, which the page asks for as it does of a user. The picture is
written to DIRECTORY, by default ``docs/pictures``, and is to be looked at.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.browser import Watched, chromium
from tests.monitoring.pictures import ROOT, take, wait

NAME = "demo-ppo"
SETTINGS = [
    f"run.name={NAME}", "cluster={dashboard: true, num_cpus: 4}", "steps=100000", "policy.engine.zero=0",
    "rollout.backend=transformers", "rollout.engines=1",
]  # fmt: skip
HEIGHT = 973
"""Of a page with six actors, in pixels."""
LEAVES_S = 120
"""How long the run may take to stop."""


def look(browser: Any, address: str, token: str, where: Path) -> None:
    """Take the picture of the dashboard at ``address``."""
    with Watched(browser, width=1440) as watched:
        page = watched.page
        page.goto(f"{address}/#/actors")
        page.fill("[role=dialog] input", token)
        with page.expect_navigation():  # once the token is accepted, the page loads itself anew
            page.click("[role=dialog] button:text('Submit')")
        page.wait_for_selector(f"text=rlhf/{NAME}/reward/0")
        take(page, where / "ray-actors.png", height=HEIGHT)


def main() -> None:
    """Train, look and write."""
    where = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs/pictures").absolute()
    where.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(32)
    with tempfile.TemporaryDirectory() as directory, chromium() as browser:
        root, log = Path(directory), Path(directory) / "run.log"
        variables = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_TMPDIR": directory,
            "RAY_ADDRESS": "local",
        }
        words = [
            sys.executable,
            "-m",
            "rlhf_ray",
            "train",
            "ppo",
            "tests/e2e/ppo_tiny.yaml",
            f"run.root={root}",
            *SETTINGS,
        ]
        with (
            log.open("w") as output,
            subprocess.Popen(words, cwd=ROOT, env=variables, stdout=output, stderr=output) as trained,
        ):
            try:
                wait(lambda: (root / NAME / "metrics.jsonl").exists(), trained, log)
                found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
                if found is None:
                    raise SystemExit(f"the run names no dashboard:\n{log.read_text()}")
                look(browser, found[0], token, where)
            finally:
                trained.terminate()
                trained.wait(LEAVES_S)


if __name__ == "__main__":
    main()
