"""docs/tutorial.ipynb runs from the first cell to the last, on the real pretrained parts."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [pytest.mark.functional, pytest.mark.slow]  # a minute: make test-all
NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"


def printed(cell) -> str:
    return "".join(o.get("text", "") for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def test_the_tutorial_runs_and_shows_what_it_says(smollm2, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not c.get("outputs") for c in notebook.cells)  # kept without results: they are ours to compute
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [c for c in notebook.cells if c.cell_type == "code"]
    objective = next(c for c in code if "half text" in c.source)
    rows = {line.split(" KL")[0].strip(): line.split() for line in printed(objective).splitlines() if " KL " in line}
    kl = {name: float(words[words.index("KL") + 1]) for name, words in rows.items()}
    assert kl["text"] < 1e-3 < kl["half text"] < kl["speech"]  # bfloat16
    said, exported = re.findall(r"^(?:answer|from the \.nemo file): (.+)$", printed(code[-1]), re.MULTILINE)
    assert said == exported
    assert json.loads(NOTEBOOK.read_text())["nbformat"] == 4
