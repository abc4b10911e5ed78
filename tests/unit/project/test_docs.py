"""Every Python block of the documentation runs, and every link leads somewhere."""

from __future__ import annotations

import ast
import asyncio
import inspect
import linecache
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pytest
import yaml
from checkout import ROOT
from redis_server import RedisServer

import memo
from memo.decorators.cached_function import CachedFunction

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCHEDULERS = ROOT / "docs" / "schedulers.md"
"""Its blocks need the extra `frameworks`, and start processes."""
REDIS = "localhost:6379"
"""The address of the documentation's Redis; the tests put their own in its place."""
LANGUAGES = {"python", "sh", "text", "toml", "ini"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line before its first."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for match in _FENCE.finditer(text):
        yield Block(match[1], match[2], text.count("\n", 0, match.start(2)))


async def run(page: Path, module: types.ModuleType, redis: str) -> None:
    """Run a page's Python blocks one after another, with `await` at the top as in a notebook."""
    for block in blocks(page):
        if block.language != "python":
            continue
        # A file of its own for each block, as in IPython, with the page's line numbers.
        source = "\n" * block.line + block.text.replace(REDIS, redis)
        name = f"<{page.name} from line {block.line + 1}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        code = compile(source, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        outcome = eval(code, module.__dict__)
        if inspect.isawaitable(outcome):
            await outcome


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != SCHEDULERS], ids=lambda page: page.stem
)
def test_every_block_runs(
    page: Path, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands and code of a page work, from its first block to its last."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"page_{page.stem.lower()}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    try:
        with asyncio.Runner() as runner:
            runner.run(run(page, module, f"127.0.0.1:{redis_server.port}"))
    finally:
        vars(module).clear()  # its functions would be there for later tests


@pytest.mark.frameworks
@pytest.mark.timeout(300)
def test_the_page_of_schedulers_runs(tmp_path: Path) -> None:
    """Its blocks are one script, with a real Ray and a real Prefect."""
    script = tmp_path / "schedulers.py"
    script.write_text("\n".join(block.text for block in blocks(SCHEDULERS)))
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as short:  # a path of sockets
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HOME": str(tmp_path),
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
            "RAY_TMPDIR": short,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        done = subprocess.run(
            [sys.executable, script], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr


def test_the_first_block_of_readme_is_a_script(tmp_path: Path) -> None:
    """Saved as a file and run, it computes, hits, and says what it invalidated."""
    script = tmp_path / "first.py"
    script.write_text(next(blocks(ROOT / "README.md")).text)
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "1 entry on this host" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_name_their_language(page: Path) -> None:
    """A block is Python, and run, or one of the few kinds that are not."""
    text = page.read_text("utf-8")
    assert {block.language for block in blocks(page)} <= LANGUAGES
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(list(blocks(page)))


@pytest.mark.parametrize("decorator", [memo.cache, memo.invalidate_cache])
def test_every_option_has_an_example(decorator: Any) -> None:
    """Each option of the decorators has a row in the table of its section, and a block uses it."""
    text = (ROOT / "docs" / "options.md").read_text("utf-8")
    section = re.split(r"^## ", text, flags=re.MULTILINE)
    mine = next(part for part in section if part.startswith(f"`{decorator.__name__}`"))
    used = "\n".join(re.findall(r"^```python$(.*?)^```$", mine, re.MULTILINE | re.DOTALL))
    for option in inspect.signature(decorator).parameters:
        assert re.search(rf"^\| .*`{option}`", mine, re.MULTILINE), option
        assert re.search(rf"@{decorator.__name__}\([^@]*\b{option}=", used), option


def test_every_helper_is_documented() -> None:
    """Each method of a decorated function is in the table of its section, twins included."""
    text = (ROOT / "docs" / "options.md").read_text("utf-8")
    section = text.partition("## On the decorated function")[2].partition("\n## ")[0]
    names = [name for name in vars(CachedFunction) if not name.startswith("_")]
    assert [name for name in names if f"`f.{name}" not in section] == []
    assert len(names) >= 17


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file of the project."""
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))
    # The site shows the notebooks under gallery/.
    targets = [re.sub(r"^gallery/", "../notebooks/", target) for target in targets]
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def pictures(page: Path) -> set[str]:
    """The files that a page shows, without those elsewhere in the web."""
    found = re.findall(r"!\[[^\]]+\]\(([^)#\s]+)", page.read_text("utf-8"))
    return {target for target in found if "://" not in target}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_page_has_a_picture_or_a_block_that_runs(page: Path) -> None:
    """No page is prose alone: it shows a picture, or code that the tests execute."""
    executed = [block for block in blocks(page) if block.language == "python"]
    assert executed or pictures(page)


def test_each_idea_has_a_picture() -> None:
    """Keys, validity, tiers and trust are drawn, and no picture lies about unused."""
    docs = ROOT / "docs"
    assert pictures(docs / "concepts.md") >= {"keys.svg", "validity.svg", "tiers.svg", "trust.svg"}
    drawn = {path.name for path in docs.iterdir() if path.suffix in {".svg", ".png"}}
    assert drawn == {Path(name).name for page in PAGES for name in pictures(page)}


def test_readme_is_short_and_shows_code_first() -> None:
    """At most 150 lines, and the first code before the 60th word."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text[: text.index("```")].split()) < 60


def test_readme_says_what_a_newcomer_asks() -> None:
    """The default ttl, a picture, the times of both commands, each extra, and the live view."""
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert inspect.signature(memo.cache).parameters["ttl"].default == 60
    assert "Bare `@cache` keeps results for 60 seconds" in text
    assert pictures(ROOT / "README.md") == {"docs/tour.png"}
    assert "a minute or two" in text
    assert "about 10 minutes on two cores" in text
    for extra in ("notebook", "ui", "otel", "data", "remote"):
        assert f"`{extra}`" in text
    assert "pip install '.[notebook,ui,otel]'" in text
    assert "`memo ui`" in text
    assert "`memo.dashboard()`" in text


def test_troubleshooting_is_by_symptom() -> None:
    """Its headings are what a user sees, not what causes it."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    found = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert found[:5] == [
        "It never hits",
        "It hits too often",
        "It is slow",
        "The disk is full",
        "Two machines do not share",
    ]


def test_index_lists_every_page() -> None:
    """No page of the documentation is out of reach."""
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = [page.name for page in PAGES[1:]]
    assert not [name for name in pages if name != "index.md" and f"({name})" not in index]
    assert not [name for name in pages if f": {name}\n" not in site]


def test_the_gallery_has_every_notebook() -> None:
    """Each notebook is in the navigation, and the plugin that makes pages of notebooks takes it."""
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    (plugin,) = [one for one in yaml.safe_load(site)["plugins"] if "mkdocs-jupyter" in one]
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert len(notebooks) == 3
    for notebook in notebooks:
        assert f": gallery/{notebook.name}\n" in site
        # It looks at where a file lies, not at where the site has it.
        patterns = plugin["mkdocs-jupyter"]["include"]
        assert any(PurePath(notebook).match(pattern) for pattern in patterns)


def test_the_reference_has_every_public_name() -> None:
    """Each name of `dir(memo)` has its docstring on the site."""
    text = (ROOT / "docs" / "reference.md").read_text("utf-8")
    assert set(re.findall(r"^::: memo\.(\w+)$", text, re.MULTILINE)) - {"testing"} == set(dir(memo))
