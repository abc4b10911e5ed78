"""The view of a person: notebooks in a real JupyterLab, in headless Chromium, in both themes.

Opt-in (`-m lab`), since it needs a browser: `pip install -e ".[test,lab]"`, and a `chromium` on
PATH, Debian's for instance.  `.ci/run` runs it where there is one.  Screenshots are kept in
`build/screenshots`, or in the directory that `SCREENSHOTS` names.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbformat
import pytest
from checkout import ROOT
from screenshots import folder, keep
from waiting import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
CHROMIUM = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE = 120_000
"""Milliseconds until what a page is about to show is missed."""
STUCK = 120.0
"""Seconds that one cell may take on a busy machine."""
WIDTH, HEIGHT = 1180, 5200
"""A window in which the whole tour is drawn at once: JupyterLab leaves out what is out of sight."""


class Lab:
    """A JupyterLab of the test's own: folder, settings, cache, runtime files."""

    def __init__(self, home: Path, module: str = "jupyterlab") -> None:
        self.home = home
        self.folder = home / "work"
        self.folder.mkdir(parents=True)
        self.token = secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MEMO_", "JUPYTER"))}
        env |= {
            "PYTHONPATH": str(ROOT),
            "MEMO_DIRECTORY": str(home / "memo"),
            "MEMO_SECRET": "s" * 64,
            "HOME": str(home),
            "IPYTHONDIR": str(home / "ipython"),
            "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
            "JUPYTER_CONFIG_DIR": str(home / "config"),
            "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        }
        self.log = (home / "lab.log").open("wb")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", module, "--no-browser", "--allow-root"),
                *(f"--port={self.port}", "--ip=127.0.0.1"),
                f"--IdentityProvider.token={self.token}",
                *(f"--ServerApp.root_dir={self.folder}", "--LabApp.news_url=None"),
                *("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",),
            ],
            env=env,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self._wait()

    def _wait(self) -> None:
        def answers() -> bool:
            assert self._process.poll() is None, self.said()
            with suppress(OSError), urllib.request.urlopen(self.url("api/status"), timeout=2):
                return True
            return False

        assert wait_for(answers, 180), self.said()

    def said(self) -> str:
        return (self.home / "lab.log").read_text(errors="replace")[-3000:]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}?token={self.token}"

    def has_kernel(self, notebook: str) -> bool:
        """The notebook has a kernel that is ready."""
        with urllib.request.urlopen(self.url("api/sessions"), timeout=STUCK) as reply:
            sessions = json.load(reply)
        return any(
            session["path"] == notebook and session["kernel"]["execution_state"] == "idle"
            for session in sessions
        )

    def theme(self, name: str) -> None:
        """The theme for pages that are opened from now on."""
        place = self.home / "settings" / "@jupyterlab" / "apputils-extension"
        place.mkdir(parents=True, exist_ok=True)
        (place / "themes.jupyterlab-settings").write_text(json.dumps({"theme": THEMES[name]}))
        quiet = {"fetchNews": "false", "checkForUpdates": False}  # no question over what is shown
        (place / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
        other = self.home / "settings" / "@jupyterlab" / "notebook-extension"
        other.mkdir(parents=True, exist_ok=True)
        (other / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A running JupyterLab."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@contextmanager
def launched() -> Iterator[Any]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no chromium on PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(CHROMIUM))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    with launched() as browser:
        yield browser


@pytest.fixture(params=THEMES)
def page(request: pytest.FixtureRequest, lab: Lab, browser: Any) -> Iterator[Any]:
    """A page of the lab in one of the themes."""
    lab.theme(request.param)
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
    page = context.new_page()
    page.theme = request.param
    yield page
    context.close()


def opened(page: Any, lab: Lab, path: Path) -> Any:
    """A notebook, opened alone and run from top to bottom; its cells."""
    name = f"{path.stem}-{page.theme}.ipynb"  # each gets a kernel of its own
    shutil.copy(path, lab.folder / name)
    page.goto(lab.url(f"doc/tree/{name}"))
    codes = sum(c["cell_type"] == "code" for c in nbformat.read(path, as_version=4).cells)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=PATIENCE)
    assert wait_for(lambda: page.locator(".jp-CodeCell").count() == codes, PATIENCE / 1000)
    get_kernel(page, lab, name)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=PATIENCE)
    started(page)
    finished(page)
    assert page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
    return page.locator(".jp-CodeCell")


