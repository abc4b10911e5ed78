"""Cells: the names that a notebook cell reads and assigns, and a cell as a cached function.

`%%cache` turns each cell into a cached function. The normalized cell is its code version, the names
that the cell reads are its arguments, and its result is a `Recording` of the names that it assigned
and of its output.

Rules of this module:

1.  A name is an *input* if the cell may read it before it has assigned it; for functions and
    classes defined in the cell, if the cell does not assign it at all.
2.  If that is uncertain (the body of a loop may not run), the name is not an input, and it is
    *hidden* while the cell runs: reading it is a `NameError`, since its value is not in the key.
3.  An input that the cell changed in place, by any means, is an output as well.
4.  An input without a sound key (a client, a lock) is left out, like a global of a function.
5.  A word of a magic or of a shell line is read, if it is a name; code of `%time` is followed.
6.  A string may name variables, as in functions: `frame.query("x > @limit")` reads `limit`.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import re
import sys
import tokenize
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager

from memo.decorators.cache_decorator import cache
from memo.decorators.cached_function import CachedFunction
from memo.engine import replay as output_replay
from memo.errors import KeyingError, OptionError, cut_to_user_frames
from memo.keys.encoding import canonical
from memo.keys.fingerprint import names_used
from memo.keys.fingerprint.function_version import Identity, function_id
from memo.keys.fingerprint.held_values import IMMUTABLE_BUILTINS
from memo.keys.values import value_digest
from memo.records import codec
from memo.runtime import events
from memo.runtime.events import Event
from memo.runtime.named_tuple import NamedTuple

_MAX_SHOWN_NAMES = 3
"""Number of its outputs after which a cell is named."""
_IMMUTABLE_TYPES = IMMUTABLE_BUILTINS | {types.FunctionType}
_NEW_NAME = object()
_AWAIT_FLAG = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_INVISIBLE_TOKENS = frozenset(
    {
        *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
        *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
    }
)
"""Comments and layout."""


# --- the names that a cell reads and assigns ------------------------------------------------------


class Names(NamedTuple):
    """The names of a cell.

    Attributes:
        reads: names that it may read before it has assigned them, in order.
        assigned: names that it may assign or delete, in order.
        hidden: names that it probably assigns first; they are not inputs.
        imported: those of `assigned` that it imports.
    """

    reads: tuple[str, ...]
    assigned: tuple[str, ...]
    hidden: frozenset[str]
    imported: frozenset[str]


def find_names(tree: ast.Module) -> Names:
    """Find the names that a cell reads and assigns."""
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    flow = _NameFlow(names_used.string_patterns(names))
    flow.block(tree.body)
    flow.end()
    hidden = frozenset(flow.hidden) - set(flow.reads)
    return Names(tuple(flow.reads), tuple(flow.assigned), hidden, frozenset(flow.imported))


class _NameFlow(ast.NodeVisitor):
    """Follows the names of a cell from its top to its bottom.

    Attributes:
        string_patterns: find the names of variables in strings, as in `frame.query("x > @limit")`.
        reads, assigned, hidden, imported: see `Names`.
        assigned_so_far: names that count as assigned at this point of the cell.
        maybe_assigned: those of them that only a body assigns that may not run.
        read_by_nested: names that functions and classes defined in the cell read at any time.
        local_scopes: the names of each comprehension around this point.
    """

    def __init__(self, string_patterns: Sequence[re.Pattern[str]]) -> None:
        self.string_patterns = string_patterns
        self.reads: dict[str, None] = {}
        self.assigned: dict[str, None] = {}
        self.hidden: set[str] = set()
        self.imported: set[str] = set()
        self.assigned_so_far: set[str] = set()
        self.maybe_assigned: set[str] = set()
        self.read_by_nested: dict[str, None] = {}
        self.local_scopes: list[set[str]] = []

    def block(self, body: Iterable[ast.AST]) -> None:
        for node in body:
            self.visit(node)

    def end(self) -> None:
        for name in self.read_by_nested:
            if name in self.assigned_so_far:
                self.hidden.add(name)
            else:
                self.reads[name] = None

    # names

    def read(self, name: str) -> None:
        if any(name in scope for scope in self.local_scopes):
            return
        if name not in self.assigned_so_far:
            self.reads[name] = None
        elif name in self.maybe_assigned:
            self.hidden.add(name)

    def assign(self, name: str) -> None:
        self.assigned[name] = None
        self.assigned_so_far.add(name)
        self.maybe_assigned.discard(name)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.read(node.id)
        elif isinstance(node.ctx, ast.Store):
            self.assign(node.id)
        else:
            self.read(node.id)
            self.assigned[node.id] = None
            self.assigned_so_far.discard(node.id)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            for pattern in self.string_patterns:
                for name in pattern.findall(node.value):
                    self.read(name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._part(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._part(node)
        self.visit(node.slice)

    def _part(self, node: ast.Attribute | ast.Subscript) -> None:
        """Visit `a.b` and `a[b]`: assigning to it changes the object that `a` names."""
        self.visit(node.value)
        root: ast.expr = node.value
        while isinstance(root, (ast.Attribute, ast.Subscript)):
            root = root.value
        if not isinstance(node.ctx, ast.Load) and isinstance(root, ast.Name):
            self.assigned[root.id] = None

    # magics and shell lines, which IPython turns into calls with text

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        magic, texts = _text_for_ipython(node)
        body: list[ast.stmt] = []
        if magic in _PYTHON_MAGICS:
            with suppress(SyntaxError):  # options stand before the code
                python = TransformerManager().transform_cell(texts[-1])  # type: ignore[no-untyped-call]
                body = ast.parse(python).body
                texts.pop()
        for name in re.findall(r"[^\W\d]\w*", " ".join(texts)):
            self.read(name)
        self.block(body)

    # statements

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        self.block(node.targets)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit(node.annotation)
        if node.value is not None:
            self.visit(node.value)
            self.visit(node.target)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.read(node.target.id)
        self.visit(node.value)
        self.visit(node.target)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self.assign(node.target.id)

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self.visit(node.iter)
        self._visit_uncertain([node.target, *node.body])
        self._visit_uncertain(node.orelse)

    visit_AsyncFor = visit_For

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self._visit_uncertain(node.body)
        self._visit_uncertain(node.orelse)

    def visit_With(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            self.visit(item.context_expr)
            if item.optional_vars is not None:
                self.visit(item.optional_vars)
        self._visit_uncertain(node.body)

    visit_AsyncWith = visit_With

    def _visit_uncertain(self, body: Sequence[ast.AST]) -> None:
        """Visit a body that may not run, or not to its end."""
        before = set(self.assigned_so_far)
        self.block(body)
        self.maybe_assigned |= self.assigned_so_far - before

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._visit_branches([node.body, node.orelse])

    def visit_Match(self, node: ast.Match) -> None:
        self.visit(node.subject)
        self._visit_branches([*([case] for case in node.cases), []])

    def visit_match_case(self, node: ast.match_case) -> None:
        for part in ast.walk(node.pattern):
            name = getattr(part, "name", None) or getattr(part, "rest", None)
            if isinstance(name, str):
                self.assign(name)
            elif isinstance(part, ast.MatchValue):
                self.visit(part.value)
        if node.guard is not None:
            self.visit(node.guard)
        self.block(node.body)

    def visit_Try(self, node: ast.Try | ast.TryStar) -> None:
        handlers = [handler for handler in node.handlers if not _always_leaves(handler.body)]
        before = set(self.assigned_so_far)
        self.block([*node.body, *node.orelse])
        after = set(self.assigned_so_far)
        for handler in node.handlers:
            self.assigned_so_far = set(before)
            self.visit(handler)
            if handler in handlers:
                after &= self.assigned_so_far
        self.assigned_so_far = after
        self.block(node.finalbody)

    visit_TryStar = visit_Try

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.type is not None:
            self.visit(node.type)
        if node.name is None:
            self.block(node.body)
            return
        known = node.name in self.assigned
        self.assign(node.name)
        self.block(node.body)
        self.assigned_so_far.discard(node.name)
        if not known:
            del self.assigned[node.name]

    def _visit_branches(self, bodies: Sequence[Sequence[ast.AST]]) -> None:
        before, ends = set(self.assigned_so_far), []
        for body in bodies:
            self.assigned_so_far = set(before)
            self.block(body)
            if not _always_leaves(body):
                ends.append(self.assigned_so_far)
        self.assigned_so_far = set.intersection(*ends) if ends else before

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name != "*":
                name = alias.asname or alias.name.partition(".")[0]
                self.assign(name)
                self.imported.add(name)

    visit_ImportFrom = visit_Import

    # scopes

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.block(node.decorator_list)
        arguments = node.args
        annotated = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        annotated += filter(None, (arguments.vararg, arguments.kwarg))
        self.block(filter(None, (*arguments.defaults, *arguments.kw_defaults, node.returns)))
        self.block(filter(None, (argument.annotation for argument in annotated)))
        self._scan_nested([node])
        self.assign(node.name)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.block([*node.decorator_list, *node.bases, *node.keywords])
        self._scan_nested([node])
        self.assign(node.name)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.block(filter(None, (*node.args.defaults, *node.args.kw_defaults)))
        self._scan_nested([ast.Expr(node)])

    def _scan_nested(self, body: list[ast.stmt]) -> None:
        """Collect what nested code of the cell reads and rebinds, whenever it runs."""
        module = ast.fix_missing_locations(ast.Module(body, []))
        code = compile(module, "<cell>", "exec", dont_inherit=True)
        inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        local = set().union(*self.local_scopes)
        for scanned in map(names_used.scan, inner):
            found = {use.name for use in scanned.uses if use.root == names_used.GLOBAL_NAME} - local
            rebound = (use.name for use in scanned.assigned if use.root == names_used.GLOBAL_NAME)
            self.read_by_nested.update(dict.fromkeys(sorted(found)))
            self.assigned.update(dict.fromkeys(rebound))

    def _comprehension(self, node: Any) -> None:
        self.local_scopes.append(set())
        for generator in node.generators:
            self.visit(generator.iter)
            targets = ast.walk(generator.target)
            self.local_scopes[-1] |= {part.id for part in targets if isinstance(part, ast.Name)}
            self.block(generator.ifs)
        self.block(filter(None, (getattr(node, part, None) for part in ("key", "value", "elt"))))
        self.local_scopes.pop()

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension


_PYTHON_MAGICS = frozenset({"time", "timeit", "prun", "capture"})
"""Magics that run their last argument as Python in the namespace of the notebook."""


def _text_for_ipython(node: ast.Call) -> tuple[str, list[str]]:
    """Return the magic that a call runs (`""` for a shell line), and its texts, if it is IPython's.

    Names of the notebook may stand in the texts (`!ls {folder}`), so each word may be an input: one
    that is none costs a run, and one that is missed would give a wrong result.
    """
    match node.func:
        case ast.Attribute(ast.Call(ast.Name("get_ipython")), called):
            values = [one.value for one in node.args if isinstance(one, ast.Constant)]
            texts = [value for value in values if isinstance(value, str)]
            if called in ("run_line_magic", "run_cell_magic") and len(texts) > 1:
                return texts[0], texts[1:]
            if called in ("system", "getoutput"):
                return "", texts
    return "", []


def _always_leaves(body: Sequence[ast.AST]) -> bool:
    """True if a branch never reaches what comes after it."""
    return bool(body) and isinstance(body[-1], (ast.Raise, ast.Return, ast.Continue, ast.Break))


# --- the outcome of a cell ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recording:
    """The outcome of a cell, as stored.

    Attributes:
        outputs: the names that it assigned, with their values.
        deleted: the names that it deleted.
        shown: what it printed and displayed; see `replay`.
        value: the value of the last expression; None if there is none, or if it cannot be pickled:
            then its display is the last of `shown`.
        live: that value if it cannot be pickled, for the cell that just ran; it is not stored.
    """

    outputs: Mapping[str, Any]
    deleted: tuple[str, ...]
    shown: output_replay.Output
    value: Any = None
    live: Any = None

    def __reduce__(self) -> Any:
        return Recording, (self.outputs, self.deleted, self.shown, self.value)


def _flush_figures() -> None:
    """Show the figures that matplotlib's inline backend would show at the end of the cell."""
    inline = sys.modules.get("matplotlib_inline.backend_inline")
    if inline is not None and "matplotlib.pyplot" in sys.modules:
        inline.flush_figures()


