"""`memo demo`: a typical pipeline on real data, with the times of this very run.

The data: the Python packages that are installed here, read and parsed file by file.  The pipeline:
`definitions` (one package), `survey` (all of them, one DataFrame), `report` (a table by package).
Each is cached, and built on the one before.  It needs neither a network nor a Redis, uses only the
public interface, and leaves nothing behind on the disk.
"""

from __future__ import annotations

import ast
import asyncio
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import memo
from memo import cache
from memo.metrics import rendering
from memo.metrics.formatting import duration

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

FULL_BYTES = 8_000_000
"""Bytes of source in a full demo: parsing takes about 0.5 s per megabyte on a machine of 2022."""
QUICK_BYTES = 3_000_000
"""Bytes of source with `--quick`."""
PACKAGE = "workspace"
"""The package that the demo changes: a copy of one from the standard library."""
ORIGINAL = "email"
BRANCHES = (ast.If, ast.For, ast.While, ast.Try, ast.BoolOp, ast.comprehension, ast.IfExp)
DEFINITION_KINDS = {
    ast.FunctionDef: "function",
    ast.AsyncFunctionDef: "async function",
    ast.ClassDef: "class",
}

# --- the pipeline: what a user writes ------------------------------------------------------------


@cache(ttl="1h", cutoff=True)
async def definitions(folder: Path) -> pd.DataFrame:
    """Every function and class of one package: a row each, from parsing all of its files."""
    return await asyncio.to_thread(parse_package, folder)


@cache(ttl="1h")
async def survey(folders: tuple[Path, ...]) -> pd.DataFrame:
    """The definitions of all packages, one below the other."""
    import pandas as pd

    parts = [await definitions(folder) for folder in folders]
    return pd.concat(parts, ignore_index=True)


@cache(ttl="1h")
async def report(folders: tuple[Path, ...]) -> pd.DataFrame:
    """One line per package: how much is in it, how well it is documented, how branched it is."""
    table = (await survey(folders)).assign(classes=lambda rows: rows["kind"] == "class")
    by_package = table.groupby("package", sort=True)
    summary = by_package.agg(
        modules=("module", "nunique"),
        definitions=("name", "size"),
        classes=("classes", "sum"),
        lines=("lines", "sum"),
        documented=("documented", "mean"),
        branches=("branches", "mean"),
    )
    return summary.sort_values("definitions", ascending=False)


