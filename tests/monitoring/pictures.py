"""Take the pictures of ``docs/pictures``: the live view of a run, its report, a comparison, and the page of a service.

    python -m tests.monitoring.pictures [DIRECTORY]

Two small PPO runs are trained in processes of their own, without Ray; tmux shows the first one as it goes on, and headless
Chromium (see ``tests/browser.py``) the pages. Pictures are written to DIRECTORY, by default ``docs/pictures``; each is to be
looked at.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from rlhf_ray.cli.main import main as command
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.run import RunConfig
from rlhf_ray.serving.server import WebServer
from tests.browser import Watched, chromium
from tests.serving.services import Lengths, service
from tests.trainers import small_runs

ROOT = Path(__file__).parents[2]
STEPS, SHOWN_STEP = 16, 9
COLUMNS, LINES = 96, 34
LIMIT_S = 1800
TOO_LARGE = 120_000
"""Bytes of a picture at most."""
COLOURS = 96
"""So many are enough for flat colours and the edges of letters, at a third of the bytes."""
RUNS = {
    "first": ["policy.engine.optimizer.learning_rate=3e-4"],
    "second": ["policy.engine.optimizer.learning_rate=1e-3"],
}
TOKEN = "token-of-the-pictures"


def train(root: Path) -> None:
    """Train both runs in this process, one after the other; their reward is the length of an answer."""
    batch = "{prompts_per_step: 4, samples_per_prompt: 4, sequences_per_update: 16, max_tokens_per_micro_batch: 512}"
    settings = [
        f"steps={STEPS}",
        "rollout.max_new_tokens=16",
        f"batch={batch}",
        "data.world={prompts: 64, evaluation_prompts: 2}",
    ]
    for name, others in RUNS.items():
        small_runs.train(small_runs.config_of("ppo", root, f"run.name={name}", *settings, *others))


def tmux(*words: str) -> str:
    """What a command to a tmux server of our own prints."""
    return subprocess.run(
        ["tmux", "-u", "-L", f"pictures-{os.getpid()}", *words], capture_output=True, text=True, check=True
    ).stdout


def live_view(root: Path) -> str:
    """The picture of the first run at its step ``SHOWN_STEP``, as a terminal has it, while it is trained."""
    words = [sys.executable, "-m", "tests.monitoring.pictures", "--train", str(root)]
    with (root / "runs.log").open("w") as log, subprocess.Popen(words, cwd=ROOT, stderr=log, stdout=log) as trained:
        wait(lambda: (root / "first/metrics.jsonl").exists(), trained, root / "runs.log")
        follow = f"cd {ROOT} && {sys.executable} -m rlhf_ray status {root}/first --follow"
        size = ("-x", str(COLUMNS), "-y", str(LINES))
        tmux(
            "-f", "/dev/null", "new-session", "-d", *size, f"env TERM=screen-256color sh -c '{follow}; sleep {LIMIT_S}'"
        )
        shown = ""

        def is_there() -> bool:
            nonlocal shown
            shown = tmux("capture-pane", "-e", "-p")
            return "by rank" in shown and _step(shown) >= SHOWN_STEP

        try:
            wait(is_there, trained, root / "runs.log")
        finally:
            tmux("kill-server")
        if trained.wait() != 0:
            raise SystemExit((root / "runs.log").read_text())
    return shown


def _step(shown: str) -> int:
    """The step in the line of progress."""
    found = re.search(rf"^step (\d+) of {STEPS}", Text.from_ansi(shown).plain, re.MULTILINE)
    return 0 if found is None else int(found[1])


def wait(is_there: Callable[[], bool], trained: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for something that happens while the run is trained."""
    until = time.monotonic() + LIMIT_S
    while not is_there():
        if trained.poll() or time.monotonic() > until:
            raise SystemExit(f"the run failed, or nothing came for {LIMIT_S} s:\n{log.read_text()}")
        time.sleep(0.2)


