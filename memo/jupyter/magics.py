"""Magics: what `%load_ext memo` adds to IPython, in a terminal and in a notebook.

======================= ==========================================================================
`%cache_stats`          what the cache did, per function
`%cache_clear`          invalidate entries, and say which
`%cache_explain f(x)`   would this call hit, and if not why
`%cache_ls`             the entries on this host's disk
`%cache_graph`          the cached calls of this kernel and what they were built on
`%cache_report on`      one line under each cell that used the cache
`%%cache`               memoize a cell
======================= ==========================================================================

Each has its help under `?` and completes names of functions.  Unloading takes all of it away again.
"""

# mypy: allow-untyped-calls, allow-untyped-decorators
# (IPython's own functions have no annotations.)

from __future__ import annotations

import ast
import inspect
import re
import weakref
from argparse import ArgumentTypeError
from collections import deque
from collections.abc import Iterator
from contextvars import Context
from typing import TYPE_CHECKING, Any

from IPython.core.completer import SimpleCompletion, context_matcher
from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments
from IPython.display import display

from memo import errors
from memo.decorators import assembly, names
from memo.decorators.cached_function import CachedFunction, functions
from memo.decorators.invalidators import invalidate
from memo.engine import used_calls
from memo.engine.invalidating import Invalidation
from memo.errors import MemoError, OptionError, label
from memo.inspection import call_graph, inventory
from memo.inspection.gathered_stats import stats
from memo.inspection.report_line import explain_misses
from memo.jupyter.cell_cache import Cell
from memo.jupyter.progress_view import WATCHER, Line
from memo.metrics import formatting, recorder, rendering
from memo.metrics.recorder import Span, open_span, reset
from memo.metrics.snapshots import Stats, matches
from memo.runtime.blocking import BLOCKING, drive

if TYPE_CHECKING:
    from IPython.core.interactiveshell import ExecutionResult, InteractiveShell
    from IPython.display import DisplayHandle

MAX_OPEN_REPORTS = 16
"""Maximum number of reports that wait for background refreshes; beyond it the oldest one stops."""


