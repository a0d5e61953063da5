"""The notebook, run from its first cell to its last in a process of its own, without a network."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_learns(path: Path, tmp_path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    source = "\n".join("".join(cell["source"]) for cell in cells)
    script = tmp_path / "cells.py"
    script.write_text(f"{source}\nprint('filled', repr(show(filled.tokens[0])))\n")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (loss,) = re.findall(r"the last 50 steps: (\d\.\d+) nats", done.stdout)
    # One that knows only how frequent each byte is needs 2.27 nats.
    assert float(loss) < 2.0
    filled = re.findall(r"filled '(the .* on a mat )'", done.stdout)
    assert filled, "what was given is still there"
