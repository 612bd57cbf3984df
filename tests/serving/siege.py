"""A service under siege: one caller does all that starves others, groups are killed and stopped, 5,000 scores are asked for.

    python -m tests.serving.siege [--seconds 10] [--scores 5000] [--kills 4] [--rounds 2]

starts ``rlhf-ray serve`` with two tokens. Through all of it one caller asks for a score every 50 ms under the other token.
Always true, or the siege says what was not: that caller gets every score, and the right one; no score of the 5,000 is wrong,
swapped or lost; no route opens without a token; no text and no token is in the log; the service's memory comes back, and a
second round of attacks takes no more of it than the first; its process never ends. ``make test`` runs a short form over a
model that takes no time.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil

from rlhf_ray import environment
from tests.serving.attacks import commands
from tests.serving.reward_models import Reference, save_reward_model
from tests.serving.soak import Finding

ROOT = Path(__file__).parents[2]
CANARY = "canary-text-that-no-log-may-hold"
EVERY_S, LONGEST_S, AT_ONCE = 0.05, 5.0, 64
TOLERANCE = 1e-5
MEMORY_MB = 700.0
"""What all attacks together may add to the service's memory at any time; the documented limits come to about half of it."""
GROWTH_MB = 50.0
"""What the last round of attacks may add to what the first has left. A round holds hundreds of megabytes at its worst."""
SETTLE_S = 8.0
"""After how long freed memory has gone back to the system."""
Expected = Callable[[str], float]


@dataclass(frozen=True)
class Target:
    """A service: where it is, its process, its log, a token for who attacks and one for who is to suffer."""

    address: str
    process: psutil.Process
    log: Callable[[], str]
    attacker: str
    victim: str
    expected: Expected
    """The right score of a text."""

    @property
    def place(self) -> tuple[str, int]:
        """Host and port."""
        url = httpx.URL(self.address)
        assert url.port is not None
        return url.host, url.port

    def memory_mb(self) -> float:
        """Memory of the process and of those it has started, without what they share."""
        total = 0
        for process in [self.process, *self.process.children(recursive=True)]:
            try:
                total += process.memory_full_info().uss
            except psutil.Error:
                continue
        return total / 2**20


@dataclass
class Victim:
    """A caller with small requests, one at a time; what they took and what came of them."""

    target: Target
    seconds: list[float] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def ask(self, until: Callable[[], bool]) -> Victim:
        """Ask until then."""
        headers = {"Authorization": f"Bearer {self.target.victim}"}
        number = 0
        with httpx.Client(base_url=self.target.address, headers=headers, timeout=180) as client:
            while not until():
                number += 1
                text, began = f"{CANARY} {number}", time.monotonic()
                try:
                    answer = client.post("/v1/reward", json={"items": [{"text": text}]})
                except httpx.HTTPError as error:
                    self.troubles.append(type(error).__name__)
                else:
                    self.troubles += self._trouble(text, answer)
                self.seconds.append(time.monotonic() - began)
                time.sleep(max(0.0, EVERY_S - self.seconds[-1]))
        return self

    def _trouble(self, text: str, answer: httpx.Response) -> list[str]:
        if answer.status_code != 200:
            return [f"{answer.status_code} {answer.text[:100]}"]
        raw = answer.json()["results"][0]["raw"]
        return [] if raw is not None and abs(raw - self.target.expected(text)) < TOLERANCE else [f"{raw} is wrong"]

    def quantile_ms(self, share: float) -> float:
        """Milliseconds within which this share of the requests was answered."""
        return 1000 * sorted(self.seconds)[int(share * (len(self.seconds) - 1))]


