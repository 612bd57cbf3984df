"""Unmodified clients of other projects, from their own packages, against a real service with its token on.

    python -m tests.parity.clients

Always true: each client runs in an environment that holds nothing of this project (TRL reads our adapter for it as a
file), knows nothing but an address, a token and the reward model's tokenizer, and its scores are compared with the forward
in this process.
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
from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.run import RunConfig
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.backend import GroupBackend
from rlhf_ray.serving.server import WebServer

from ..serving.reward_models import BOS, EOS, MEAN, STD, save_reward_model
from ..serving.services import service
from . import environment as parity_environment
from .client_calls import PROMPT

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / ".venv-clients"
PACKAGES = (
    "aiohttp==3.14.5",
    "openai==3.52.0",
    "tei-client==0.2.4",
    "haystack-ai==3.4.1",
    "huggingface-api-haystack==3.1.0",
    "httpx==0.28.1",
    "ray==2.60.0",
    "omegaconf==2.3.0",
    "hydra-core==1.3.2",
    "tensordict==0.10.0",
    "torchdata==0.11.0",
    "codetiming==1.4.0",
    "cachetools==8.0.2",
)
WITHOUT_DEPENDENCIES = ("openrlhf==0.11.2", "verl==0.9.1")
"""Their clients need little of what the rest of the packages does."""
TOKEN = "a-token-of-the-clients"
TEXTS = [f"{BOS}why? because.{EOS}", "  spaces kept ", "ünï", "a" * 50]
TOLERANCE = 1e-5

CLIENTS = ("openrlhf", "verl_vllm", "verl_sglang", "trl", "openai", "openai_base64", "tei", "haystack", "curl")


def python() -> Path:
    """The interpreter of the clients' environment, made where it is missing or holds other packages.

    It reads torch, transformers and TRL from the environment of the other comparisons instead of holding them again.
    """
    beside = parity_environment.python()
    interpreter = DIRECTORY / "bin/python"
    digest = hashlib.sha256(json.dumps([PACKAGES, WITHOUT_DEPENDENCIES]).encode()).hexdigest()[:16]
    stamp = DIRECTORY / f".pins-{digest}"
    if not stamp.exists():
        print(f"setting up {DIRECTORY.name} (once)", flush=True)
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", DIRECTORY], check=True)
        of_both = [_site_packages(one) for one in (interpreter, beside)]
        (of_both[0] / "parity.pth").write_text(f"{of_both[1]}\n")
        pip = [interpreter, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-qq"]
        subprocess.run([*pip, *PACKAGES], check=True)
        subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
        stamp.touch()
    return interpreter


def _site_packages(interpreter: Path) -> Path:
    asked = [interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())


def reference(group: RewardGroup, requests: Sequence[ScoreRequest]) -> list[float]:
    """The scores of the forward in this process."""
    return [float(result.raw) for result in group.score(requests).result() if result.raw is not None]


def expectations(group: RewardGroup) -> dict[str, list[float]]:
    """What each client must get, by how its protocol reads texts."""
    as_they_are = reference(group, [ScoreRequest(text=text) for text in TEXTS])
    with_special = reference(group, [ScoreRequest(text=text, add_special_tokens=True) for text in TEXTS])
    pairs = reference(group, [ScoreRequest(prompt=PROMPT, response=text) for text in TEXTS])
    # verl takes the end token out of an answer, wherever it stands, and leaves the start token in.
    decoded = [ScoreRequest(prompt=PROMPT, response=text.replace(EOS, "")) for text in TEXTS]
    answers = reference(group, decoded)
    normalised = [(score - MEAN) / STD for score in pairs]  # what our own client gets
    read_as = {"openrlhf": as_they_are, "curl": as_they_are, "haystack": pairs, "trl": normalised}
    read_as |= {"verl_vllm": answers, "verl_sglang": answers}
    return {name: read_as.get(name, with_special) for name in CLIENTS}


def ask(name: str, address: str, model: Path) -> list[float]:
    """The scores that one client gets."""
    known = {"address": address, "token": TOKEN, "model": str(model), "project": str(ROOT)}
    asked = json.dumps({"client": name, "texts": TEXTS, **known})
    script = Path(__file__).with_name("client_calls.py")
    kept = {name: os.environ[name] for name in parity_environment.KEPT if name in os.environ}
    done = subprocess.run(
        [python(), script], input=asked, capture_output=True, text=True, timeout=120, cwd="/", env=kept
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\n{done.stderr}\n{name} failed")
    scores: list[float] = json.loads(done.stdout.splitlines()[-1])
    return scores


def run(compare: Callable[[str, list[float], list[float]], bool]) -> bool:
    """Every client against one service; whether ``compare`` says yes to all."""
    with TemporaryDirectory() as directory:
        model = save_reward_model(Path(directory))
        role = ScoringRole(model=ModelConfig(path=str(model), dtype="fp32"))
        group = RewardGroup(InProcessRanks("reward", RewardWorker()))
        group.setup(RewardSetup(role, seed=0), timeout_s=60.0).result()
        config = ServeConfig(kind="serve", run=RunConfig(name="clients"), reward=role)
        expected = expectations(group)
        server = WebServer("127.0.0.1", 0)
        backend = GroupBackend(group, role.model, normalize=False)
        server.start(service(config, backend, keys=lambda: {TOKEN: "clients"}))
        try:
            compared = [compare(name, ask(name, server.address, model), expected[name]) for name in CLIENTS]
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
