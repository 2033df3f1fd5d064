"""docs/demo.ipynb runs from its first cell to its last."""

import json

import matplotlib
import pytest
from curves import ROOT

NOTEBOOK = ROOT / "docs" / "demo.ipynb"


def cells():
    content = json.loads(NOTEBOOK.read_text())
    assert content["nbformat"] == 4
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_python_without_outputs():
    """No magic, so that it is tested as it stands; no output, so that it is small and says nothing old."""
    content = json.loads(NOTEBOOK.read_text())
    for number, source in enumerate(cells()):
        compile(source, f"cell {number}", "exec")
    assert all(not cell["outputs"] for cell in content["cells"] if cell["cell_type"] == "code")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    names: dict = {"__name__": "notebook"}
    for source in cells():
        exec(source.replace("EPOCHS = 12", "EPOCHS = 2").replace('"400"', '"60"'), names)
    assert (tmp_path / "notebook_runs/both.html").is_file()
    assert len(names["figure"].axes) == 8
    for source in cells():  # and a second time, when all is there
        exec(source.replace("EPOCHS = 12", "EPOCHS = 2").replace('"400"', '"60"'), names)
