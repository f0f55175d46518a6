"""docs/quickstart.ipynb runs from its first cell to its last.

`pip install nbclient ipykernel`, then `pytest -m slow tests/docs`.
"""

from __future__ import annotations

import os
import shlex
import sys

import pytest

from tests.cli import ROOT


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("%pip install -q ..", "")  # what is tested is installed already
    program = tmp_path / "medgpt"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m medicalgpt_cli "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "error:" not in said and "Traceback" not in said
    assert "rl        reward" in said
