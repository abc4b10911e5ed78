"""The notebooks run from top to bottom in a real kernel, and again after a restart."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from checkout import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TOUR, PIPELINE, TEAM = (ROOT / "notebooks" / f"{n}.ipynb" for n in ("tour", "pipeline", "team"))


@pytest.fixture(autouse=True)
def _environment(cache_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel's environment: this checkout, and the test's own cache."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)


class Ran:
    """A notebook that has run in a kernel of its own: what each cell showed, by the cell's id."""

    def __init__(self, notebook: nbformat.NotebookNode) -> None:
        self.cells = {cell["id"]: cell for cell in notebook.cells}

    def text(self, cell: str) -> str:
        """Everything a cell showed, as plain text."""
        parts = []
        for output in self.cells[cell]["outputs"]:
            if output["output_type"] == "stream":
                parts.append(output["text"])
            else:
                parts.append(output["data"].get("text/plain", ""))
        return "\n".join(parts)

    def html(self, cell: str) -> str:
        """Everything a cell showed as HTML."""
        outputs = self.cells[cell]["outputs"]
        return "\n".join(o["data"].get("text/html", "") for o in outputs if "data" in o)


async def run(path: Path, folder: Path) -> Ran:
    """Run a notebook in a new kernel that works in a folder; fails where a cell does."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    await NotebookClient(notebook, timeout=90, resources=resources).async_execute()
    return Ran(notebook)


def requests_in(text: str) -> int:
    found = re.search(r"requests to the server so far: (\d+)", text)
    assert found, text
    return int(found[1])


MEASURED = {"stats", "dashboard", "journal-stats"}
"""Cells of tables, whose rows and columns depend on what was measured."""


def said(notebook: Ran) -> dict[str, list[str]]:
    """The lines without a figure, by the id of their cell: the same in each run of a notebook."""
    return {
        cell: [
            line
            for line in notebook.text(cell).splitlines()
            if not re.search(r"\d|^\[IPKernelApp\]", line)  # the kernel's own warnings
        ]
        for cell, content in notebook.cells.items()
        if content["cell_type"] == "code" and cell not in MEASURED
    }


def committed(path: Path) -> Ran:
    """A notebook as it is stored, with the outputs that the gallery shows."""
    return Ran(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_as_they_ran(path: Path) -> None:
    """A committed notebook is valid, has an id per cell, and ran from top to bottom."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.nbformat_minor >= 5
    assert len({cell["id"] for cell in notebook.cells}) == len(notebook.cells)
    codes = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in codes] == list(range(1, len(codes) + 1))
    assert not re.search(r"/home/|/root/|Traceback", str([cell["outputs"] for cell in codes]))


def ran(text: str) -> set[str]:
    """The functions that ran, as the pipeline's notebook prints them."""
    found = re.search(r"^ran: (.*)$", text, re.MULTILINE)
    assert found, text
    return set(found[1].split(", "))


def test_every_notebook_is_run() -> None:
    """Each notebook has a test below that executes it anew."""
    assert {TOUR, PIPELINE, TEAM} == set(NOTEBOOKS)


def planned(text: str) -> set[str]:
    """The stages that a plan computes, named as `ran` names them."""
    calls = re.findall(r"^ +compute (\S+)", text, re.MULTILINE)
    return {"report" if call.startswith("report") else call.replace(":", " ") for call in calls}


async def test_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A touched or new file, an edited rule and new prices each run what is concerned, no more."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = await run(PIPELINE, tmp_path)
    everything = {"report", "clean EU", "clean US", "clean ASIA"}
    assert ran(done.text("first")) == {*everything, "prices"}
    assert ran(done.text("again")) == {"nothing"}
    assert ran(done.text("touch")) == {"clean US"}
    assert "1 revalidated" in done.text("touch")
    plan = r"plan:\n\s+revalidate report:EU:US:ASIA .*\n\s+compute clean:US \(file changed\)"
    assert re.search(plan, done.text("touch"))
    assert re.search(plan, done.text("file"))
    assert "orders-US.csv, which has changed" in done.text("explain")
    assert ran(done.text("file")) == {"clean US", "report"}
    assert ran(done.text("code")) == everything
    assert "code of is_valid() changed" in done.text("code")
    for cell in ("touch", "code", "update"):
        assert planned(done.text(cell)) == ran(done.text(cell)), cell
    assert ran(done.text("region")) == {"report", "clean AFRICA"}
    assert ran(done.text("update")) == {"prices", "report"}
    assert done.text("stream").count("opening the file of EU") == 1
    assert done.text("stream").count("20001 lines") == 2
    stored = committed(PIPELINE)
    for cell in ("first", "again", "touch", "file", "code", "region", "update"):
        assert ran(stored.text(cell)) == ran(done.text(cell)), "run the notebook, and commit it"
    assert re.search(r"sells \d+% of it all", done.text("cell"))
    told, *_, line = filter(None, done.text("cell-again").splitlines())
    assert told == done.text("cell").splitlines()[0]
    assert line.startswith("1 hit (")
    assert "cell(" in done.text("stats")

    again = await run(PIPELINE, tmp_path)  # a new kernel: the files are as they were delivered
    assert "1 miss" not in again.text("cell-again")


