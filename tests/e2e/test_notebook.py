"""The notebook from pairs to a served reward model runs from top to bottom, and its model has learned to rank."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples/pairs_to_service.ipynb"


def value(cell: nbformat.NotebookNode) -> object:
    """What the last line of a cell evaluated to, if it is a plain value."""
    (result,) = [output for output in cell.outputs if output.output_type == "execute_result"]
    return ast.literal_eval(result.data["text/plain"])


def test_the_notebook_trains_evaluates_and_serves_a_reward_model(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    code = {cell.source.splitlines()[-1]: cell for cell in notebook.cells if cell.cell_type == "code"}
    accuracy = value(code['report.figures["accuracy"]'])
    assert isinstance(accuracy, float) and accuracy > 0.9
    better, worse = value(code["better.reward, worse.reward"])  # type: ignore[misc]
    assert better > worse
    assert value(code["service.wait(timeout=60)"]) == 0