def parse_package(folder: Path) -> pd.DataFrame:
    """Read and parse every `.py` file below a directory."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about escape sequences in the parsed code
        for path in sorted(folder.rglob("*.py")):
            rows.extend(parse_file(path, folder))
    columns = ["package", "module", "kind", "name", "line", "lines", "branches", "documented"]
    return pd.DataFrame(rows, columns=columns)


def parse_file(path: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the definitions of one file; none if it is not valid Python of this version."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    module = ".".join(path.relative_to(folder.parent).with_suffix("").parts)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield {
                "package": folder.name,
                "module": module,
                "kind": DEFINITION_KINDS[type(node)],
                "name": node.name,
                "line": node.lineno,
                "lines": (node.end_lineno or node.lineno) - node.lineno + 1,
                "branches": sum(isinstance(part, BRANCHES) for part in ast.walk(node)),
                "documented": ast.get_docstring(node, clean=False) is not None,
            }


# --- the data ------------------------------------------------------------------------------------


def find_packages(limit: int) -> tuple[list[Path], int, int]:
    """Return package directories of at most `limit` bytes in all, their files and bytes."""
    chosen: list[Path] = []
    files = size = 0
    for folder in _candidates():
        sizes = [path.stat().st_size for path in folder.rglob("*.py")]
        if sizes and size + sum(sizes) <= limit:
            chosen.append(folder)
            files, size = files + len(sizes), size + sum(sizes)
    return chosen, files, size


def _candidates() -> Iterable[Path]:
    """Yield directories of the standard library and of every installed distribution, by name."""
    library = Path(sysconfig.get_path("stdlib"))
    found = {path.parent for path in library.glob("*/__init__.py") if path.parent.name != "test"}
    for distribution in metadata.distributions():
        for file in distribution.files or ():
            if len(file.parts) > 1 and file.name == "__init__.py" and file.parts[0] != "..":
                found.add(Path(str(distribution.locate_file(file.parts[0]))))
    return sorted(found, key=lambda path: (path.name.lower(), str(path)))


def copy_package(directory: Path) -> Path:
    """Copy a package, for the demo to change."""
    library = Path(sysconfig.get_path("stdlib"))
    folder = directory / PACKAGE
    shutil.copytree(library / ORIGINAL, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def change_package(folder: Path) -> None:
    """Make a real change: one new function in one file."""
    with (folder / "__init__.py").open("a", encoding="utf-8") as file:
        file.write('\n\ndef added_by_the_demo():\n    """New."""\n    return 42\n')


# --- running and measuring -----------------------------------------------------------------------


@dataclass
class Run:
    """The measurements of one run of the pipeline.

    Attributes:
        seconds: from the call to the answer.
        computed: how often each function really ran.
        tiers: the tiers from which answers came.
        revalidated: number of results that were kept because their inputs came back equal.
        rows: definitions in the survey.
        check: digest of the whole report: equal digests, equal reports.
    """

    seconds: float = 0.0
    computed: Counter[str] = field(default_factory=Counter)
    tiers: Counter[str] = field(default_factory=Counter)
    revalidated: int = 0
    rows: int = 0
    check: str = ""

    def handle(self, event: memo.Event) -> None:
        """Count an event of the cache."""
        if event.kind == "computed":
            self.computed[event.function.rpartition(":")[2]] += 1
        elif event.kind == "revalidated":
            self.revalidated += 1
        elif event.kind in ("hit", "stale"):
            self.tiers[event.tier] += 1


def measure(folders: tuple[Path, ...], heard: Callable[[memo.Event], None] | None = None) -> Run:
    """Run the pipeline once, and count what it does."""
    run = Run()
    hooks = [memo.on_event(hook) for hook in (run.handle, heard) if hook]
    try:
        begin = time.perf_counter()
        table = asyncio.run(_pipeline(folders))
        run.seconds = time.perf_counter() - begin
    finally:
        for remove in hooks:
            remove()
    run.rows = int(table["definitions"].sum())
    run.check = digest(table)
    return run


async def _pipeline(folders: tuple[Path, ...]) -> pd.DataFrame:
    return await report(folders)


def digest(table: pd.DataFrame) -> str:
    """Return a digest over every cell and label of a table."""
    import hashlib

    return hashlib.sha256(table.to_csv().encode()).hexdigest()


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run some code of this module in a fresh interpreter, with this one's memo."""
    root = str(Path(memo.__file__).parents[1])
    environment = dict(options.pop("env", os.environ))
    found = (root, environment.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, found))
    command = [sys.executable, "-c", f"from memo.cli import demo; {code}"]
    return subprocess.run(  # noqa: S603 - this interpreter, and words of this module
        command, check=False, text=True, env=environment, **options
    )


def measure_elsewhere(folders: tuple[Path, ...]) -> tuple[Run, float]:
    """Do the same run in a fresh process; also return the seconds from its start to its end."""
    begin = time.perf_counter()
    given = json.dumps([str(folder) for folder in folders])
    done = python("demo.answer()", input=given, stdout=subprocess.PIPE)
    if done.returncode:
        raise RuntimeError("the fresh process failed")
    facts = json.loads(done.stdout.splitlines()[-1])
    run = Run(**{**facts, "computed": Counter(facts["computed"]), "tiers": Counter(facts["tiers"])})
    return run, time.perf_counter() - begin


def answer() -> None:
    """Run in the fresh process: the pipeline for the packages on standard input."""
    import pandas as pd  # noqa: F401 - as in a notebook, which has it long before

    folders = tuple(Path(text) for text in json.load(sys.stdin))
    print(json.dumps(vars(measure(folders))))  # noqa: T201 - the answer


