"""The table of architectures in docs/architectures.md, made from what every architecture of transformers really does.

Run by ``make architectures`` (some 15 minutes on two cores): ``python -m tests.architectures.table [MODEL_TYPE ...]``. With
names it prints their cells; without, it tries all and writes the page. Exit code 1 if a cell is neither right nor refused by
``check``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_ray import environment
from rlhf_ray.config.files.architectures import NOT_RUN, SERVED_BY_VLLM
from rlhf_ray.config.files.encoders import ENCODERS

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
SCORES_TO, GRADIENTS_TO = 1e-5, 1e-4
"""Largest differences that count as right, over the largest score and over the largest gradient. Merging an adapter rounds each
weight, which counts as a gradient does. A rollout differs by nats, of which the self-check of a run allows as many."""
SECONDS = 180
"""Limit for one cell."""
CELLS = ("scoring", "training", "LoRA", "export", "vLLM", "rollout")
APART = ("vLLM", "rollout")
"""Cells in processes of their own, whose threads and process groups vLLM changes."""
Result = float | str


def try_all(model_types: Sequence[str], cells: Sequence[str] = CELLS) -> dict[str, dict[str, Result]]:
    """Try every cell of every architecture, each architecture in a process of its own."""
    others = [cell for cell in cells if cell not in APART]
    results = {}
    for model_type in model_types:
        results[model_type] = _apart(model_type, others) if others else {}
        for cell in APART:
            if cell in cells:
                results[model_type] |= _apart(model_type, [cell])
    return results


def _apart(model_type: str, cells: Sequence[str]) -> dict[str, Result]:
    """The cells of one architecture, tried in a fork, so that nothing it does reaches the next one."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(SECONDS * len(cells))
        os.write(writer, json.dumps(_cells(model_type, cells)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"scoring": "error: its process died"}


def _cells(model_type: str, cells: Sequence[str]) -> dict[str, Result]:
    from tests.architectures import cells as tries

    with tempfile.TemporaryDirectory() as directory:
        try:
            one = tries.Architecture(model_type, Path(directory) / "model")
        except Exception as error:
            return {"scoring": f"not made: {type(error).__name__}: {_line(error)}"}
        return {cell: tries.outcome(one, cell) for cell in cells if one.has(cell)}


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def verdict(cell: str, result: Result | None) -> str:
    """What the page says of a cell: right, refused, or what is wrong."""
    if result is None:
        return "no head"
    if isinstance(result, float):
        limit = GRADIENTS_TO if cell in ("training", "LoRA", "rollout") else SCORES_TO
        return "right" if result <= limit else f"WRONG: {result:.1e}"
    return result


def page_tables(results: Mapping[str, Mapping[str, Result]]) -> str:
    """The tables of the page: what runs, encoders, and what is refused by its reason."""
    refused = {kind for kinds in NOT_RUN.values() for kind in kinds}
    runs = sorted(set(results) - refused - ENCODERS)
    lines = [
        "| architecture | scoring and serving | training | LoRA | read by transformers | vLLM's scorer |",
        "|---|---|---|---|---|---|",
    ]
    for kind in runs:
        cells = [verdict(cell, results[kind].get(cell)) for cell in CELLS if cell != "rollout"]
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    lines += ["", "| mixture of experts | vLLM's rollout |", "|---|---|"]
    for kind in runs:
        if "rollout" in results[kind]:
            lines.append(f"| `{kind}` | {verdict('rollout', results[kind]['rollout'])} |")
    lines += ["", "| encoder | scoring and serving | vLLM's scorer |", "|---|---|---|"]
    for kind in sorted(ENCODERS & set(results)):
        lines.append(
            f"| `{kind}` | {verdict('scoring', results[kind].get('scoring'))} | {verdict('vLLM', results[kind].get('vLLM'))} |"
        )
    lines += ["", "| refused, since | `model_type` |", "|---|---|"]
    for reason, kinds in NOT_RUN.items():
        named = (f"`{kind}`" + ("*" if kind in SERVED_BY_VLLM else "") for kind in sorted(kinds))
        lines.append(f"| {reason} | {', '.join(named)} |")
    return "\n".join(lines)


def write_page(results: Mapping[str, Mapping[str, Result]]) -> None:
    """Put the tables between the marks of the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page_tables(results)}\n\n{END}{after}")


def main(names: Sequence[str]) -> int:
    """Try, print or write, and say whether every cell is right or refused."""
    from tests.architectures.configs import model_types

    environment.prepare()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results = try_all(names or model_types())
    for kind, cells in results.items():
        print(kind, {cell: verdict(cell, result) for cell, result in cells.items()}, flush=True)
    if not names:
        write_page(results)
    verdicts = [verdict(cell, result) for cells in results.values() for cell, result in cells.items()]
    return int(any(text.startswith(("WRONG", "error")) for text in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