async def test_the_team(tmp_path: Path) -> None:
    """Two kernels share results and invalidations, through an outage of their Redis."""
    done = await run(TEAM, tmp_path)
    assert said(committed(TEAM)) == said(done), "run the notebook, and commit it"
    assert "computing EU" in done.text("share")
    assert "the same: True" in done.text("share")
    assert "there: sales of EU" in done.text("share")
    assert "new data from the EU" in done.text("invalidate")
    assert "newer than before: True" in done.text("fresh")
    assert "the same: True" in done.text("outage")
    assert "journalled" in done.text("journal")
    assert "1 invalidation on the way to Redis" in done.text("journal-stats")
    assert "<table" in done.html("journal-stats")
    assert "replayed: ['corrected']" in done.text("recovery")
    assert "ours is the old value: False" in done.text("recovery")
    assert "the colleague sees the old value: False" in done.text("recovered")


UNATTENDED = (
    "%load_ext memo\nimport time\nfrom memo import cache\n%cache_report on",
    "n = 1",
    "@cache(replay=True)\ndef f(x):\n    print('computing')\n    time.sleep(0.7)\n    return x * 2",
    "f(n)",
    "f(n)",
    "%%cache\ny = f(n) + 1\nprint(y)",
    "%cache_stats f",
    "%unload_ext memo",
)


@pytest.mark.parametrize("how", ["jupyter execute", "papermill"])
def test_unattended_runs(tmp_path: Path, how: str) -> None:
    """`jupyter execute` and papermill show what a notebook shows, but no progress."""
    cells = [nbformat.v4.new_code_cell(source) for source in UNATTENDED]
    cells[1]["metadata"]["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path, made = tmp_path / "unattended.ipynb", tmp_path / "made.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    command = ["-c", "from nbclient.cli import main; main()", str(path), f"--output={made}"]
    if how == "papermill":
        pytest.importorskip("papermill")
        command = ["-m", "papermill", str(path), str(made), "-p", "n", "5"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    ran = Ran(nbformat.read(made, as_version=4))
    codes = [cell["id"] for cell in ran.cells.values() if cell["cell_type"] == "code"]
    shown = [list(filter(None, ran.text(code).splitlines())) for code in codes]
    before = len(shown) - len(UNATTENDED)  # papermill puts in a cell of its own
    first, second, cell, stats = shown[before + 3 : before + 7]
    result = "10" if how == "papermill" else "2"
    assert first == ["computing", result, "1 miss: f() not cached yet"]
    assert second[:2] == ["computing", result]
    assert second[2].startswith("1 hit (memory) · saved ")
    assert cell[:2] == ["computing", str(int(result) + 1)]
    assert "2 hits · 1 miss" in stats[0]


async def test_the_tour(tmp_path: Path) -> None:
    """The tour's promises: hits, sharing, another process, invalidation, and a restart."""
    first = await run(TOUR, tmp_path)
    assert said(committed(TOUR)) == said(first), "run the notebook, and commit it"

    assert requests_in(first.text("first")) == 1
    assert "1 miss: load() not cached yet" in first.text("first")
    assert requests_in(first.text("again")) == 1
    assert re.search(r"1 hit \(\w+\) · saved", first.text("again"))
    assert "requests for US: 1 | untouched: True" in first.text("together")

    in_script, here = first.text("process").strip().splitlines()[-2:]
    assert in_script.startswith("1000 rows, sold in all:")
    assert here == f"{in_script} here"

    assert re.search(r"1 hit", first.text("pipeline-again"))
    assert "asked the server again for: ['EU']" in first.text("update")
    assert "sold after" in first.text("update")
    assert "invalidated tour.load(region='ASIA')" in first.text("by-hand")
    assert first.text("stale-again").splitlines()[-1].startswith("1 stale, refreshed · saved")

    assert "tour.load" in first.text("stats")
    assert "<svg" in first.html("stats")
    assert "<table" in first.html("stats")
    assert "tour.load" in first.text("frame")
    assert "region=EU" in first.text("entries").replace("'", "")

    again = await run(TOUR, tmp_path)  # a new kernel, as after a restart
    assert requests_in(again.text("first")) == 0
    assert requests_in(again.text("again")) == 0
    assert again.text("first").splitlines()[-1].startswith("1 hit (")
    assert "requests for US: 0 | untouched: True" in again.text("together")
    assert "asked the server again for: ['EU']" in again.text("update")


@pytest.mark.parametrize(
    ("notebook", "to"), [(TOUR, "html"), (TOUR, "markdown"), (PIPELINE, "html")]
)
def test_a_converted_notebook_has_the_graph_and_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebook: Path, to: str
) -> None:
    """`nbconvert --execute` of the notebooks keeps the graph as SVG, and the tables."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--execute", "--to", to]
    options = [f"--output-dir={tmp_path}", "--ExecutePreprocessor.timeout=90"]
    done = subprocess.run([*command, *options, str(notebook)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = tmp_path.glob(f"{notebook.stem}.*")
    (made,) = [path for path in found if path.suffix in (".html", ".md")]
    text = made.read_text("utf-8")
    drawings = list(tmp_path.rglob("*.svg"))
    images = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text)
    assert images or drawings
    drawn = "".join(path.read_text("utf-8") for path in drawings)
    drawn += "".join(base64.b64decode(image).decode() for image in images)
    assert "Cached calls and what they were built on" in drawn
    assert drawn.count("memo-node") > 4
    function = "tour.load" if notebook == TOUR else "prices"
    assert f">{function}<" in drawn
    assert function in text
    assert re.search(r"<table|\\u2500{20}|─{20}", text)
    assert "object at 0x" not in text