def attacked(
    target: Target, name: str, command: Sequence[str], seconds: float, longest_s: float = LONGEST_S
) -> Finding:
    """One attack, and what it costs somebody else."""
    began = time.monotonic()
    before = Victim(target).ask(lambda: time.monotonic() > began + min(seconds / 2, 3.0))
    at_rest, peak = target.memory_mb(), 0.0
    attack = subprocess.Popen(command, cwd=ROOT)
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.2):
            peak = max(peak, target.memory_mb())

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        during = Victim(target).ask(lambda: attack.poll() is not None)
        over.set()
        watching.result()
    finding = Finding(f"attack {name}")
    finding.figures = {
        "requests": len(during.seconds), "failed": len(during.troubles),
        "p50_before_ms": before.quantile_ms(0.5), "p50_ms": during.quantile_ms(0.5), "p99_ms": during.quantile_ms(0.99),
        "most_ms": during.quantile_ms(1.0), "memory_mb": max(peak - at_rest, 0.0),
    }  # fmt: skip
    finding.expect(not before.troubles + during.troubles, f"another caller gets its scores: {during.troubles[:3]}")
    finding.expect(during.quantile_ms(1.0) < 1000 * longest_s, f"no request of another caller takes {longest_s:g} s")
    finding.expect(peak - at_rest < MEMORY_MB, f"memory grows by less than {MEMORY_MB:g} MB")
    return finding


def scores(target: Target, count: int, disturb: Callable[[threading.Event], int] = lambda _: 0) -> Finding:
    """So many scores, 64 at a time over two protocols and two tokens, while ``disturb`` does what it does."""
    over = threading.Event()

    def one(number: int) -> float | None:
        text = f"{CANARY}, number {number} {'x' * (number % 60)}"
        headers = {"Authorization": f"Bearer {(target.attacker, target.victim)[number % 2]}"}
        native = number % 4 < 2
        path = "/v1/reward" if native else "/get_reward"
        body: Mapping[str, object] = {"items": [{"text": text}]} if native else {"query": [text]}
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            answer = client.post(path, json=body, headers=headers)
            if answer.status_code != 503:  # which says: send it again
                break
            time.sleep(1.0)
        if answer.status_code != 200:
            return None
        raw = answer.json()["results"][0]["raw"] if native else answer.json()["rewards"][0]
        return None if raw is None else abs(float(raw) - target.expected(text))

    limits = httpx.Limits(max_connections=AT_ONCE)
    with (
        httpx.Client(base_url=target.address, timeout=180, limits=limits) as client,
        ThreadPoolExecutor(AT_ONCE + 1) as pool,
    ):
        disturbing = pool.submit(disturb, over)
        try:
            differences = list(pool.map(one, range(count)))
        finally:
            over.set()
        disturbed = disturbing.result()
    lost = sum(difference is None for difference in differences)
    most = max((difference for difference in differences if difference is not None), default=0.0)
    finding = Finding("scores")
    finding.figures = {"scores": count, "deaths": disturbed, "lost": lost, "largest_difference": most}
    finding.expect(lost == 0, "no score is lost")
    finding.expect(most < TOLERANCE, "no score is wrong or somebody else's")
    return finding


def afterwards(target: Target, at_rest_mb: float) -> Finding:
    """What must hold when all is over."""
    finding, log = Finding("afterwards"), target.log()
    with httpx.Client(base_url=target.address, timeout=30) as stranger:
        routes = ("/v1/reward", "/get_reward", "/classify", "/info", "/metrics", "/docs", "/openapi.json", "/v1/models")
        opened = [route for route in routes if stranger.post(route, json={}).status_code != 401]
        opened += [route for route in routes if stranger.get(route).status_code != 401]
        alive = stranger.get("/health").status_code == 200
    grown = target.memory_mb() - at_rest_mb
    finding.figures = {"memory_mb": grown, "routes_opened": len(opened)}
    finding.expect(alive and target.process.is_running(), "the process of the service lives")
    finding.expect(not opened, f"no route opens without a token: {opened}")
    finding.expect(CANARY not in log, "no text is in the log")
    finding.expect(target.attacker not in log and target.victim not in log, "no token is in the log")
    finding.expect(grown < MEMORY_MB / 2, "memory comes back")
    return finding


def growth(left_mb: Sequence[float]) -> Finding:
    """Whether the last of several equal rounds of attacks left more memory in use than the first."""
    finding = Finding("growth")
    finding.figures = {f"after_round_{number}_mb": left for number, left in enumerate(left_mb, 1)}
    finding.expect(not left_mb or left_mb[-1] - left_mb[0] < GROWTH_MB, f"rounds add less than {GROWTH_MB:g} MB")
    return finding


