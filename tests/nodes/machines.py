"""Machines of a cluster, made of Linux namespaces on this one: each has its own network, processes, host name, shared memory
and ``/tmp/ray``. The rest of the disk is shared, as a cluster's file system is. Needs root and iproute2.

Invariant: a machine ends with everything on it, its network included, when it is powered off or this process ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
NETWORK = "10.231.0"
OWN_DISK = "/tmp/ray"
"""What a machine does not share with the other."""
PROGRAMS = ("ip", "unshare", "nsenter", "mount", "hostname")
LONGEST_S = 600
PAGE_PORT = 8090
"""Where Ray's metrics agent answers on each machine."""


def missing() -> str | None:
    """What this machine lacks to make others of itself; none if nothing."""
    if os.geteuid() != 0:
        return "root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return ", ".join(absent)
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode != 0:
        return "the right to make namespaces"
    return None


@dataclass(frozen=True)
class Machine:
    """One of two that reach each other."""

    name: str
    address: str
    init: subprocess.Popen[str]
    """Its first process as seen from here, of which all its others are descendants."""
    variables: Mapping[str, str]

    @property
    def pid(self) -> int:
        (first,) = psutil.Process(self.init.pid).children()
        return first.pid

    def command(self, *words: object) -> list[str]:
        """The command line that runs ``words`` there."""
        inside = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--uts", "--ipc", "--wd=/", "--"]
        return [*inside, *map(str, words)]

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Start a command there."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.command(*words), env=dict(self.variables), stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *words: object, expect: int = 0, timeout_s: float = 180.0) -> str:
        """Run a command there to its end and return what it said; its exit code must be ``expect``."""
        process = self.start(*words)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        assert process.returncode == expect, f"{words[:6]} ended with {process.returncode}:\n{output[-6000:]}"
        return output

    def rlhf_ray(self, *words: object, expect: int = 0) -> str:
        """Run an rlhf-ray command there."""
        return self.run(PYTHON, "-m", "rlhf_ray", *words, expect=expect)

    def ray(self, *words: object) -> str:
        """Run a command of Ray there."""
        return self.run(Path(PYTHON).with_name("ray"), *words)

    def page(self) -> str:
        """What Ray's metrics agent says there, or nothing while it does not answer."""
        where = f"http://{self.address}:{PAGE_PORT}"
        read = f"import urllib.request; print(urllib.request.urlopen('{where}', timeout=5).read().decode())"
        with contextlib.suppress(AssertionError):
            return self.run(PYTHON, "-c", read)
        return ""

    def power_off(self) -> None:
        """End every process there at once."""
        with contextlib.suppress(psutil.Error, ValueError):
            psutil.Process(self.pid).kill()
        self.init.kill()
        self.init.wait(timeout=20)


@contextlib.contextmanager
def two_machines(directory: Path, own_name: str | None = "127.0.1.1") -> Iterator[tuple[Machine, Machine]]:
    """Two machines on one network; the own name of each resolves to ``own_name``, as on Debian, or to nothing.

    ``directory`` is for their files of host names.
    """
    machines: list[Machine] = []
    try:
        for number in (1, 2):
            machines.append(_boot(f"node{number}", f"{NETWORK}.{10 + number}", own_name, directory))
        first, second = machines
        cable = ["ip", "link", "add", "eth0", "netns", str(first.pid), "type", "veth", "peer", "name", "eth0"]
        subprocess.run([*cable, "netns", str(second.pid)], check=True)
        for machine in machines:
            machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
            machine.run("ip", "link", "set", "eth0", "up")
        yield first, second
    finally:
        for machine in machines:
            machine.power_off()


def _boot(name: str, address: str, own_name: str | None, directory: Path) -> Machine:
    hosts = directory / f"hosts-{name}"
    hosts.write_text("127.0.0.1 localhost\n" + (f"{own_name} {name}\n" if own_name else ""))
    # The first process must wait for orphans: Ray counts zombies as running.
    script = f"""
        hostname {name} && ip link set lo up && mkdir -p {OWN_DISK} && mount --bind {hosts} /etc/hosts
        mount -t tmpfs -o size=1g tmpfs {OWN_DISK} && mount -t tmpfs -o size=600m tmpfs /dev/shm && mkdir {OWN_DISK}/home
        echo ready
        sleep {LONGEST_S} & wait
    """
    apart = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
    init = subprocess.Popen([*apart, "bash", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert init.stdout is not None and init.stdout.readline() == "ready\n", f"{name} does not come up"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "GLOO_", "NCCL_", "VLLM_"))}
    variables = kept | {
        "HOME": f"{OWN_DISK}/home",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(PYTHON).parent}{os.pathsep}{kept['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "1000",
    }
    return Machine(name, address, init, variables)


def start_cluster(first: Machine, second: Machine) -> None:
    """A Ray cluster of both, one CPU each, whose head is the first."""
    store = f"--object-store-memory={150 * 2**20}"
    common = ["--num-cpus=1", f"--metrics-export-port={PAGE_PORT}", store, "--disable-usage-stats"]
    first.ray("start", "--head", f"--node-ip-address={first.address}", "--port=6379", *common)
    second.ray("start", f"--address={first.address}:6379", f"--node-ip-address={second.address}", *common)


def placed_on(output: str, ranks: str) -> set[str]:
    """The nodes that ``ranks`` (such as ``policy: 2 ranks``) were placed on, as the driver said."""
    (line,) = [line for line in output.splitlines() if f"{ranks} placed on " in line]
    return set(line.partition(" placed on ")[2].split(", "))