class _Text(str):
    """A text that is displayed as itself when it is the last expression of a cell."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _display_html(text: str, html: str) -> None:
    display({"text/plain": text, "text/html": html}, raw=True)


def _display_text(text: str) -> None:
    _display_html(text, formatting.lines_html(text))


def _parse_limit(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError("must be a number; 0: all")
    return int(text)


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


@magics_class
class CacheMagics(Magics):
    """The magics of memo."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self.scope: dict[str, Any] = shell.user_ns
        self.reporter = Reporter(shell)
        self.cells: dict[str, Cell] = {}

    @magic_arguments()
    @argument("patterns", nargs="*", help="functions to show: load, etl:load, etl, lo*; none: all")
    @argument("--all", action="store_true", help="sum over every kernel that shares the cache")
    @argument("--plot", action="store_true", help="draw hits, stale hits and misses over time")
    @argument("--json", action="store_true", help="give the numbers as JSON text")
    @argument("--frame", action="store_true", help="give a DataFrame: df = %%cache_stats --frame")
    @argument(
        "--limit",
        type=_parse_limit,
        default=rendering.FUNCTIONS_SHOWN,
        help="maximum number of functions to show; 0: all",
    )
    @argument("--reset", action="store_true", help="start the counters of this kernel at zero")
    @line_magic
    def cache_stats(self, line: str) -> Any:
        """Show what the cache did: hits by tier, misses by reason, time saved, per function."""
        given = _parse_arguments(self.cache_stats, line)
        found = stats(shared=given.all)
        if given.reset:
            reset()
        chosen = _select_functions(found, given.patterns)
        if given.frame:
            return chosen.to_frame()
        if given.json:
            return _Text(chosen.to_json())
        if given.reset and not given.plot:
            return _display_text("The counters of this kernel start at zero.")
        chosen = chosen.with_health(_health(chosen))
        limit, more = given.limit, "--limit 0"
        text = rendering.text(chosen, given.plot, limit=limit, more=more)
        return _display_html(text, rendering.html(chosen, given.plot, limit, more))

    @magic_arguments()
    @argument("pattern", nargs="?", help="functions: load, etl:load, lo*")
    @argument("--all", action="store_true", help="every function of this kernel")
    @argument("--where", action="append", default=[], metavar="NAME=VALUE",
              help="only entries with this argument; may be given more than once")  # fmt: skip
    @argument("--tag", help="entries with this tag, of any function")
    @line_magic
    def cache_clear(self, line: str) -> None:
        """Invalidate entries, in every kernel that shares the cache, and say which."""
        given = _parse_arguments(self.cache_clear, line)
        if given.tag and (given.where or given.pattern or given.all):
            raise UsageError("--tag cannot be combined: it selects entries of any function.")
        if given.all and given.pattern:
            raise UsageError("Give a pattern or --all, not both.")
        is_bare = not (given.tag or given.pattern or given.all or given.where)
        if is_bare and not self._is_sure():
            return
        try:
            done = _clear(given.pattern or "*", dict(map(_parse_pair, given.where)), given.tag)
        except MemoError as error:
            raise UsageError(str(error)) from None
        _display_text("\n".join(done))

    def _is_sure(self) -> bool:
        """Ask whether a bare `%cache_clear` should clear every function of the kernel.

        Raises:
            UsageError: this kernel cannot ask.
        """
        names = list(dict.fromkeys(label(f.function_id) for f in functions()))
        what = formatting.quantity(len(names), "function")
        question = f"This invalidates every entry of {what}: {', '.join(names)}."
        kernel = getattr(self.shell, "kernel", None)
        if not getattr(kernel, "_allow_stdin", True):
            raise UsageError(f"{question} Write %cache_clear --all if you mean that.")
        try:
            answer = input(f"{question} Go on? [y/N] ")
        except (EOFError, RuntimeError):
            raise UsageError(f"{question} Write %cache_clear --all if you mean that.") from None
        if answer.strip().lower() in ("y", "yes"):
            return True
        _display_text("Nothing was invalidated.")
        return False

    @no_var_expand  # `{x}` in the call is a set
    @line_magic
    def cache_explain(self, line: str) -> None:
        """Would this call be answered from the cache, and if not why?  Computes nothing.

        ::

            %cache_explain load("EU", year=2024)
        """
        display(self._explanation(line))

    def _explanation(self, line: str) -> Any:
        call = _parse_call(line)
        try:
            target = _evaluate(call.func, self.scope)
        except (NameError, AttributeError) as error:
            raise UsageError(f"{error}.") from None
        if not hasattr(target, "explain"):
            raise UsageError(f"{ast.unparse(call.func)} is not a cached function.")
        call.func = ast.Attribute(call.func, "explain", ast.Load())
        try:
            return _evaluate(call, self.scope)
        except MemoError as error:
            raise UsageError(str(error)) from None
        except Exception as error:  # of the call's arguments, which may be any expressions
            raise UsageError(errors.described(error)) from None

    @magic_arguments()
    @argument("patterns", nargs="*", help="functions: load, etl:load, lo*; none: all")
    @argument("--where", action="append", default=[], metavar="NAME=VALUE",
              help="only entries with this argument; may be given more than once")  # fmt: skip
    @argument("--tag", help="only entries with this tag")
    @argument("--tier", help="only entries that this tier holds: memory, disk, redis")
    @argument("--by", choices=sorted(inventory.ORDERS), default="newest", help="sort order")
    @argument("--limit", type=_parse_limit, default=50, help="most entries to show; 0: all")
    @argument("--frame", action="store_true", help="give a DataFrame: df = %%cache_ls --frame")
    @line_magic
    def cache_ls(self, line: str) -> Any:
        """List the entries on this host, without loading any value.

        Its state says what the next call would find.  One that was invalidated is listed until it
        is computed again or evicted; it is never used.
        """
        given = _parse_arguments(self.cache_ls, line)
        where = dict(map(_parse_pair, given.where))
        wanted = inventory.Selection(given.patterns, where, given.tag, given.tier, given.by)
        try:
            shown, count = inventory.items(wanted, given.limit or None)
        except MemoError as error:
            raise UsageError(str(error)) from None
        table = inventory.table(shown)
        if given.frame:
            return _frame(table)
        if not count:
            _check_where(given.patterns, where)
            return _display_text(_not_found_text(given.patterns))
        footer = formatting.shown_part(len(shown), count, "entry", "entries", "--limit 0")
        text = f"{formatting.table_text(table)}\n\n{footer}"
        return _display_html(
            text, formatting.with_style(f"{formatting.table_html(table)}<p>{footer}</p>")
        )

    @magic_arguments()
    @argument("--group", action="store_true", help="one node for each function")
    @argument("--everything", action="store_true", help="all that is stored on this host")
    @line_magic
    def cache_graph(self, line: str) -> None:
        """Draw the cached calls of this kernel and what they were built on."""
        given = _parse_arguments(self.cache_graph, line)
        display(call_graph.graph_of(everything=given.everything, group=given.group or None))

    @magic_arguments()
    @argument("state", nargs="?", choices=("on", "off"), help="on or off; none: show the setting")
    @line_magic
    def cache_report(self, line: str) -> None:
        """Show one line under each cell that used the cache, and keep it up to date."""
        state = _parse_arguments(self.cache_report, line).state
        if state:
            self.reporter.switch(on=state == "on")
        _display_text(f"Cache reports are {'on' if self.reporter.on else 'off'}.")

    @magic_arguments()
    @argument(
        "--ttl", help="how long the result is replayed: seconds, 90s, 1h30m; default: no expiry"
    )
    @argument(
        "--tags", type=_parse_names, default=(), metavar="A,B", help="tag to invalidate it by"
    )
    @argument("--inputs", type=_parse_names, metavar="A,B",
              help="the names that count; default: those that the cell reads")  # fmt: skip
    @argument("--outputs", type=_parse_names, metavar="A,B",
              help="the names to keep; default: those that it assigns or changes")  # fmt: skip
    @argument("--name", help="its name in statistics; default: made from what it assigns")
    @argument("--force", action="store_true", help="run it now, and store what it does")
    @argument("--explain", action="store_true", help="tell whether it would run, and why")
    @cell_magic
    def cache(self, line: str, cell: str) -> Any:
        """Run a cell once, and from then on replay what it assigned and showed.

        It runs again when its code changes, or the value of a name that it reads, or the code of a
        function that it calls.  Comments and layout do not matter.  An exception is shown, and
        nothing is stored.  Top-level `await` works.
        """
        __tracebackhide__ = True
        made, given = self._make_cell(line, cell)
        if given.explain:
            return display(made.explain())
        return made.answer(force=given.force)

    async def cache_awaited(self, line: str, cell: str) -> Any:
        """Run `%%cache` over a cell with top-level `await`."""
        __tracebackhide__ = True
        made, given = self._make_cell(line, cell)
        if given.explain:
            return display(made.explain())
        return await made.answer_async(force=given.force)

    def _make_cell(self, line: str, cell: str) -> tuple[Cell, Any]:
        shell: Any = self.shell
        given = _parse_arguments(self.cache, line)
        source = shell.transform_cell(cell)
        file = shell.compile.cache(source, shell.displayhook.prompt_count, raw_code=cell)
        try:
            made = Cell(
                shell,
                source,
                file,
                given.inputs,
                given.outputs,
                name=given.name,
                ttl=_parse_ttl(given.ttl),
                tags=given.tags,
            )
        except MemoError as error:
            raise UsageError(f"%%cache: {error}") from None
        self.cells[made.function.function_id] = made
        return made, given