def get_kernel(page: Any, lab: Lab, notebook: str) -> None:
    """Wait until a notebook has its kernel; if the server is slow, JupyterLab asks which one."""
    asked = page.locator("dialog.jp-Dialog .jp-mod-accept")

    def ready() -> bool:
        if asked.count():
            asked.first.click()
        return lab.has_kernel(notebook) and not asked.count()

    assert wait_for(ready, STUCK), lab.said()


def prompt(page: Any, cell: int) -> str:
    """The prompt beside a cell: `[ ]:`, `[*]:`, or a number when it has run."""
    return page.locator(f".jp-CodeCell >> nth={cell}").locator(".jp-InputPrompt").inner_text()


def started(page: Any) -> None:
    """Run all cells; a menu that is not ready yet does nothing, and is tried again."""
    for _ in range(6):
        page.click(".jp-Notebook .jp-Cell >> nth=0")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        if wait_for(lambda: prompt(page, 0).strip() != "[ ]:", 10):
            return
    raise AssertionError("the cells do not run")


def finished(page: Any) -> None:
    """Wait until the last cell has run: as long as cells go on, and at most for `STUCK` at one."""
    last = page.locator(".jp-CodeCell").count() - 1
    seen: list[str] = []

    def goes_on() -> bool:
        return seen != page.locator(".jp-InputPrompt").all_inner_texts()

    while not re.fullmatch(r"\[\d+\]:", prompt(page, last).strip()):
        assert wait_for(goes_on, STUCK), page.locator(".jp-Notebook").inner_text()
        seen = page.locator(".jp-InputPrompt").all_inner_texts()


def screenshot(page: Any, name: str, target: Any = None) -> None:
    """Keep a picture of the page."""
    keep(target or page, f"{name}-{page.theme}")


def parts(page: Any, name: str, top: float, bottom: float) -> None:
    """A screenshot of what lies between two heights."""
    clip = {"x": 30, "y": top - 8, "width": 900, "height": bottom - top + 16}
    keep(page, f"{name}-{page.theme}", clip=clip)


TEXTS = ", ".join(f".memo {one}" for one in ("th", "td", "p", "small", "li", "button:enabled"))
FAINT = """() => {
  const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const parts = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const behind = element => {
    for (let place = element; place; place = place.parentElement) {
      const found = parts(getComputedStyle(place).backgroundColor);
      if (found.length === 3 || found[3] > 0.5) return found;
    }
    return [255, 255, 255];
  };
  const texts = Array.from(document.querySelectorAll('TEXTS'));
  const told = texts.filter(text => text.innerText.trim()).map(text => {
    const one = light(parts(getComputedStyle(text).color)), other = light(behind(text));
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    const wanted = text.matches('small, .memo-dim') ? 3 : 4.5;
    return [text.innerText.slice(0, 60), ratio, ratio >= wanted];
  });
  return [told.length, told.filter(one => !one[2])];
}"""


def place(element: Any) -> dict[str, float]:
    """Its box on the page; while it is drawn anew it has none."""
    boxes: list[Any] = []
    assert wait_for(lambda: boxes.append(element.bounding_box()) or boxes[-1], PATIENCE / 1000)
    return boxes[-1]  # type: ignore[no-any-return]


def faint(texts: str = TEXTS) -> str:
    """A script that gives the number of some texts, and those that do not stand out."""
    return FAINT.replace("TEXTS", texts)


def is_legible(page: Any) -> None:
    """Every text of memo's own stands out from what is behind it (WCAG: 4.5 : 1; notes 3 : 1)."""
    count, wrong = page.evaluate(faint())
    assert count > 10
    assert not wrong


def fits(page: Any) -> None:
    """Nothing of memo's own is wider than the cell that it stands in; a wide table scrolls."""
    assert page.locator(".memo").count()
    wide = page.evaluate("""() => Array.from(document.querySelectorAll('.memo'))
        .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 80))""")
    assert not wide