def replay(shell: Any, recording: Recording) -> None:
    """Show the output of a cell again, and assign its outputs."""
    output_replay.replay(recording.shown)
    scope = shell.user_ns
    scope.update({name: _rebound(value, scope) for name, value in recording.outputs.items()})
    for name in recording.deleted:
        scope.pop(name, None)


def _rebound(value: Any, scope: dict[str, Any]) -> Any:
    """Rebind a function that a cell defined to the names of this notebook."""
    if type(value) is not types.FunctionType or value.__module__ != scope.get("__name__"):
        return value
    made = types.FunctionType(
        value.__code__, scope, value.__name__, value.__defaults__, value.__closure__
    )
    made.__kwdefaults__ = value.__kwdefaults__
    made.__dict__.update(value.__dict__)
    made.__doc__, made.__qualname__ = value.__doc__, value.__qualname__
    made.__annotations__ = value.__annotations__
    return made


# --- a cell as a cached function ------------------------------------------------------------------


class CellIdentity(Identity):
    """The code version of a cell: its normalized text, and the outputs that are kept."""

    def __init__(self, text: str, outputs: Sequence[str] | None) -> None:
        self._parts = {"cell": text, "python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
        if outputs is not None:
            self._parts["outputs"] = ",".join(outputs)
        self.lost: dict[str, str] = {}
        whole = "\0".join(f"{name}\0{part}" for name, part in self._parts.items())
        digest = hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()
        # A cell reaches only its own code: its inputs are arguments, its changes are outputs.
        super().__init__(lambda: None, digest=digest)

    def may_change_state(self, owner: type | None) -> bool:
        return False

    def parts(self, owner: type | None = None) -> dict[str, str]:
        return dict(self._parts)

    def untracked(self, owner: type | None = None) -> list[str]:
        return [f"{name}: {why}" for name, why in self.lost.items()]


class Cell:
    """A cell as a cached function.

    Args:
        shell: the shell in whose namespace it runs.
        source: the cell as Python, with magics transformed.
        file: the name under which IPython knows its source.
        inputs: the names to use as its inputs; None: those that it reads.
        outputs: the names to keep; None: those that it assigns.
        options: options of `memo.cache`: `ttl`, `tags`, `name`.

    Raises:
        SyntaxError: it is not valid Python.
        OptionError: an option is wrong.
    """

    def __init__(
        self,
        shell: Any,
        source: str,
        file: str,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        self._shell = shell
        self._scope: dict[str, Any] = shell.user_ns
        tree = ast.parse(source, file)
        self.names = find_names(tree)
        self._given = inputs
        self._outputs = outputs
        flags = shell.compile.compiler_flags | _AWAIT_FLAG  # those of `from __future__ import ...`
        self._codes = [compile(part, file, mode, flags, True) for part, mode in _split(tree)]
        self.awaits = any(code.co_flags & inspect.CO_COROUTINE for code in self._codes)
        self._quiet = _is_quiet(source)
        self.identity = CellIdentity(_normalized(tree, self._quiet), outputs)
        name = options.pop("name", None) or _name(self._scope, self.names, self.identity)
        run = self._run_awaited if self.awaits else self._run
        made: Any = cache(name=name, **options)(_with_name(run, name))
        made._function.keyer.identity = self.identity
        made._function.history.warned = True  # reported below, name by name
        self.function: CachedFunction[Any, Any] = made
        self.inputs = self._find_inputs()
        self._ran = False

    def _find_inputs(self) -> dict[str, Any]:
        if self._given is not None:
            missing = [name for name in self._given if name not in self._scope]
            if missing:
                raise OptionError("inputs", ",".join(missing), "is not defined.")
        hidden = getattr(self._shell, "user_ns_hidden", {})
        wanted = self.names.reads if self._given is None else self._given
        return {
            name: self._scope[name]
            for name in wanted
            if name in self._scope and hidden.get(name) is not self._scope[name]
        }

    # --- asking the cache

    def explain(self) -> Any:
        """Explain whether the cell would be replayed, and if not, why."""
        self._leave_out_inputs()
        return self.function.explain(**self.inputs)

    def answer(self, *, force: bool = False) -> Any:
        """Run or replay the cell, and return the value of its last expression."""
        __tracebackhide__ = True
        ask: Any = self.function.refresh if force else self.function
        with self._unpicklable_events() as faults:
            try:
                recording = ask(**self.inputs)
            except Exception as error:
                self._leave_out_keyless(error)
                recording = ask(**self.inputs)
        return self._finish(recording, faults)

    async def answer_async(self, *, force: bool = False) -> Any:
        """Like `answer`, for a cell with top-level `await`."""
        __tracebackhide__ = True
        ask: Any = self.function.arefresh if force else self.function
        with self._unpicklable_events() as faults:
            try:
                recording = await ask(**self.inputs)
            except Exception as error:
                self._leave_out_keyless(error)
                recording = await ask(**self.inputs)
        return self._finish(recording, faults)

    @contextmanager
    def _unpicklable_events(self) -> Iterator[list[Event]]:
        heard: list[Event] = []

        def hear(event: Event) -> None:
            if event.kind == events.ERROR and event.reason == "unpicklable":
                heard.append(event)

        remove = events.on_event(hear)
        try:
            yield heard
        finally:
            remove()

    def _leave_out_keyless(self, error: Exception) -> None:
        """Leave out inputs without a sound key, if one caused this error; else raise the error."""
        __tracebackhide__ = True
        if self._ran or not isinstance(error, KeyingError):
            raise cut_to_user_frames(error)
        self._leave_out_inputs()

    def _leave_out_inputs(self) -> None:
        """Drop the inputs that have no sound key."""
        for name, value in tuple(self.inputs.items()):
            try:
                value_digest(value, name)
            except canonical.Unkeyable as error:
                del self.inputs[name]
                self.identity.lost[name] = f"{type(value).__name__} has no sound key ({error})"

    def _finish(self, recording: Recording, faults: list[Event]) -> Any:
        if not self._ran:
            replay(self._shell, recording)
        elif any(event.function == self.function.function_id for event in faults):
            sys.stderr.write(f"%%cache: {_why_not_stored(recording)}\n")
        return recording.value if recording.live is None else recording.live

    # --- running

    def _run(self, **_: Any) -> Recording:
        __tracebackhide__ = True
        with self._changes() as changed, output_replay.recording() as recorder:
            value = None
            for code in self._codes:
                value = eval(code, self._scope)  # noqa: S307 - the user's own cell
            _flush_figures()
        return self._record(recorder.shown, value, changed)

    async def _run_awaited(self, **_: Any) -> Recording:
        __tracebackhide__ = True
        with self._changes() as changed, output_replay.recording() as recorder:
            value = None
            for code in self._codes:
                value = eval(code, self._scope)  # noqa: S307 - the user's own cell
                if code.co_flags & inspect.CO_COROUTINE:
                    value = await value
            _flush_figures()
        return self._record(recorder.shown, value, changed)

    @contextmanager
    def _changes(self) -> Iterator[list[str]]:
        """Collect the names that change while the cell runs; hide those that it must not read."""
        self._ran = True
        scope = self._scope
        wanted = self.names.hidden - set(self._given or ())
        hidden = {name: scope.pop(name) for name in wanted if name in scope}
        assigned = set(self.names.assigned)
        known = {name: value for name, value in dict(scope).items() if name not in assigned}
        before = {name: _digest(value) for name, value in self._mutable_inputs()}
        changed: list[str] = []
        try:
            yield changed
            others = (  # assigned by `exec`, `%time x = 1`, `import *`, or a function that it calls
                name
                for name, value in dict(scope).items()
                if not name.startswith("_") and known.get(name, _NEW_NAME) is not value
            )
            changed += dict.fromkeys((*self.names.assigned, *others))
            changed += [n for n, value in self._mutable_inputs() if _digest(value) != before[n]]
        finally:
            for name, value in hidden.items():
                scope.setdefault(name, value)

    def _mutable_inputs(self) -> list[tuple[str, Any]]:
        """Return the inputs that the cell may change in place without assigning them."""
        return [
            (name, value)
            for name, value in self.inputs.items()
            if type(value) not in _IMMUTABLE_TYPES and name not in self.names.assigned
        ]

    def _record(self, shown: output_replay.Output, value: Any, changed: list[str]) -> Recording:
        wanted = changed if self._outputs is None else self._outputs
        missing = [name for name in self._outputs or () if name not in self._scope]
        if missing:
            raise OptionError("outputs", ",".join(missing), "is not assigned by the cell.")
        outputs = {name: self._scope[name] for name in wanted if name in self._scope}
        deleted = tuple(name for name in self.names.assigned if name not in self._scope)
        value = None if self._quiet else value
        if value is None or _may_keep(value, outputs):
            return Recording(outputs, deleted, shown, value)
        data, metadata = self._shell.display_formatter.format(value)
        last = output_replay.storable_part({"data": data, "metadata": metadata})
        return Recording(outputs, deleted, (*shown, ("display", last)), None, value)


def _split(tree: ast.Module) -> Iterator[tuple[Any, str]]:
    """Yield a cell as statements and, if it ends in one, an expression."""
    body = tree.body
    last = body[-1] if body else None
    if isinstance(last, ast.Expr):
        body = body[:-1]
    if body:
        yield ast.Module(body, []), "exec"
    if isinstance(last, ast.Expr):
        yield ast.Expression(last.value), "eval"


def _is_quiet(source: str) -> bool:
    """True if a cell ends in `;`, which suppresses the display of its last expression."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    last = ""
    for token in tokens:
        if token.type not in _INVISIBLE_TOKENS:
            last = token.string
    return last == ";"


def _normalized(tree: ast.Module, quiet: bool) -> str:
    """Return a cell without comments and layout."""
    return ast.unparse(tree) + ";" * quiet


def _name(scope: dict[str, Any], found: Names, identity: CellIdentity) -> str:
    """Name a cell after what it assigns, so that an edited cell keeps its name."""
    made = [name for name in found.assigned if name not in found.imported] or found.assigned
    shown = list(made[:_MAX_SHOWN_NAMES])
    more = len(made) - len(shown)
    shown += [f"+{more}"] if more else []
    inner = ",".join(shown) or identity.digest()[:8]
    here = types.FunctionType((lambda: None).__code__, scope, "cell")
    here.__module__, here.__qualname__ = "__main__", f"cell({inner})"
    return function_id(here)


def _with_name(run: Any, name: str) -> Any:
    """Wrap the bound method `run` in a function with this name."""
    if inspect.iscoroutinefunction(run):

        async def cell(**inputs: Any) -> Recording:
            __tracebackhide__ = True
            result: Recording = await run(**inputs)
            return result

        made: Any = cell
    else:

        def cell_(**inputs: Any) -> Recording:
            __tracebackhide__ = True
            result: Recording = run(**inputs)
            return result

        made = cell_
    made.__name__ = made.__qualname__ = name.rpartition(":")[2]
    return made


def _digest(value: Any) -> bytes:
    """Return the digest of a value; `b""` if it has no key."""
    try:
        return value_digest(value)
    except canonical.Unkeyable:
        return b""


def _may_keep(value: Any, outputs: Mapping[str, Any]) -> bool:
    """True if a value can be pickled, or is one of the outputs, which are checked separately."""
    return any(value is one for one in outputs.values()) or _is_picklable(value)


def _is_picklable(value: Any) -> bool:
    try:
        codec.encode(value)
    except Exception:  # pickling a user's value may raise anything
        return False
    return True


def _why_not_stored(recording: Recording) -> str:
    """Explain why a recording was not stored, and what to write instead."""
    bad = [name for name, value in recording.outputs.items() if not _is_picklable(value)]
    good = ",".join(name for name in recording.outputs if name not in bad)
    kinds = ", ".join(f"{name} (a {type(recording.outputs[name]).__name__})" for name in bad)
    fix = f"; keep the rest with --outputs {good}" if good else ""
    return f"not stored, since {kinds or 'what it shows'} cannot be pickled{fix}"