def _parse_arguments(magic: Any, line: str) -> Any:
    """Parse the arguments of a magic.

    Raises:
        UsageError: one is wrong; for an unknown flag the message names the nearest known one.
    """
    words = _split(line)
    try:
        return magic.parser.parse_args(words)
    except UsageError as error:
        flags = _MAGIC_OPTIONS.get(magic.__name__, ())
        wrong = next((w for w in words if w.startswith("-") and w not in flags), "")
        if "unrecognized" not in str(error) or not wrong:
            raise
        known = f" Flags: {', '.join(flags)}." if flags else ""
        sign = "%%" if magic.__name__ == "cache" else "%"  # the one cell magic
        message = (
            f"{sign}{magic.__name__} has no {wrong}{errors.nearest_hint(wrong, flags)}.{known}"
        )
        raise UsageError(message.replace("?.", "?")) from None


_WORD_PATTERN = r"""(?:"[^"]*"|'[^']*'|[^\s"'])+"""
_QUOTED_PATTERN = r"""(--[\w-]+=|)(["'])(.*)\2"""


def _split(line: str) -> list[str]:
    """Split the line of a magic into words, without the quotes around a word or a flag's value.

    Quotes inside a word stay: in `region="New York"` they are part of the value.

    Raises:
        UsageError: a quotation mark is not closed.
    """
    if re.sub(_WORD_PATTERN, "", line).strip():
        raise UsageError(f"A quotation mark is not closed: {line}")
    words = re.findall(_WORD_PATTERN, line)
    quoted = (re.fullmatch(_QUOTED_PATTERN, word) for word in words)
    return [f"{q[1]}{q[3]}" if q else word for word, q in zip(words, quoted, strict=True)]


