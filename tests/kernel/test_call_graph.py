"""The graph of cached calls: what was built on what, with states, times and sizes."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from kernels import Kernel
from time_ahead import Ahead

import memo
from memo import cache
from memo.cli.commands import main
from memo.metrics.recorder import reset


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    reset()


@pytest.fixture
def pipeline(ahead: Ahead) -> Any:
    """Three functions, each built on the one before."""

    @cache(name="etl:load", ttl=3600, version="1")
    def load(region: str) -> list[str]:
        ahead.work(0.05)
        return [region] * 1000

    @cache(name="etl:clean", ttl=3600, version="1")
    def clean(region: str) -> list[str]:
        return load(region)[:500]

    @cache(name="etl:report", ttl=3600, version="1")
    def report() -> int:
        return len(clean("EU")) + len(clean("US"))

    return SimpleNamespace(load=load, clean=clean, report=report)


def labels(graph: Any) -> set[tuple[str, str]]:
    """The edges by function and arguments."""
    names = {node.id: f"{node.label}({node.arguments})" for node in graph.nodes}
    return {(names[a], names[b]) for a, b in graph.edges}


def states(graph: Any) -> dict[str, str]:
    return {f"{node.label}({node.arguments})": node.state for node in graph.nodes}


EDGES = {
    ("etl:load(region='EU')", "etl:clean(region='EU')"),
    ("etl:load(region='US')", "etl:clean(region='US')"),
    ("etl:clean(region='EU')", "etl:report()"),
    ("etl:clean(region='US')", "etl:report()"),
}


def test_edges_are_what_was_built_on_what(pipeline: Any) -> None:
    """Direct inputs only: the report names the cleaned tables, not what these were loaded from."""
    pipeline.report()
    assert labels(memo.graph()) == EDGES


def test_states_follow_what_happens(pipeline: Any) -> None:
    """Computed, then hit; what an invalidation reaches, and what is built on it, is invalidated."""
    pipeline.report()
    assert set(states(memo.graph()).values()) == {"computed"}
    pipeline.load("EU")
    pipeline.report()
    now = states(memo.graph())
    assert now["etl:load(region='EU')"] == "hit"
    assert now["etl:report()"] == "hit"
    assert now["etl:load(region='US')"] == "computed"
    pipeline.load.invalidate("US")
    now = states(memo.graph())
    assert now["etl:load(region='US')"] == "invalidated"
    assert now["etl:clean(region='US')"] == "invalidated"
    assert now["etl:report()"] == "invalidated"
    assert now["etl:clean(region='EU')"] == "computed"


def test_time_and_size_are_those_of_the_clock_and_the_store(pipeline: Any) -> None:
    """A node has the seconds that its computation took and the bytes that are stored."""
    begun = time.perf_counter()
    pipeline.load("EU")
    took = time.perf_counter() - begun
    (node,) = memo.graph().nodes
    assert 0.05 <= node.seconds <= took
    assert node.size > 100
    assert memo.graph().to_dict()["nodes"][0]["seconds"] == node.seconds


def test_what_runs_is_in_it() -> None:
    """A computation under way is a node, before anything of it is stored."""
    go, began = threading.Event(), threading.Event()

    @cache(name="slow", version="1")
    def slow(x: int) -> bool:
        began.set()
        return go.wait(20)

    thread = threading.Thread(target=slow, args=(1,))
    thread.start()
    try:
        assert began.wait(10)
        assert [node.state for node in memo.graph().nodes] == ["running"]
    finally:
        go.set()
        thread.join()
    assert [node.state for node in memo.graph().nodes] == ["computed"]
    assert [node.arguments for node in memo.graph().nodes] == ["x=1"]


WORKER = """
import sys
from memo import cache
@cache(name="far", version="1")
def far(x, y=2):
    if len(sys.argv) > 1:
        print("running", flush=True)
        sys.stdin.readline()
    return x
if len(sys.argv) > 1:
    far.invalidate(1)