def test_the_tour(page: Any, lab: Lab) -> None:
    """The tour as a person sees it: lines under cells, tables, the plot, sorting by a click."""
    cells = opened(page, lab, ROOT / "notebooks" / "tour.ipynb")
    text = page.locator(".jp-Notebook").inner_text()
    assert re.search(r"\d+ hits? \(\w+\)", text)
    assert "saved" in text
    page.wait_for_function(
        "() => document.querySelector('.jp-Notebook').innerText.includes('1 stale, refreshed')",
        timeout=PATIENCE,
    )
    is_legible(page)
    fits(page)
    sides = page.locator(".memo tbody th").evaluate_all(
        "heads => heads.map(head => getComputedStyle(head).textAlign)"
    )
    assert set(sides) == {"left"}

    stats = cells.filter(has_text="%cache_stats --plot").locator(".jp-OutputArea-output .memo")
    plot = stats.locator("svg rect")
    assert plot.count() > 3
    assert stats.locator("thead th").first.inner_text() == "function"
    head = stats.locator("thead th", has_text="hits").first
    head.click()
    assert head.get_attribute("aria-sort") == "descending"
    column = head.evaluate("e => e.cellIndex")
    values = stats.locator("tbody tr").evaluate_all(
        "(rows, i) => rows.map(r => Number(r.cells[i].dataset.v))", column
    )
    assert values == sorted(values, reverse=True)
    assert len(values) == 3
    head.click()
    assert head.get_attribute("aria-sort") == "ascending"
    screenshot(page, "tour")
    screenshot(page, "stats", stats)
    first = cells.filter(has_text="sales.tail(2)")
    together = cells.filter(has_text="frames[0]")
    top, bottom = place(first), place(together)
    parts(page, "readme", top["y"], bottom["y"] + bottom["height"])


def test_the_picture_of_the_readme(lab: Lab, browser: Any, tmp_path: Path) -> None:
    """`picture.py` makes it anew, and it shows what its description says."""
    import picture

    text = picture.take(lab, browser, tmp_path / "tour.png")
    assert "7 misses" in text
    assert "1 hit (memory)" in text
    assert "1 entry on this host" in text
    assert "2 hits (memory) · 3 misses" in text
    made = (tmp_path / "tour.png").read_bytes()
    assert made.startswith(b"\x89PNG")
    width, height = (int.from_bytes(made[at : at + 4], "big") for at in (16, 20))
    assert 700 < width < 1000
    assert 500 < height < 1000
    (folder() / "readme.png").write_bytes(made)


SLOW = """@cache(ttl='1h')
def slow(region, year=2024):
    time.sleep(2.5 if year == 2024 else 0.1)
    return region"""


def test_progress_and_dashboard(page: Any, lab: Lab) -> None:
    """A bar while a cell computes; a dashboard that follows, and whose buttons work."""
    path = lab.home / "dashboard.ipynb"
    made = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        cells=[
            nbformat.v4.new_code_cell(source)
            for source in (
                "import time, memo\nfrom memo import cache\n%load_ext memo",
                SLOW,
                "slow.invalidate(); slow('EU', 2023); slow('EU', 2023)\nmemo.dashboard()",
                "slow('EU')",
                "%cache_explain slow('US')",
            )
        ],
    )
    nbformat.write(made, path)
    cells = opened(page, lab, path)
    assert "slow() took " in cells.nth(3).inner_text()
    assert "the nearest entry has 'EU'" in cells.nth(4).inner_text()
    board = cells.nth(2).locator(".memo-live")
    board.wait_for(timeout=PATIENCE)
    mine = board.locator(".memo-entries tbody tr").filter(has_text=f"{page.theme}.ipynb:slow")
    mine.filter(has_text="year=2023").wait_for(timeout=PATIENCE)
    board.get_by_text("1 hit · 2 misses").wait_for(timeout=PATIENCE)
    count, wrong = page.evaluate(faint(".memo-live :is(th, td, p, small, dt, dd, h2)"))
    assert count > 10
    assert not wrong
    assert board.locator(".memo-node").count() == 2
    board.get_by_label("Filter").fill("year=2023")
    assert wait_for(lambda: mine.count() == 1, 20)
    screenshot(page, "dashboard", board)

    mine.get_by_role("button", name="Explain").click()
    mine.get_by_text("year=2023) is fresh").wait_for(timeout=PATIENCE)
    mine.get_by_role("button", name="Refresh").click()
    mine.get_by_text("in the background").wait_for(timeout=PATIENCE)
    board.locator(".memo-node", has_text="year=2023").click()
    panel = board.locator(".memo-panel")
    panel.get_by_text("computing took").wait_for(timeout=PATIENCE)
    panel.get_by_role("button", name="Refresh").click()
    panel.get_by_text("in the background").wait_for(timeout=PATIENCE)
    board.locator(".memo-functions").get_by_role("button", name="Invalidate").click()
    board.locator(".memo-functions .memo-said", has_text="slow(").wait_for(timeout=PATIENCE)
    page.keyboard.press("Escape")
    cells.nth(3).click()
    page.keyboard.press("Control+Enter")
    bar = cells.nth(3).locator(".memo-bar")
    bar.wait_for(timeout=PATIENCE)
    running = board.locator(".memo-running", has_text="slow:EU:2024 computing")
    running.get_by_text(re.compile(r"of about 2\.\d s")).wait_for(timeout=PATIENCE)
    screenshot(page, "progress", cells.nth(3))
    screenshot(page, "running", board)
    cells.nth(3).get_by_text("slow() took ").wait_for(timeout=PATIENCE)
    board.get_by_text("1 hit · 3 misses").wait_for(timeout=PATIENCE)

    page.set_viewport_size({"width": 500, "height": HEIGHT})
    assert wait_for(lambda: place(board)["width"] < 500, 20)
    inside = (
        "e => Array.from(e.querySelectorAll('button')).every(b => !b.offsetParent ||"
        " b.getBoundingClientRect().right <= e.getBoundingClientRect().right + 1)"
    )
    assert wait_for(lambda: board.evaluate(inside), 20), "what can be done is in sight"
    screenshot(page, "dashboard-500", board)


