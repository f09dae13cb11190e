"""The notebook runs from its first cell to its last."""

import nbformat
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "try_darionet.ipynb"


def test_the_notebook_runs(trained, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    image = next(iter((trained / "test").glob("*/*")))
    for cell in notebook.cells:
        cell.source = cell.source.replace('"examples/photographs/free/n02167151/9a1c67f467b9beea.jpg"', f'"{image}"')
        cell.source = cell.source.replace('Path("try_darionet.py").exists()', "True")
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(trained))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


def test_what_is_stored_is_small():
    assert NOTEBOOK.stat().st_size < 200_000