far(1)
"""


def test_what_other_processes_compute_is_in_that_of_all(tmp_path: Path) -> None:
    """`memo graph` has each running call once, whether or not an older result of it is stored."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    pipe, command = subprocess.PIPE, [sys.executable, str(script)]
    again = subprocess.Popen([*command, "again"], stdin=pipe, stdout=pipe, text=True)
    try:
        assert again.stdout is not None
        assert again.stdout.readline() == "running\n"
        run = CliRunner().invoke
        assert run(main, ["graph"]).output == "far(1:2)  running\n"
        subprocess.run(command, check=True)
        assert re.fullmatch(r"far\(x=1, y=2\)  running · .*\n", run(main, ["graph"]).output)
    finally:
        again.communicate("\n", timeout=30)
    assert "running" not in run(main, ["graph"]).output


def test_many_calls_are_grouped_by_function() -> None:
    """More than forty calls are one node per function; the other way is a choice."""

    @cache(name="part", version="1")
    def part(x: int) -> int:
        return x

    @cache(name="whole", version="1")
    def whole() -> int:
        return sum(map(part, range(50)))

    whole()
    graph = memo.graph()
    assert {node.label: node.calls for node in graph.nodes} == {"part": 50, "whole": 1}
    assert graph.edges == (("part", "whole"),)
    assert len(memo.graph(group=False).nodes) == 51


def test_the_drawing_is_plain_svg(pipeline: Any) -> None:
    """Well-formed, without scripts or outer resources; every text is escaped and explained."""
    pipeline.report()
    pipeline.load("<script>alert(1)</script>")
    drawn = memo.graph().to_svg()
    root = ET.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    boxes = list(root.iter("{http://www.w3.org/2000/svg}g"))
    assert len(boxes) == 6
    assert all(g.find("{http://www.w3.org/2000/svg}title") is not None for g in boxes)
    assert "<script" not in drawn
    assert "href" not in drawn
    assert set(memo.graph()._repr_mimebundle_()) == {"text/plain", "image/svg+xml"}


def test_the_tree_fits_the_terminal(pipeline: Any) -> None:
    """In a terminal: results first, what they were built on below, nothing wider than asked."""
    pipeline.report()
    pipeline.load("x" * 200)
    lines = memo.graph().to_text(60).splitlines()
    assert all(len(line) <= 60 for line in lines)
    assert lines[0].startswith("etl:report()")
    assert lines[1].startswith("├─ etl:clean(region='EU')")
    assert lines[2].startswith("│  └─ etl:load(region='EU')")


def test_without_calls_it_says_what_to_do() -> None:
    """An empty graph is a sentence, and no drawing."""
    assert "@cache" in repr(memo.graph())
    assert memo.graph().to_svg() == ""


def test_functions_that_call_each_other_are_drawn() -> None:
    """A cycle between functions, which calls cannot have, does not stop the drawing."""

    @cache(name="even", version="1")
    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    @cache(name="odd", version="1")
    def odd(n: int) -> bool:
        return n != 0 and even(n - 1)

    even(6)
    graph = memo.graph(group=True)
    assert set(graph.edges) == {("even", "odd"), ("odd", "even")}
    assert ET.fromstring(graph.to_svg()) is not None
    assert "even" in graph.to_text()


def test_from_the_command_line(pipeline: Any, tmp_path: Path) -> None:
    """`memo graph` shows the tree, `--json` the data, `--svg` the drawing."""
    run = CliRunner().invoke
    empty = run(main, ["graph"])
    assert empty.exit_code == 1
    pipeline.report()
    shown = run(main, ["graph"])
    assert shown.exit_code == 0
    assert "└─ etl:clean(region='US')" in shown.output
    target = tmp_path / "graph.svg"
    assert run(main, ["graph", "--svg", str(target)]).exit_code == 0
    assert ET.parse(target).getroot().tag.endswith("svg")
    assert '"edges"' in run(main, ["graph", "--json"]).output


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path_factory.mktemp("kernel"))
    yield kernel
    kernel.close()


def test_the_magic_shows_svg(kernel: Kernel) -> None:
    """`%cache_graph` and `memo.graph()` show the same drawing in a notebook."""
    kernel.run("@cache\ndef inner(x): return x\n@cache\ndef outer(x): return inner(x)\nouter(1)")
    for code in ("%cache_graph", "memo.graph()"):
        bundle = kernel.run(code).bundles[-1]
        assert bundle["image/svg+xml"].startswith("<svg")
        assert "inner(x=1)" in bundle["text/plain"]
