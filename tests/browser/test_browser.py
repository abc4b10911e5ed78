"""The page of `memo ui` in a real browser, over three processes that work.

Opt-in (`-m lab`), as `test_lab.py` is, which has the same view in JupyterLab and in Notebook 7.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from screenshots import keep
from test_lab import PATIENCE, browser, faint, place
from ui_process import Ui
from waiting import wait_for

__all__ = ["browser"]  # a fixture

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

WORK = """
import sys, time
from memo import cache

@cache(name="etl:load", ttl=3600, version="1")
def load(region, year):
    time.sleep(0.1)
    return [region] * 1000

@cache(name="etl:report", ttl=3600, version="1")
def report(year):
    return [len(load(region, year)) for region in ("EU", "US")]

@cache(name="etl:slow", ttl=3600, version="1")
def slow(process):
    print("running", flush=True)
    sys.stdin.readline()
    return process

report(2023), report(2024), load("EU", 2024)
began = time.perf_counter()
slow(int(sys.argv[1]))
print(time.perf_counter() - began, flush=True)
sys.stdin.readline()
"""


BROKEN = """() => Array.from(document.querySelectorAll(
    '.memo-live :is(thead th, td[data-state], tbody th, button)'))
  .filter(e => e.offsetParent && e.firstChild && !e.textContent.trim().includes(' '))
  .filter(e => {
    const range = document.createRange();
    range.selectNodeContents(e.firstChild);
    return new Set(Array.from(range.getClientRects(), r => Math.round(r.top))).size > 1;
  }).map(e => e.textContent)"""
"""The single words that stand in more than one line."""


@pytest.fixture
def workers() -> Iterator[list[subprocess.Popen[str]]]:
    """Three processes, each of which computes until it is told to end."""
    pipe = subprocess.PIPE
    started = []
    for number in range(3):
        command = [sys.executable, "-c", WORK, str(number)]
        one = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        started.append(one)
        assert one.stdout is not None
        assert one.stdout.readline() == "running\n"
    yield started
    for one in started:
        one.kill()
        one.communicate()


@pytest.fixture
def ui(workers: list[subprocess.Popen[str]]) -> Iterator[Ui]:
    made = Ui()
    yield made
    made.process.terminate()
    made.process.communicate(timeout=20)


def opened(browser: Any, ui: Ui, width: int, scheme: str) -> Any:
    """The page in a window of some width."""
    size = {"width": width, "height": 1400}
    page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda said: page.faults.append(said.text) if said.type == "error" else None)
    page.goto(ui.url)
    page.locator(".memo-entries tbody tr").first.wait_for(timeout=PATIENCE)
    return page


def entry(page: Any, text: str) -> Any:
    return page.locator(".memo-entries tbody tr").filter(has_text=text)


def test_what_three_processes_do_is_on_the_page(
    browser: Any, ui: Ui, workers: list[subprocess.Popen[str]]
) -> None:
    """A running computation is listed with its clock time, and goes when it has ended."""
    page = opened(browser, ui, 1200, "light")
    running = page.locator(".memo-running li")
    assert wait_for(lambda: running.count() == 3, 20)
    assert wait_for(lambda: bool(re.findall(r"[\d.]+ s so far", running.first.inner_text())), 20)
    shown = lambda: float(re.findall(r"([\d.]+) s so far", running.first.inner_text())[0])
    begun, first = time.perf_counter(), shown()
    assert wait_for(lambda: shown() - first >= 2, 20)
    waited = time.perf_counter() - begun
    assert shown() - first == pytest.approx(waited, abs=1.3), "the page asks once a second"
    assert workers[0].stdin is not None
    workers[0].stdin.write("\n")
    workers[0].stdin.flush()
    assert wait_for(lambda: running.count() == 2, 10)
    head = page.locator(".memo-live header")
    assert wait_for(lambda: re.search("7 hits · 9 misses .* in 3 processes", head.inner_text()), 20)
    assert page.locator(".memo-functions tbody tr").count() == 3
    keep(page, "ui-light", full_page=True)
    assert not page.faults


def test_filter_sort_explain_and_invalidate(browser: Any, ui: Ui) -> None:
    """A click filters, sorts, explains and invalidates; the answer stands beside the button."""
    page = opened(browser, ui, 1400, "light")
    page.get_by_label("Filter").fill("load year=2024")
    assert wait_for(lambda: page.locator(".memo-entries tbody tr").count() == 2, 10)
    head = page.locator(".memo-entries thead th", has_text="arguments")
    head.click()
    assert head.get_attribute("aria-sort") == "descending"
    first = page.locator(".memo-entries tbody tr").first
    assert "region='US'" in first.inner_text()
    first.get_by_role("button", name="Explain").click()
    first.get_by_text("etl:load(region='US', year=2024) is fresh").wait_for(timeout=PATIENCE)
    assert first.get_by_role("button", name="Refresh").is_disabled()
    first.get_by_role("button", name="Invalidate").click()
    said = entry(page, "region='US'").locator(".memo-said")
    said.filter(has_text="Invalidated").wait_for(timeout=PATIENCE)
    keep(page, "ui-invalidated", full_page=True)
    assert "etl:report(year=2024)" in said.inner_text(), "what goes with it"
    assert "year=2023" not in said.inner_text()
    entry(page, "region='US'").get_by_text("invalidated", exact=True).wait_for(timeout=PATIENCE)
    page.get_by_label("Filter").fill("no such thing")
    page.get_by_text("No entry matches the filter.").wait_for(timeout=PATIENCE)
    assert not page.faults


def test_the_graph_answers_to_mouse_and_keyboard(browser: Any, ui: Ui) -> None:
    """A node explains itself; chosen by click or Enter it is invalidated and changes colour."""
    page = opened(browser, ui, 1200, "dark")
    nodes = page.locator(".memo-graph .memo-node")
    assert wait_for(lambda: nodes.count() == 9, 20)
    assert page.locator(".memo-node[data-state='running']").count() == 3
    node = page.locator(".memo-node[data-function='etl:load']").first
    assert "computing took" in node.locator("title").text_content()
    node.focus()
    page.keyboard.press("Enter")
    panel = page.locator(".memo-panel")
    panel.get_by_text("computing took").wait_for(timeout=PATIENCE)
    panel.get_by_role("button", name="Invalidate").click()
    panel.get_by_text("Invalidated etl:load(").wait_for(timeout=PATIENCE)
    gone = page.locator(".memo-node[data-state='invalidated']")
    assert wait_for(lambda: gone.count() == 2, 20), "the call and the report that was built on it"
    keep(page, "ui-dark", full_page=True)
    assert not page.faults


@pytest.mark.parametrize("width", [400, 500, 1000, 2000])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_in_any_window(browser: Any, ui: Ui, width: int, scheme: str) -> None:
    """From 400 to 2,000 pixels, light and dark: nothing sticks out, every text stands out."""
    page = opened(browser, ui, width, scheme)
    keep(page, f"ui-{width}-{scheme}", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    functions = page.locator(".memo-functions tbody tr")
    for row in (entry(page, "etl:load").first, functions.first):
        box = place(row.get_by_role("button", name="Invalidate"))
        assert box["x"] + box["width"] <= width, "what can be done is in sight"
    assert page.evaluate(BROKEN) == [], "no word is broken in two"
    count, wrong = page.evaluate(faint(".memo-live :is(th, td, p, small, li, dt, dd, h2)"))
    assert count > 20
    assert not wrong
    assert not page.faults


def test_a_server_that_ends_is_said_to_have(browser: Any, ui: Ui) -> None:
    """When `memo ui` ends the page says so instead of showing old figures in silence."""
    page = opened(browser, ui, 800, "light")
    ui.process.kill()
    page.get_by_text("memo ui does not answer").wait_for(timeout=PATIENCE)