# --- what is shown -------------------------------------------------------------------------------


BAR_WIDTH = 30
"""Maximum length of a bar in characters."""


class DemoOutput:
    """Prints what happens, to a terminal or a log, and keeps the first run for comparison."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.first = Run()

    def say(self, text: str = "", style: str = "") -> None:
        """Print one line."""
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def tell(self, number: int, title: str, run: Run, note: str = "") -> None:
        """Print one run: its time, compared with the first, and what really ran."""
        times = f"{self.first.seconds / run.seconds:,.0f} x faster" if number > 1 else ""
        head = f"{number}  {title:<19}{duration(run.seconds):>9}  {times:<15}"
        self.say(f"{head}{note}".rstrip(), "green" if number > 1 else "")

    def chart(self, runs: dict[str, Run]) -> None:
        """Print the time of each run as a bar on a logarithmic scale."""
        shortest = min(run.seconds for run in runs.values())
        whole = math.log10(max(run.seconds for run in runs.values()) / shortest) + 1
        self.say("Time of each run (logarithmic: each step of the scale is ten times)", "bold")
        for title, run in runs.items():
            share = (math.log10(run.seconds / shortest) + 1) / whole
            bar = "█" * max(1, round(share * BAR_WIDTH))
            style = "green" if run is not self.first else "yellow"
            self.say(f"   {title:<19}{bar:<{BAR_WIDTH}} {duration(run.seconds):>9}", style)

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[memo.Event], None]]:
        """Return a hook that shows how many packages have been parsed.

        A bar, or occasional lines.
        """
        if self._console.is_terminal:
            with self._bar(total) as hook:
                yield hook
        else:
            yield self._lines(total)

    @contextmanager
    def _bar(self, total: int) -> Iterator[Callable[[memo.Event], None]]:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        bar = BarColumn(complete_style="cyan", finished_style="cyan")  # by default they are red
        columns = (TextColumn("{task.description}"), bar, TaskProgressColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task("   parsing", total=total)
            yield lambda event: progress.advance(task, _is_package(event))

    def _lines(self, total: int) -> Callable[[memo.Event], None]:
        done, shown_at = 0, time.monotonic()

        def hook(event: memo.Event) -> None:
            nonlocal done, shown_at
            done += _is_package(event)
            if _is_package(event) and time.monotonic() - shown_at >= 1:
                shown_at = time.monotonic()
                self.say(f"   parsed {done} of {total} packages")

        return hook


def _is_package(event: memo.Event) -> bool:
    return event.kind == "computed" and event.function.endswith(":definitions")


def _source_text(run: Run) -> str:
    from_tiers = " and ".join(sorted(name for name in run.tiers if name))
    ran = sum(run.computed.values())
    return f"nothing ran, from {from_tiers}" if from_tiers and not ran else f"{ran} functions ran"


# --- the demo ------------------------------------------------------------------------------------


def main(redis: str | None = None, *, quick: bool = False) -> bool:
    """Run the demo in a separate process; return True if all its checks passed.

    Args:
        redis: URL of a Redis to put in front of the disk.  Entries of the demo are dropped at the
            end, or expire; a dozen small keys of the namespace `memo-demo` stay.
        quick: use fewer packages.

    Raises:
        SettingError: the URL cannot be used.
    """
    with memo.configure(redis_url=redis):  # a wrong URL is reported here, at once
        kept = {name: text for name, text in os.environ.items() if not name.startswith("MEMO_")}
    with tempfile.TemporaryDirectory(prefix="memo-demo-", ignore_cleanup_errors=True) as directory:
        settings = _settings(Path(directory) / "cache", redis)
        limit = QUICK_BYTES if quick else FULL_BYTES
        return not python(
            f"demo.perform({limit})", env={**kept, **settings}, cwd=directory
        ).returncode


def _settings(directory: Path, redis: str | None) -> dict[str, str]:
    """Return the settings of a demo: a directory, a namespace, and a new secret."""
    settings = {
        "MEMO_DIRECTORY": str(directory),
        "MEMO_SECRET": secrets.token_hex(32),
        "MEMO_NAMESPACE": "memo-demo",
    }
    return {**settings, "MEMO_REDIS_URL": redis} if redis else settings


def perform(limit: int) -> None:
    """Run the demo itself, in the working directory, with the settings of the environment."""
    from rich.console import Console

    try:
        held = _run_demo(DemoOutput(Console()), Path.cwd(), limit)
    finally:
        for function in (definitions, survey, report):
            function.cache_clear()
    sys.exit(0 if held else 1)


def _run_demo(story: DemoOutput, directory: Path, limit: int) -> bool:
    import pandas as pd  # noqa: F401 - not part of what is measured

    packages, files, size = find_packages(limit)
    workspace = copy_package(directory)
    folders = (*packages, workspace)
    total = len(folders)
    chain = "Redis over disk" if "MEMO_REDIS_URL" in os.environ else "disk"
    story.say(f"Reading the source of {total} installed packages: {files:,} files,")
    story.say(f"{size / 1e6:.0f} MB, parsed into one table, and a report on it. Cache: {chain}.")
    story.say()
    with story.progress(total) as hook:
        first = story.first = measure(folders, hook)
    story.tell(1, "first run", first, f"{first.rows:,} definitions parsed")
    again = measure(folders)
    story.tell(2, "again", again, _source_text(again))
    fresh, whole = measure_elsewhere(folders)
    story.tell(3, "in a fresh process", fresh, _source_text(fresh))
    story.say(f"   ({duration(whole)} with the start of Python and its imports)", "dim")
    story.say(f"   ... the files of {PACKAGE!r} are saved again, unchanged:")
    story.say(f"   definitions.invalidate(folder={PACKAGE!r})")
    definitions.invalidate(folder=workspace)
    touched = measure(folders)
    parsed, kept = touched.computed["definitions"], "report kept" if touched.revalidated else ""
    story.tell(4, "after a touch", touched, f"{parsed} package parsed, {kept}")
    change_package(workspace)
    story.say(f"   ... a function is added to the package {PACKAGE!r}:")
    story.say(f"   definitions.invalidate(folder={PACKAGE!r})")
    definitions.invalidate(folder=workspace)
    changed = measure(folders)
    parsed = changed.computed["definitions"]
    story.tell(5, "after the change", changed, f"{parsed} of {total} packages parsed again")
    story.say()
    runs = {"first run": first, "again": again, "in a fresh process": fresh}
    story.chart({**runs, "after a touch": touched, "after the change": changed})
    story.say()
    story.say(rendering.text(memo.stats(), width=80))
    story.say()
    return _verdict(story, [first, again, fresh, touched, changed], total)


def _verdict(story: DemoOutput, runs: list[Run], total: int) -> bool:
    first, again, fresh, touched, changed = runs
    promises = {
        f"the first run parsed all {total} packages": first.computed["definitions"] == total,
        "the second run computed nothing": not again.computed,
        "the fresh process computed nothing": not fresh.computed,
        "both gave the report of the first run": first.check == again.check == fresh.check,
        "after a touch one package was parsed, nothing else ran": touched.computed
        == {"definitions": 1},
        "its definitions were equal, so the report was kept": touched.check == first.check
        and touched.revalidated > 0,
        "after the change one package was parsed again": changed.computed["definitions"] == 1,
        "the report has the change": changed.rows == first.rows + 1,
    }
    for promise, held in promises.items():
        story.say(f"{'✓' if held else '✗'} {promise}", "green" if held else "bold red")
    repeated = again.seconds + fresh.seconds
    story.say()
    story.say(f"The two repeated runs took {duration(repeated)} instead of")
    story.say(f"{duration(2 * first.seconds)}: {duration(2 * first.seconds - repeated)} saved.")
    story.say()
    story.say("Next: put @cache above a slow function of your own, run it twice, then")
    story.say("   memo ls       what is stored      memo graph   what was built on what", "bold")
    story.say("   memo stats    what it saved       memo ui      all of it, live", "bold")
    return all(promises.values())