def _not_found_text(patterns: list[str]) -> str:
    """Say that there are no entries, and which functions were probably intended."""
    here = [function.function_id for function in functions()]
    known = drive(names.known_functions(BLOCKING, here)) if patterns else []
    near = names.did_you_mean_functions(names.without_match(patterns, known), known)
    return f"No entries on this host{f'; {near}' if near else '.'}"


def _check_where(patterns: list[str], where: dict[str, Any]) -> None:
    """Check that a function of this kernel has the arguments that entries were selected by.

    Raises:
        UsageError: none of those that match the patterns has them.
    """
    refused: OptionError | None = None
    for function in functions() if where else ():
        if matches(function.function_id, *patterns):
            try:
                function._function.keyer.check_names("--where", where)
                return
            except OptionError as error:
                refused = error
    if refused is not None:
        raise UsageError(str(refused))


# --- %cache_stats -------------------------------------------------------------------------------


def _select_functions(found: Stats, patterns: list[str]) -> Stats:
    chosen = found.select(*patterns)
    if patterns and found.functions and not chosen.functions:
        there = ", ".join(map(label, found.functions))
        near = names.did_you_mean_functions(patterns, found.functions)
        message = f"No cached function matches {' '.join(patterns)}{f'; {near}' if near else '.'}"
        raise UsageError(f"{message} There are: {there}")
    return chosen


def _health(found: Stats) -> dict[str, dict[str, Any]]:
    """Return facts that the tiers report; none before the first call."""
    if not found.functions:
        return {}
    try:
        return drive(assembly.default_chain().health(BLOCKING))
    except MemoError as error:
        return {"settings": {"up": False, "error": str(error)}}


# --- %cache_clear -------------------------------------------------------------------------------


def _parse_pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--where {text}: write for instance --where region=EU")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _clear(pattern: str, where: dict[str, Any], tag: str | None) -> list[str]:
    """Invalidate entries, and return lines that say what matched."""
    reason = "%cache_clear"
    if tag:
        return [*_outcome_text(invalidate(tag=tag, reason=reason))]
    here = {function.function_id: function for function in functions()}
    if pattern == "*":
        found = list(here)
    else:
        found = drive(names.functions_matching(BLOCKING, "function", pattern, list(here)))
    done: list[Invalidation] = []
    refused: OptionError | None = None
    for identity in found:
        try:
            done.append(_clear_one(here.get(identity), identity, where, reason))
        except OptionError as error:  # a function without this argument has no such entries
            refused = error
    if refused and not done:
        raise refused
    return [line for outcome in done for line in _outcome_text(outcome)]


