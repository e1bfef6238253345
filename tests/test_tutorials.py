"""Every tutorial runs from top to bottom, and says what it claims."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[1] / "tutorials"


@pytest.mark.parametrize("path", sorted(TUTORIALS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_runs(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    if path.stem == "integrate_batches":
        before, after, full = map(float, re.search(r"(0\.\d+) before, (0\.\d+) after; (0\.\d+) if", text).groups())
        assert before < 0.5 * full
        assert after > 0.85 * full
        assert float(re.search(r"Rand index\): (0\.\d+)", text).group(1)) > 0.7