SMALL = """import time, memo
from memo import cache
@cache(ttl='1h')
def load(region): return [region] * 3
@cache(ttl='1h')
def report(): return load('EU')
@cache(ttl='1h')
def slow(x): time.sleep(4); return x
report(); load('US')
memo.dashboard()"""


@pytest.fixture(scope="module")
def notebook_7(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A running Notebook 7."""
    server = Lab(tmp_path_factory.mktemp("notebook"), module="notebook")
    yield server
    server.close()


@pytest.mark.parametrize("theme", THEMES)
def test_the_dashboard_in_notebook_7(browser: Any, notebook_7: Lab, theme: str) -> None:
    """The same view in Notebook 7, in a window of 500 pixels, with all that its buttons do."""
    notebook_7.theme(theme)
    name = f"small-{theme}.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    cells = [nbformat.v4.new_code_cell(source) for source in (SMALL, "slow(1)")]
    nbformat.write(nbformat.v4.new_notebook(metadata=kernel, cells=cells), notebook_7.folder / name)
    page = browser.new_context(viewport={"width": 500, "height": 2000}).new_page()
    page.theme = theme
    page.goto(notebook_7.url(f"notebooks/{name}"))
    page.wait_for_selector(".jp-CodeCell", timeout=PATIENCE)
    get_kernel(page, notebook_7, name)
    board = page.locator(".memo-live")

    def runs() -> bool:
        page.click(".jp-CodeCell .cm-content >> nth=0")
        page.keyboard.press("Control+Enter")
        return wait_for(lambda: board.count() > 0, 15)

    assert any(runs() for _ in range(6))
    board.get_by_label("Filter").fill(f"small-{theme} US")
    rows = board.locator(".memo-entries tbody tr")
    assert wait_for(lambda: rows.count() == 1, 20)
    rows.get_by_role("button", name="Explain").click()
    rows.get_by_text(f"{name}:load(region='US') is fresh").wait_for(timeout=PATIENCE)
    rows.get_by_role("button", name="Refresh").click()
    rows.get_by_text("in the background").wait_for(timeout=PATIENCE)
    rows.get_by_role("button", name="Invalidate").click()
    rows.get_by_text(f"Invalidated {name}:load(region='US')").wait_for(timeout=PATIENCE)
    rows.get_by_text("invalidated", exact=True).wait_for(timeout=PATIENCE)
    page.click(".jp-CodeCell .cm-content >> nth=1")
    page.keyboard.press("Control+Enter")
    board.locator(".memo-running", has_text="slow:1 computing").wait_for(timeout=PATIENCE)
    screenshot(page, "notebook7")
    count, wrong = page.evaluate(faint(".memo-live :is(th, td, p, small, li, dt, dd, h2)"))
    assert count > 10
    assert not wrong
    board.get_by_text("Nothing is being computed.").wait_for(timeout=PATIENCE)
    assert board.locator(".memo-node").count() == 4
    page.context.close()