def _clear_one(
    function: CachedFunction[..., Any] | None, identity: str, where: dict[str, Any], reason: str
) -> Invalidation:
    if function is not None:  # its helper would take `reason` as an argument of this name
        return drive(function._invalidation((), where, reason)(BLOCKING))
    if where:
        fix = "selects entries of a function that is defined in this kernel."
        raise OptionError("--where", label(identity), fix)
    return invalidate(function=identity, reason=reason)


def _outcome_text(done: Invalidation) -> Iterator[str]:
    """Describe the entries that an invalidation matched, with some of the calls."""
    yield repr(done)
    if done.first:
        more = ", …" * (done.matched > len(done.first) or done.at_least)
        yield f"  {', '.join(map(rendering.call_text, done.first))}{more}"


# --- %cache_explain -----------------------------------------------------------------------------


def _parse_call(line: str) -> ast.Call:
    try:
        node = ast.parse(line.strip().removeprefix("await "), mode="eval").body
    except SyntaxError:
        node = ast.Constant(None)
    if not isinstance(node, ast.Call):
        raise UsageError('Write a call, for instance: %cache_explain load("EU")')
    return node


def _evaluate(node: ast.expr, scope: dict[str, Any]) -> Any:
    tree = ast.fix_missing_locations(ast.Expression(node))
    code = compile(tree, "<cache_explain>", "eval", dont_inherit=True)
    return eval(code, scope)  # noqa: S307 - the user's own line, in the user's own kernel


# --- %cache_ls ----------------------------------------------------------------------------------


def _frame(table: formatting.Table) -> Any:
    import pandas as pd

    rows = [[None if c.text == formatting.DASH else c.value for c in row] for row in table.rows]
    units = {"age": "age_seconds", "expires in": "expires_in_seconds", "cost": "cost_seconds"}
    return pd.DataFrame(rows, columns=[units.get(title, title) for title in table.titles])


# --- %cache_report ------------------------------------------------------------------------------


