"""Requests that Schemathesis makes from the service's OpenAPI document, sent over HTTP to a service with its token on.

Always true: Schemathesis runs in an environment of its own and knows nothing but the address and the token; whatever it
sends, the service answers with a documented status, body and headers, and to nobody without the token.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from starlette.applications import Starlette

from rlhf_ray.serving.server import WebServer

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / ".venv-schemathesis"
PACKAGE = "schemathesis==4.32.5"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)
"""Not those that hold a schema for the whole truth: it cannot say that an item has to fit the model, for one."""
TIMEOUT_S = 900.0


@dataclass(frozen=True)
class SchemathesisRun:
    """What Schemathesis says of its run."""

    requests: int
    problems: list[str]


def command() -> Path:
    """Schemathesis's program, after making its environment where it is missing or holds another version."""
    program, stamp = DIRECTORY / "bin/schemathesis", DIRECTORY / f".{PACKAGE}"
    if not stamp.exists():
        print(f"setting up {DIRECTORY.name} (once)", flush=True)
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", DIRECTORY], check=True)
        pip = [DIRECTORY / "bin/python", "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-qq"]
        if subprocess.run([*pip, PACKAGE]).returncode != 0:
            raise SystemExit(f"cannot install {PACKAGE}, which needs a package index: see pip's message above")
        stamp.touch()
    return program


def send(app: Starlette, token: str, examples: int, seed: int) -> SchemathesisRun:
    """Serve ``app``, which asks for ``token``, and let Schemathesis ask: ``examples`` random requests an operation
    at the most, besides those that it finds systematically."""
    program, server = command(), WebServer("127.0.0.1", 0)
    server.start(app)
    try:
        with TemporaryDirectory() as name:
            report = Path(name) / "report.json"
            arguments = [
                program, "run", f"{server.address}/openapi.json", "--header", f"Authorization: Bearer {token}",
                "--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--max-examples", str(examples),
                "--seed", str(seed), "--continue-on-failure", "--no-color", "--generation-database", "none",
                "--report", "json", "--report-json-path", report,
            ]  # fmt: skip
            kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
            ended = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=name, env=kept)
            if not report.exists():
                raise SystemExit(f"{ended.stdout}\n{ended.stderr}\nSchemathesis failed")
            return read_report(json.loads(report.read_text()), ended.returncode, ended.stdout)
    finally:
        server.stop()


def read_report(report: dict[str, Any], exit_code: int, output: str) -> SchemathesisRun:
    """What a report holds; a run that ended early, left a route out or failed without a reason is a problem too."""
    problems = [f"{one['title']}: {', '.join(one['operations'])}" for one in report["failures"]]
    problems += [f"Schemathesis: {error}" for error in report["errors"]]
    operations = report["operations"]
    if not report["complete"] or operations["tested"] != operations["total"]:
        problems.append(
            f"{operations['tested']} of {operations['total']} operations were asked: {report['stop_reason']}"
        )
    if exit_code != 0:
        problems.append(output)
    return SchemathesisRun(report["test_cases"]["generated"], problems)
