"""The picture of the README, taken of a real notebook.

`PYTHONPATH=tests/support python tests/browser/picture.py` writes `docs/tour.png`.  It needs what
the tests beside it need: the extra `lab`, and a `chromium`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nbformat
from test_lab import HEIGHT, PATIENCE, ROOT, Lab, finished, launched, started
from waiting import wait_for

PLACE = ROOT / "docs" / "tour.png"
LOAD = """import time
from memo import cache

@cache(ttl="1h")
def load(region, year):
    time.sleep(0.8)  # a slow query
    return [f"{region} {day}" for day in range(500)]

@cache(ttl="1h")
def clean(region, year):
    return [row.title() for row in load(region, year)]

@cache(ttl="1h")
def report(year):
    return {region: len(clean(region, year)) for region in ("EU", "US", "ASIA")}"""
CELLS = (
    "%load_ext memo\n%cache_report on",
    LOAD,
    "report(2024)",
    "report(2024)                    # again, or after a restart",
    "load.invalidate(region='US')    # the US data has changed",
    "memo.graph()",
    "report(2024)",
)
FIRST = 2
"""The first cell that is in the picture."""


def take(lab: Lab, browser: Any, place: Path) -> str:
    """Run the notebook in a JupyterLab, and keep a picture of it; what it says, as text."""
    lab.theme("light")
    path = lab.folder / "sales.ipynb"
    sources = (CELLS[0] + "\nimport memo", *CELLS[1:])
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(metadata=kernel, cells=cells), path)
    page = browser.new_context(viewport={"width": 900, "height": HEIGHT}).new_page()
    page.goto(lab.url("doc/tree/sales.ipynb"))
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=PATIENCE)
    assert wait_for(lambda: page.locator(".jp-CodeCell").count() == len(CELLS), PATIENCE / 1000)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=PATIENCE)
    started(page)
    finished(page)
    page.keyboard.press("Escape")
    page.locator(".jp-CodeCell").nth(0).click()
    shown = [page.locator(".jp-CodeCell").nth(at) for at in range(FIRST, len(CELLS))]
    boxes = [cell.bounding_box() for cell in shown]
    left, top = boxes[0]["x"], boxes[0]["y"]
    bottom = boxes[-1]["y"] + boxes[-1]["height"]
    clip = {"x": left, "y": top - 6, "width": 815, "height": bottom - top + 12}
    page.screenshot(path=str(place), clip=clip)
    text = "\n".join(cell.inner_text() for cell in shown)
    page.context.close()
    return text


def main() -> None:
    """Take it anew."""
    with tempfile.TemporaryDirectory() as home, launched() as browser:
        lab = Lab(Path(home))
        try:
            take(lab, browser, PLACE)
        finally:
            lab.close()


if __name__ == "__main__":
    main()