class Reporter:
    """Prints a line under each cell that used the cache, and keeps it up to date.

    It does not slow hits down: see `memo.metrics.recorder.Span`.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self.on = False
        kernel = getattr(shell, "kernel", None)
        self.screen = None if kernel is None else NotebookScreen(kernel)
        self._live = getattr(shell, "kernel", None) is not None  # a terminal takes no updates
        self._span: Span | None = None
        self._open: deque[tuple[Span, DisplayHandle]] = deque()

    def switch(self, *, on: bool) -> None:
        """Turn reports on, from the next cell, or off."""
        self.on = on
        if not on:
            self.close()

    def begin(self, *_: Any) -> None:
        """Start the report of a cell."""
        WATCHER.begin_cell()
        if self._span is not None:
            self._span.close()
        self._span = open_span(self._changed) if self.on else None

    def end(self, result: ExecutionResult | None = None) -> None:
        """End the report of a cell, which may have failed, and publish the statistics."""
        recorder.publish()
        WATCHER.end_cell()
        span, self._span = self._span, None
        if span is None:
            return
        span.end()
        if not span.used:
            span.close()
            return
        explain_misses(span)
        handle = self.screen.release_display() if self.screen else None
        if handle is None:
            handle = display(_bundle(span), raw=True, display_id=True)
        else:  # the lines of progress become the report
            handle.update(_bundle(span), raw=True)
        if span.is_complete or not self._live or handle is None:
            span.close()
        else:
            self._keep(span, handle)

    def _keep(self, span: Span, handle: DisplayHandle) -> None:
        self._open.append((span, handle))
        while len(self._open) > MAX_OPEN_REPORTS:
            self._open.popleft()[0].close()

    def _changed(self, span: Span) -> None:
        for known, handle in tuple(self._open):
            if known is span:
                # Without this thread's or task's context the message belongs to the cell that runs
                # now; otherwise clients that execute cell by cell would treat it as late.
                Context().run(handle.update, _bundle(span), raw=True)
                if span.is_complete:
                    self._open.remove((known, handle))

    def close(self) -> None:
        """Stop following refreshes."""
        if self._span is not None:
            self._span.close()
            self._span = None
        while self._open:
            self._open.popleft()[0].close()


def _bundle(span: Span) -> dict[str, str]:
    line = rendering.report(span)
    return {"text/plain": line, "text/html": rendering.report_html(line)}


# --- %%cache ------------------------------------------------------------------------------------


def _parse_ttl(text: str | None) -> Any:
    """Parse a ttl: a number of seconds, a text with units, or `none` for no expiry."""
    if text is None or text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _transform_awaits(lines: list[str]) -> list[str]:
    """Turn a `%%cache` cell with top-level `await` into an `await` itself (an input transformer).

    Raises:
        SyntaxError: the cell is not valid Python; IPython shows it as for any other cell.
    """
    first, _, rest = "".join(lines).partition("\n")
    name, _, options = first.partition(" ")
    shell: Any = _shell_with_magics()
    if name.rstrip() != "%%cache" or shell is None or not _awaits(shell, rest):
        return lines
    magics = "get_ipython().magics_manager.registry['CacheMagics']"
    return [f"await {magics}.cache_awaited({options.strip()!r}, {rest!r})\n"]


def _shell_with_magics() -> InteractiveShell | None:
    return next(iter(_loaded), None)


_transform_awaits.has_side_effects = True  # type: ignore[attr-defined]
"""IPython does not run it on a cell that is still being typed, so it may raise errors."""


def _awaits(shell: Any, cell: str) -> bool:
    source = f"\n{shell.transform_cell(cell)}"  # line numbers count from the line of the magic
    file = shell.compile.cache(source, shell.execution_count, raw_code=source)
    code = compile(source, file, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    return bool(code.co_flags & inspect.CO_COROUTINE)


# --- Progress -----------------------------------------------------------------------------------


class NotebookScreen:
    """A screen in the output of the running cell; its last lines stay, or become the report."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._handle: DisplayHandle | None = None
        self._last: DisplayHandle | None = None

    def open(self) -> bool:
        """True if there is a viewer, on a page that can replace its output.

        A notebook that runs unattended has no viewer; a terminal (`jupyter console`) has no cells,
        and would keep every line.
        """
        parent = self._kernel.get_parent() if hasattr(self._kernel, "get_parent") else {}
        has_cells = "cellId" in (parent or {}).get("metadata", {})
        return has_cells and bool(getattr(self._kernel, "_allow_stdin", True))

    def show(self, lines: list[Line]) -> None:
        """Replace the lines by these."""
        bundle = {
            "text/plain": "\n".join(map(str, lines)),
            "text/html": rendering.progress_html(
                [(str(line).strip(), line.share, line.depth) for line in lines]
            ),
        }
        # Without this thread's context the message belongs to the cell that runs now.
        if self._handle is None:
            self._handle = Context().run(display, bundle, raw=True, display_id=True)
        else:
            Context().run(self._handle.update, bundle, raw=True)

    def close(self, lines: list[Line]) -> None:
        """Leave these lines in the output; the next cell starts with none."""
        self._last, self._handle = self._handle, None
        if self._last is not None:
            text = "\n".join(map(str, lines))
            bundle = {"text/plain": text, "text/html": rendering.report_html(text)}
            Context().run(self._last.update, bundle, raw=True)

    def release_display(self) -> DisplayHandle | None:
        """Return the display of the cell's last lines, for the report; None if there were none."""
        last, self._last = self._last, None
        return last


# --- Loading and unloading -----------------------------------------------------------------------

