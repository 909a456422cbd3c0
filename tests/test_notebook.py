"""notebooks/mdpo.ipynb runs from its first cell to its last, on a world that is made in a second."""

import json

import pytest
from test_house import ROOT
from toy_world import shrink

NOTEBOOK = ROOT / "notebooks" / "mdpo.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def sources() -> list[str]:
    return ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def shown() -> str:
    """All text that the stored run printed."""
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", [])) for output in outputs)


def test_the_cells_run_in_order(tmp_path, monkeypatch, capsys):
    shrink(monkeypatch)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    names = {}
    for number, source in enumerate(sources()):
        exec(compile(source, f"code cell {number}", "exec"), names)
    assert names["by_losses_py"] == pytest.approx(1.7969, abs=5e-5)  # the worked example of losses.py
    assert sum(names["by_hand"]) == pytest.approx(1.7969, abs=5e-5)
    assert len(names["history"]) == 20
    assert names["history"][0] == pytest.approx(2.0794, abs=5e-5)  # 3 ln 2
    assert names["history"][-1] < 2.0
    assert "_</s>_" in capsys.readouterr().out  # the end is scored
    page = (tmp_path / "runs" / "notebook" / "explain.html").read_text()
    assert names["pair"].id in page


def test_the_stored_run_is_whole():
    """What a reader sees without running it: every cell has run once, in order, and nobody's folders are named."""
    counts = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert len(CELLS) == 15
    text = shown()
    assert "loss 2.0794" in text and "losses.mdpo_loss 1.7969" in text
    assert "Traceback" not in text and "/home" not in text and "/tmp" not in text
