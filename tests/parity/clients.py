"""Unmodified clients of other projects, from their own packages, against a real service with its token on.

    python -m tests.parity.clients

Always true: each client runs in an environment that holds nothing of this project, knows nothing but an address and a
token, and its scores are compared with the forward in this process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlhf_ray import environment
from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers import RewardWorker, WorkerSetup
from rlhf_ray.config.schema import ModelConfig, RoleConfig, RunConfig, ServeConfig
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.backend import GroupBackend
from rlhf_ray.serving.server import WebServer

from ..serving.reward_models import BOS, EOS, save_reward_model
from ..serving.services import service

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / ".venv-clients"
PACKAGES = (
    "aiohttp==3.14.5",
    "openai==3.52.0",
    "tei-client==0.2.4",
    "haystack-ai==3.4.1",
    "huggingface-api-haystack==3.1.0",
)
WITHOUT_DEPENDENCIES = ("openrlhf==0.11.2",)
"""Their client needs none of what the rest of the package does."""
TOKEN = "a-token-of-the-clients"
TEXTS = [f"{BOS}why? because.{EOS}", "  spaces kept ", "ünï", "a" * 50]
TOLERANCE = 1e-5

CLIENTS = ("openrlhf", "openai", "openai_base64", "tei", "haystack", "curl")


def python() -> Path:
    """The interpreter of the clients' environment, made where it is missing or holds other packages."""
    interpreter = DIRECTORY / "bin/python"
    digest = hashlib.sha256(json.dumps([PACKAGES, WITHOUT_DEPENDENCIES]).encode()).hexdigest()[:16]
    stamp = DIRECTORY / f".pins-{digest}"
    if not stamp.exists():
        print(f"setting up {DIRECTORY.name} (once)", flush=True)
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", DIRECTORY], check=True)
        pip = [interpreter, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-qq"]
        subprocess.run([*pip, *PACKAGES], check=True)
        subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
        stamp.touch()
    return interpreter


def reference(group: RewardGroup, requests: Sequence[ScoreRequest]) -> list[float]:
    """The scores of the forward in this process."""
    return [float(result.raw) for result in group.score(requests).result() if result.raw is not None]


def expectations(group: RewardGroup) -> dict[str, list[float]]:
    """What each client must get, by how its protocol reads texts."""
    as_they_are = reference(group, [ScoreRequest(text=text) for text in TEXTS])
    with_special = reference(group, [ScoreRequest(text=text, add_special_tokens=True) for text in TEXTS])
    pairs = reference(group, [ScoreRequest(prompt="why? ", response=text) for text in TEXTS])
    read_as = {"openrlhf": as_they_are, "curl": as_they_are, "haystack": pairs}
    return {name: read_as.get(name, with_special) for name in CLIENTS}


def ask(name: str, address: str) -> list[float]:
    """The scores that one client gets."""
    asked = json.dumps({"client": name, "address": address, "token": TOKEN, "texts": TEXTS})
    script = Path(__file__).with_name("client_calls.py")
    online = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [python(), script], input=asked, capture_output=True, text=True, timeout=120, cwd="/", env=online
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\n{done.stderr}\n{name} failed")
    scores: list[float] = json.loads(done.stdout.splitlines()[-1])
    return scores


def run(compare: Callable[[str, list[float], list[float]], bool]) -> bool:
    """Every client against one service; whether ``compare`` says yes to all."""
    with TemporaryDirectory() as directory:
        role = RoleConfig(model=ModelConfig(path=str(save_reward_model(Path(directory))), dtype="fp32"))
        group = RewardGroup(InProcessRanks("reward", RewardWorker()))
        group.setup(WorkerSetup(role, seed=0), timeout_s=60.0).result()
        config = ServeConfig(kind="serve", run=RunConfig(name="clients"), reward=role)
        expected = expectations(group)
        server = WebServer("127.0.0.1", 0)
        backend = GroupBackend(group, role.model, normalize=False)
        server.start(service(config, backend, keys=lambda: {TOKEN: "clients"}))
        try:
            compared = [compare(name, ask(name, server.address), expected[name]) for name in CLIENTS]
            return all(compared)
        finally:
            server.stop()


def same(name: str, got: list[float], expected: list[float]) -> bool:
    """Print the largest difference; whether it is within the bar."""
    worst: Any = max((abs(one - other) for one, other in zip(got, expected, strict=False)), default=float("inf"))
    right = len(got) == len(expected) and worst <= TOLERANCE
    print(f"  {name:20}{worst:10.1e}   {'ok' if right else 'DIFFERS'}")
    return right


def main() -> int:
    """Compare all clients."""
    environment.prepare()
    python()
    print(f"clients: largest absolute difference from the forward in this process, bar {TOLERANCE:g}")
    return 0 if run(same) else 1


if __name__ == "__main__":
    sys.exit(main())
