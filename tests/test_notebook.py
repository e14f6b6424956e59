"""docs/notebooks/robust_adapter.ipynb runs, cell after cell, and the adapter that it trains is robust."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

import fulllora_dist as fd

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "robust_adapter.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def test_its_links_lead_somewhere_and_its_outputs_are_small() -> None:
    text = "".join(line for cell in CELLS if cell["cell_type"] == "markdown" for line in cell["source"])
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) > 4
    assert not [link for link in links if not (NOTEBOOK.parent / link).exists()]
    outputs = [output for cell in CELLS for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not [
        output for output in outputs if output["output_type"] not in ("stream", "execute_result", "display_data")
    ]
    assert NOTEBOOK.stat().st_size < 150_000
    assert NOTEBOOK.relative_to(ROOT).as_posix() in (ROOT / "README.md").read_text()


@pytest.mark.long
def test_every_cell_runs_and_the_adapter_is_robust(capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib.use("Agg")
    threads, names = torch.get_num_threads(), dict[str, Any]()
    torch.set_num_threads(1)
    try:
        for cell in CELLS:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}:{cell['id']}", "exec"), names)
    finally:
        torch.set_num_threads(threads)
    before, after = (
        {attack: score["accuracy"] for attack, score in names[report]["attacks"].items()}
        for report in ("before", "after")
    )
    assert before["clean"] > 0.9
    assert before["pgd10"] < 0.2
    assert after["clean"] > 0.8
    assert after["pgd10"] > 0.45
    assert isinstance(names["model"], fd.AdaptedModel)
    assert names["model"].report.share < 0.05
    assert isinstance(names["figure"], Figure)
    assert f"pgd10: {before['pgd10']:.1%} -> {after['pgd10']:.1%}" in capsys.readouterr().out