MAGIC_NAMES = (
    *("cache_stats", "cache_clear", "cache_explain", "cache_ls", "cache_graph"),
    "cache_report",
)
_MAGIC_OPTIONS = {
    "cache_stats": ("--all", "--plot", "--json", "--frame", "--limit", "--reset"),
    "cache_clear": ("--all", "--where", "--tag"),
    "cache_ls": ("--where", "--tag", "--tier", "--by", "--limit", "--frame"),
    "cache_graph": ("--group", "--everything"),
    "cache_report": ("on", "off"),
    "cache": ("--ttl", "--tags", "--inputs", "--outputs", "--name", "--force", "--explain"),
}
_loaded: weakref.WeakKeyDictionary[InteractiveShell, CacheMagics] = weakref.WeakKeyDictionary()


def load(shell: InteractiveShell) -> None:
    """Add the magics to a shell; a second call does nothing."""
    if shell in _loaded:
        return
    magics = _loaded[shell] = CacheMagics(shell)
    shell.register_magics(magics)
    shell.events.register("pre_run_cell", magics.reporter.begin)
    shell.events.register("post_run_cell", magics.reporter.end)
    shell.input_transformers_cleanup.append(_transform_awaits)
    WATCHER.show_on(magics.reporter.screen)
    WATCHER.switch(on=True)
    shell.Completer.custom_matchers.append(_matcher)


def unload(shell: InteractiveShell) -> None:
    """Remove them again, with every callback."""
    magics = _loaded.pop(shell, None)
    if magics is None:
        return
    magics.reporter.switch(on=False)
    WATCHER.switch(on=False)
    WATCHER.show_on(None)
    if not _loaded:
        used_calls.stop_following_threads()
    shell.events.unregister("pre_run_cell", magics.reporter.begin)
    shell.events.unregister("post_run_cell", magics.reporter.end)
    manager: Any = shell.magics_manager
    for name in MAGIC_NAMES:
        manager.magics["line"].pop(name, None)
    manager.magics["cell"].pop("cache", None)
    shell.input_transformers_cleanup.remove(_transform_awaits)
    manager.registry.pop(type(magics).__name__, None)
    configurables: list[Any] = shell.configurables
    if magics in configurables:
        configurables.remove(magics)
    shell.Completer.custom_matchers.remove(_matcher)


def _matcher_key() -> Iterator[str]:
    for name in MAGIC_NAMES:
        yield from (name, f"%{name}")
    yield "%%cache"


@context_matcher(priority=1000, identifier="memo")
def _matcher(context: Any) -> Any:
    """Complete flags and names of cached functions, nothing else, in a line with a magic."""
    name, space, rest = context.line_with_cursor[: context.cursor_position].partition(" ")
    if not space or name not in _matcher_key():
        return {"completions": []}
    name, word = name.lstrip("%"), _last_word(rest)
    if name == "cache_explain":  # a call: Python completes what is in its parentheses
        labels = [] if "(" in rest else [label(f.function_id) for f in functions()]
        names = [one.rpartition(":")[2] for one in labels]
    elif word.startswith("-") or name in ("cache_report", "cache"):
        names = list(_MAGIC_OPTIONS[name])
    else:
        names = list(map(_typeable_name, functions()))
    begun = word.lstrip("\"'")
    found = [one for one in dict.fromkeys(names) if one.lstrip('"').startswith(begun)]
    if not found and word and name != "cache_explain":
        found = [word]  # without any match IPython would offer its own magics
    return {
        "completions": [SimpleCompletion(one, type="magic") for one in found],
        "matched_fragment": word,
        "suppress": bool(found),
    }


def _last_word(text: str) -> str:
    """Return the word at the end of an unfinished line, with its opening quotation mark."""
    words = list(re.finditer(rf"{_WORD_PATTERN}|[\"'].*", text))
    return words[-1][0] if words and words[-1].end() == len(text) else ""


def _typeable_name(function: CachedFunction[Any, Any]) -> str:
    name = label(function.function_id)
    return f'"{name}"' if " " in name else name