def as_page(ansi: str) -> str:
    """What a terminal shows, as HTML."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(Text.from_ansi(ansi.rstrip(), no_wrap=True), soft_wrap=True)
    colours, font = "background: #292929; color: #e8eaed", "font: 14px/1.25 'DejaVu Sans Mono', monospace"
    style = f"body {{ margin: 0; {colours} }} pre {{ margin: 0; padding: 14px 18px; width: fit-content; {font} }}"
    body = console.export_html(code_format="<pre>{code}</pre>", inline_styles=True, theme=SVG_EXPORT_THEME)
    return f"<!doctype html><meta charset=utf-8><style>{style}</style>{body}"


def take(page: Any, path: Path, *, of: str = "", height: int | None = None) -> None:
    """Write a picture of an element, or of what the screen shows from the top on."""
    target = page.locator(of).first if of else page
    clip = (
        {}
        if of or height is None
        else {"clip": {"x": 0, "y": 0, "width": page.viewport_size["width"], "height": height}}
    )
    target.screenshot(path=str(path), **clip, **({} if of else {"full_page": True} if clip else {}))
    Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    size = path.stat().st_size
    sys.stdout.write(f"{path} {size} bytes{' (too large)' * (size > TOO_LARGE)}\n")


def pages(browser: Any, root: Path, where: Path, ansi: str) -> None:
    """The pictures of pages that are files."""
    (root / "live.html").write_text(as_page(ansi))
    with Watched(browser, width=1000) as watched:
        watched.page.goto((root / "live.html").as_uri())
        take(watched.page, where / "live-view.png", of="pre")
    with Watched(browser, width=1280) as watched:
        watched.page.goto((root / "comparison.html").as_uri())
        take(watched.page, where / "comparison.png", height=1000)
    report = (root / "first/report.html").as_uri()
    with Watched(browser, width=1280) as watched:
        watched.page.goto(report)
        take(watched.page, where / "report.png", of="section:has(h2:text('Why a step was slow'))")
    with Watched(browser, width=390, scheme="dark") as watched:
        watched.page.goto(report)
        watched.page.locator("section:has(h2:text('Token by token')) details").first.click()
        take(watched.page, where / "tokens-on-a-phone.png", of=".sample")


def service_page(browser: Any, where: Path) -> None:
    """The page of a service whose model scores the length of an answer."""
    role = ScoringRole(model=ModelConfig(path="model", dtype="fp32"))
    config = ServeConfig(kind="serve", run=RunConfig(name="pictures"), reward=role)
    server = WebServer("127.0.0.1", 0)
    server.start(service(config, Lengths("length-of-the-answer"), keys=lambda: {TOKEN: "pictures"}))
    try:
        with Watched(browser, width=1280) as watched:
            page = watched.page
            page.goto(server.address)
            page.fill("#token", TOKEN)
            page.click("#login button")
            page.wait_for_selector("#service:not([hidden])")
            page.fill("#turns textarea", "What is the capital of France?")
            page.fill("#text-a", "Paris.")
            page.fill("#text-b", "The capital of France is Paris, which lies on the Seine.")
            page.click("#score")
            page.wait_for_selector("#answer-b data")
            take(page, where / "service.png", height=844)
    finally:
        server.stop()


def main() -> None:
    """Train, look and write."""
    where = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs/pictures").absolute()
    where.mkdir(parents=True, exist_ok=True)
    if shutil.which("tmux") is None:
        raise SystemExit("there is no tmux (apt-get install tmux)")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        ansi = live_view(root)
        compare = ["compare", str(root / "first"), str(root / "second"), "--output", str(root / "comparison.html")]
        if command(compare) != 0:
            raise SystemExit("the runs were not compared")
        with chromium() as browser:
            pages(browser, root, where, ansi)
            service_page(browser, where)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(Path(sys.argv[2]))
    else:
        main()
