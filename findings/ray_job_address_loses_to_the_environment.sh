#!/usr/bin/env bash
# ray 2.60.0: "ray job ... --address" loses to the environment variable RAY_ADDRESS.
#
# With most commands an option on the command line wins over the environment, and the help of "ray job" reads that way: the
# address "can also be specified" by RAY_API_SERVER_ADDRESS, or RAY_ADDRESS. It is the other way round. Where a shell or an
# image sets one of the two, as inside a job of Ray, the command talks to that cluster, whatever --address says: it lists,
# stops or starts jobs there. Nothing warns; the output only names the address that was used. The docstring of
# JobSubmissionClient, below the command, does say so. The clusters are two small servers of this script.
#
# Seen on 2026-11-30 (the last lines of the output):
#   neither is set: status 0, asked the cluster of the option
#   RAY_ADDRESS is set: status 0, asked the cluster of the environment
#   RAY_API_SERVER_ADDRESS is set: status 0, asked the cluster of the environment
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'ray[default]==2.60.0'
cat > "$folder/try.py" <<'PY'
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

asked: set[str] = set()


class Cluster(BaseHTTPRequestHandler):
    """A cluster without jobs, which notes that it was asked."""

    def do_GET(self) -> None:
        asked.add(self.server.name)
        body = json.dumps({"ray_version": version("ray")} if self.path == "/api/version" else []).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def start(name: str) -> str:
    """The address of a new cluster."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Cluster)
    server.name = name
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


option, environment = start("of the option"), start("of the environment")
variables = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


def who(variable: str | None) -> str:
    """The clusters that "ray job list --address" asks while ``variable`` names another."""
    asked.clear()
    around = {name: value for name, value in os.environ.items() if name not in variables}
    if variable:
        around[variable] = environment
    command = [str(Path(sys.executable).parent / "ray"), "job", "list", "--address", option]
    ran = subprocess.run(command, env=around, capture_output=True, text=True, timeout=120, check=False)
    return f"status {ran.returncode}, asked the cluster {' and '.join(sorted(asked)) or 'of nobody'}"


cases = {"neither is set": who(None)} | {f"{variable} is set": who(variable) for variable in variables}
expected = {
    "neither is set": "status 0, asked the cluster of the option",
    "RAY_ADDRESS is set": "status 0, asked the cluster of the environment",
    "RAY_API_SERVER_ADDRESS is set": "status 0, asked the cluster of the environment",
}
print("ray", version("ray"))
for name, found in cases.items():
    print(f"{name}: {found}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
"$folder/venv/bin/python" "$folder/try.py"