def reward_processes(process: psutil.Process) -> list[int]:
    """Process ids of the reward ranks below a service."""
    ranks = []
    for child in process.children(recursive=True):
        try:
            if "RewardModelActor" in " ".join(child.cmdline()):
                ranks.append(child.pid)
        except psutil.Error:
            continue
    return ranks


def is_loading(process: psutil.Process) -> bool:
    """Whether no reward rank scores yet; Ray shows in its title the method that a process runs."""
    titles = []
    for pid in reward_processes(process):
        try:
            titles.append(" ".join(psutil.Process(pid).cmdline()))
        except psutil.Error:
            continue
    return not titles or any(".setup" in title or "__init__" in title for title in titles)


def deaths(process: psutil.Process, count: int) -> Callable[[threading.Event], int]:
    """Kills and stops the reward ranks so often: one alone, one twice within a second, one that then hangs."""

    def disturb(over: threading.Event) -> int:
        done = 0
        while done < count and not over.wait(4.0):
            for signal_ in ((signal.SIGKILL,), (signal.SIGKILL, signal.SIGKILL), (signal.SIGSTOP,))[
                done % 3 : done % 3 + 1
            ]:
                for one in signal_:
                    # what hangs while it loads is given up after start_timeout_s, which is longer than requests wait
                    while one == signal.SIGSTOP and is_loading(process) and not over.wait(0.2):
                        pass
                    for pid in reward_processes(process):
                        try:
                            os.kill(pid, one)
                        except ProcessLookupError:
                            continue
                    over.wait(0.5)
            done += 1
            deadline = time.monotonic() + 100
            while not reward_processes(process) and not over.is_set() and time.monotonic() < deadline:
                time.sleep(0.2)
        return done

    return disturb


@contextmanager
def served() -> Iterator[Target]:
    """``rlhf-ray serve`` with two tokens and a tiny reward model."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        model = save_reward_model(directory / "model")
        reference, lock = Reference(model), threading.Lock()

        def expected(text: str) -> float:
            with lock:
                return reference.of_text(text)

        attacker, victim = secrets.token_hex(), secrets.token_hex()
        (directory / "tokens").write_text(f"attacker:{attacker}\nvictim:{victim}\n")
        options = ["port=0", "cluster.num_cpus=2", "cluster.object_store_mb=200", "run.name=siege"]
        command = [sys.executable, "-m", "rlhf_ray", "serve", str(model), "--token-file", str(directory / "tokens")]
        log = directory / "log"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [*command, *options, "reward.resources.cpus_per_rank=0.5"],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True,
            )  # fmt: skip
        try:
            assert process.stdout is not None
            address = next((line.strip() for line in process.stdout if line.startswith("http")), None)
            assert address is not None, log.read_text()
            yield Target(address, psutil.Process(process.pid), log.read_text, attacker, victim, expected)
            assert process.poll() is None, "the service has ended"
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            process.wait(timeout=60)


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(prog="tests.serving.siege", description="a service under everything at once")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each attack")
    parser.add_argument("--scores", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2, help="how often all attacks run")
    parser.add_argument("--only", nargs="*", default=None, help="these attacks alone")
    options = parser.parse_args()
    environment.prepare()
    broken = False

    def say(finding: Finding) -> None:
        nonlocal broken
        broken |= bool(finding.broken)
        promises = "".join(f" BROKEN: {promise}" for promise in finding.broken)
        print(f"{finding.name}: {finding}{promises}", flush=True)

    with served() as target:
        warm = time.monotonic() + 2.0
        Victim(target).ask(lambda: time.monotonic() > warm)
        at_rest_mb = target.memory_mb()
        left_mb = []
        for _ in range(options.rounds):
            for name, command in commands(*target.place, target.attacker, options.seconds):
                if options.only is None or name in options.only:
                    say(attacked(target, name, command, options.seconds))
            time.sleep(SETTLE_S)
            left_mb.append(target.memory_mb() - at_rest_mb)
        say(growth(left_mb))
        say(scores(target, options.scores, deaths(target.process, options.kills)))
        time.sleep(SETTLE_S)
        say(afterwards(target, at_rest_mb))
    raise SystemExit(broken)


if __name__ == "__main__":
    main()
