"""Find the names through which code reaches other code and state.

Rules of this module:

1.  A *use* is a name that the code reads from outside, with the attributes taken directly from it:
    `helpers.model.fit(x)` is the use `helpers` with the chain `model`, `fit`.  Uses are read from
    the bytecode, so that functions without source have them too.
2.  *Assigned* names are rebound by the code itself (`global n`, `nonlocal n`, `Class.n = …`,
    `type(self).n = …`).
3.  *Filled* names are counters and containers that the code changes and never reads
    (`calls.append(x)`, `seen[k] = v`, `n += 1`), so they are not inputs.  They are read from the
    source, and for methods also from the bytecode.
4.  A string may name variables that its reader looks up: `frame.query("x > @limit")` of pandas, and
    `duckdb.sql("select x from frame")`.  They are uses too.
5.  *Changed* names are all names that the code assigns, sets or fills in any way, by their last
    part: for `self.log.append(x)` it is `log`.
"""

from __future__ import annotations

import ast
import dis
import re
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from memo.runtime.named_tuple import NamedTuple

GLOBAL_NAME = "global"
FREE = "free"
SELF = "self"
SUPER = "super"
IMPORT = "import"
ANY_HOLDER = "any"

Path = tuple[str, ...]


class Use(NamedTuple):
    """A name that code reads from outside itself.

    Attributes:
        root: `GLOBAL_NAME`, `FREE` (a closure's variable), `SELF` (the first parameter), `SUPER`
            (the result of `super()`), `IMPORT` (a module imported inside the function), or
            `ANY_HOLDER` (any other holder of an attribute that is set).
        name: the variable; for `IMPORT` the module, relative ones with their leading dots.
        chain: the attributes taken directly from it.
    """

    root: str
    name: str
    chain: Path = ()


class TakenAttributes(NamedTuple):
    """The attributes that code takes from one name.

    Attributes:
        chains: chains of attributes taken directly; `()` is the object itself.
        filled: the chains that it only fills.
    """

    chains: tuple[Path, ...] = ((),)
    filled: frozenset[Path] = frozenset()

    @property
    def is_only_filled(self) -> bool:
        """True if a container of this name is only filled, as far as the code shows."""
        return () in self.filled or (
            bool(self.chains)
            and all(len(chain) == 1 and chain[0] in _RETURNING_NONE for chain in self.chains)
        )

    def by_attribute(self) -> dict[str, TakenAttributes]:
        """Return the attributes taken from each attribute."""
        names = {chain[0]: None for chain in self.chains if chain}
        return {
            name: TakenAttributes(
                tuple(chain[1:] for chain in self.chains if chain[:1] == (name,)),
                below(self.filled, name),
            )
            for name in names
        }


def below(paths: frozenset[Path], name: str) -> frozenset[Path]:
    """Return the paths below a name, without it."""
    return frozenset(path[1:] for path in paths if path[:1] == (name,))


IGNORED_INSTRUCTIONS = frozenset({"CACHE", "NOP", "EXTENDED_ARG", "RESUME", "PRECALL"})
"""Instructions without an effect of their own."""

# --- uses -----------------------------------------------------------------------------------------

_FAST = re.compile(r"(LOAD|STORE)_FAST")
_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_CELLS = {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
_SUPER_NAME = Use(GLOBAL_NAME, "super")
_SETTERS = ("setattr", "__setattr__")
_VARIABLE = re.compile(r"(?<![\w.@])@([A-Za-z_]\w*)")
_TABLE_NAME = re.compile(r"\b(?:from|join)\s+([A-Za-z_]\w*)\b(?!\s*[.(])", re.IGNORECASE)
_SQL_FUNCTIONS = (
    ({"duckdb"}, {"sql", "query", "execute", "from_query"}),
    ({"pl", "polars"}, {"sql"}),
)
"""Modules in whose SQL a table may be a variable, and their functions."""
_IMPLICIT = {"__name__", "__doc__", "__qualname__", "__module__", "__builtins__", "__annotations__"}


class Scanned(NamedTuple):
    """The names through which code reaches other code and state.

    Attributes:
        uses: sorted, without duplicates.
        assigned: uses that the code rebinds.
        items: each use that is subscripted or called with a string, with that string.
        names: every name and attribute that the code mentions.
        changed: names that it assigns, sets as attributes of any object, or calls a filling method
            of.
    """

    uses: tuple[Use, ...]
    assigned: frozenset[Use]
    items: frozenset[tuple[Use, str]]
    names: frozenset[str]
    changed: frozenset[str]


def scan(code: CodeType) -> Scanned:
    """Return the uses of a function's code and of nested code, and those that are rebound."""
    known = {name: Use(FREE, name) for name in code.co_freevars}
    if code.co_argcount:
        known[code.co_varnames[0]] = Use(SELF, "")
    found = _Scan()
    found.run(code, known)
    return Scanned(
        tuple(sorted(found.uses)),
        frozenset(found.assigned),
        frozenset(found.items),
        frozenset(found.names),
        frozenset(found.changed),
    )


class _Scan:
    """One pass over a code object and nested ones, following names to their attributes."""

    def __init__(self) -> None:
        self.uses: set[Use] = set()
        self.assigned: set[Use] = set()
        self.items: set[tuple[Use, str]] = set()
        self.names: set[str] = set()
        self.changed: set[str] = set()

    def run(self, code: CodeType, known: dict[str, Use]) -> None:
        """Scan one code object.

        Args:
            code: the code object.
            known: its variables that stand for something outside.  Imports add to it.
        """
        self.names.update(code.co_names)
        self.uses.update(Use(GLOBAL_NAME, name) for name in _names_in_strings(code))
        scope = _Scope(self, code, known)
        for item in instructions(code):
            scope.step(item.opname, item.argval)
        scope.end()
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                self.run(inner, {n: known[n] for n in inner.co_freevars if n in known})


def string_patterns(names: set[str]) -> list[re.Pattern[str]]:
    """Return the patterns of variables in the strings of code that mentions some names (rule 4)."""
    patterns = [_VARIABLE] if names & {"query", "eval"} else []
    if any(modules & names and verbs & names for modules, verbs in _SQL_FUNCTIONS):
        patterns.append(_TABLE_NAME)
    return patterns


def _names_in_strings(code: CodeType) -> Iterator[str]:
    """Yield the names of globals in strings that pandas, DuckDB or polars read (rule 4)."""
    patterns = string_patterns(set(code.co_names))
    own = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    for text in code.co_consts if patterns else ():
        if isinstance(text, str):
            found = {name for pattern in patterns for name in pattern.findall(text)}
            yield from sorted(found - own)


def instructions(code: CodeType) -> Iterator[dis.Instruction]:
    """Yield the instructions that have an effect; a combined one as the two it stands for."""
    for item in dis.get_instructions(code):
        verbs = _FAST.findall(item.opname)
        if len(verbs) == 2 and isinstance(item.argval, tuple):
            for verb, name in zip(verbs, item.argval, strict=True):
                yield item._replace(opname=f"{verb}_FAST", argval=name)
        elif verbs:
            yield item._replace(opname=f"{verbs[0]}_FAST")
        elif item.opname not in IGNORED_INSTRUCTIONS:
            yield item


class _Scope:
    """The scan of one code object: what was just loaded, and what names stand for."""

    def __init__(self, scan: _Scan, code: CodeType, known: dict[str, Use]) -> None:
        self.scan = scan
        self.known = known
        self.passed = {*code.co_cellvars, *code.co_freevars}
        self.stored: set[str] = set()  # names of a class body
        self.pending: Use | None = None
        self.copied: Use | None = None  # the holder in `Class.n += 1`
        self.imported: Use | None = None
        self.whole = False  # `import a.b as c`: attributes lead to the module
        self.sets = False  # the next string names an attribute that is set
        self.operands: list[Any] = [None, None]

    def step(self, name: str, value: Any) -> None:
        """Process one instruction."""
        if self.sets and name == "LOAD_CONST" and isinstance(value, str):
            self.scan.changed.add(value)
        self.sets = value in _SETTERS or (self.sets and name not in {"CALL", "LOAD_CONST"})
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            self._attribute(value)
        elif name.startswith(("IMPORT_", "STORE_", "DELETE_")):
            self._change(name, value)
        elif name == "COPY" and self.pending is not None:
            self.copied = self.pending
        elif name == "LOAD_SUPER_ATTR":
            self.pending = Use(SUPER, "", (value,))
        elif name == "CALL" and self.pending == _SUPER_NAME:
            self.pending = Use(SUPER, "")
        else:
            if name == "LOAD_CONST" and self.pending is not None and isinstance(value, str):
                self.scan.items.add((self.pending, value))
            self.end()
            self._load(name, value)
        self.operands = [self.operands[1], value]

    def end(self) -> None:
        """End a chain of attributes, since the loaded value is used otherwise."""
        if self.pending is not None:
            self.scan.uses.add(self.pending)
            self.pending = None

    def _load(self, name: str, value: Any) -> None:
        read = name in _GLOBALS and value not in self.stored
        if read and (value not in _IMPLICIT or (name, value) == ("LOAD_GLOBAL", "__name__")):
            self.pending = Use(GLOBAL_NAME, value)
        elif name in _CELLS or (name == "LOAD_FAST" and value not in self.passed):
            self.pending = self.known.get(value)

    def _attribute(self, value: str) -> None:
        if self.pending is not None:
            if value in _FILLING:
                self.scan.changed.add((self.pending.name, *self.pending.chain)[-1])
            self.pending = self.pending._replace(chain=(*self.pending.chain, value))

    def _change(self, name: str, value: Any) -> None:
        if name == "IMPORT_NAME":
            self._import(value)
        elif name == "IMPORT_FROM":
            self._import_from(value)
        elif name == "STORE_ATTR":
            self._store_attribute(value)
        elif name == "STORE_NAME":
            self.end()
            self.stored.add(value)
        elif name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            self.end()
            self.scan.assigned.add(Use(GLOBAL_NAME, value))
            self.scan.changed.add(value)
        elif name in ("STORE_FAST", "STORE_DEREF", "DELETE_DEREF"):
            self._store_variable(name, value)
        else:
            self.end()

    def _import(self, module: str) -> None:
        self.end()
        level, names = self.operands
        self.imported = Use(IMPORT, "." * (level if isinstance(level, int) else 0) + module)
        self.whole = names is None
        self.scan.uses.add(self.imported)
        self.pending = self.imported if not names else None
        if self.whole:
            self.pending = Use(IMPORT, module.partition(".")[0])

    def _import_from(self, value: str) -> None:
        assert self.imported is not None
        chain = () if self.whole else (value,)
        self.pending = self.imported._replace(chain=chain)

    def _store_attribute(self, value: str) -> None:
        self.scan.changed.add(value)
        holder, self.copied = self.pending or self.copied, None
        holder = holder or Use(ANY_HOLDER, "")
        self.scan.assigned.add(holder._replace(chain=(*holder.chain, value)))
        self.end()

    def _store_variable(self, name: str, value: str) -> None:
        loaded, old = self.pending, self.known.get(value)
        self.end()
        if loaded is not None and loaded.root == IMPORT:
            self.known[value] = loaded
        elif old is not None and old.root == FREE and name != "STORE_FAST":
            self.scan.assigned.add(old)
            self.scan.changed.add(value)


# --- filled containers ----------------------------------------------------------------------------

_RETURNING_NONE = frozenset(
    [
        "append",
        "add",
        "extend",
        "update",
        "insert",
        "clear",
        "discard",
        "remove",
        "sort",
        "reverse",
        "appendleft",
        "extendleft",
    ]
)
"""Methods of containers that add or remove items and return None."""
_DISCARDED = _RETURNING_NONE | {"setdefault", "pop", "popitem", "popleft"}
"""Methods whose return value matters unless it is discarded."""
_FILLING = _DISCARDED | {
    *("subtract", "rotate", "move_to_end", "difference_update", "intersection_update"),
    *("symmetric_difference_update", "fill", "put", "itemset", "resize"),
}
"""Every method that changes a container in place."""


class FilledNames(NamedTuple):
    """The names that a function fills.

    Attributes:
        only: dotted names of what it fills and never reads.
        names: the last parts of everything that it fills.
        read: the names of attributes that it reads, of any object.
    """

    only: frozenset[Path]
    names: frozenset[str]
    read: frozenset[str]


def filled(node: ast.AST) -> FilledNames:
    """Return the names that a function fills, from its source."""
    reader = _FillVisitor()
    reader.visit(node)
    only = {path for path in reader.filled if not any(_overlap(path, read) for read in reader.read)}
    names = {path[-1] for path in reader.filled}
    attributes = {name for path in reader.read for name in path[1:]}
    return FilledNames(frozenset(only), frozenset(names), frozenset(attributes | reader.others))


def _overlap(one: Path, other: Path) -> bool:
    """True if two dotted names overlap: one is the other, or an attribute of it."""
    return one[: len(other)] == other[: len(one)]


class _FillVisitor(ast.NodeVisitor):
    """Divides the dotted names of a function into those read and those only filled."""

    def __init__(self) -> None:
        self.read: set[Path] = set()
        self.filled: set[Path] = set()
        self.others: set[str] = set()
        self.own: Path | None = None

    def visit_Name(self, node: ast.Name) -> None:
        self._read((node.id,))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = _dotted_name(node)
        if path:
            self._read(path)
        else:
            self.others.add(node.attr)
            self.generic_visit(node)

    def _read(self, path: Path) -> None:
        if self.own is None or path[: len(self.own)] != self.own:
            self.read.add(path)

    def visit_Expr(self, node: ast.Expr) -> None:
        call = node.value
        if not (isinstance(call, ast.Call) and self._fills(call, _DISCARDED)):
            self.visit(call)

    def visit_Call(self, node: ast.Call) -> None:
        if not self._fills(node, _RETURNING_NONE):
            self.generic_visit(node)

    def _fills(self, call: ast.Call, methods: frozenset[str]) -> bool:
        if not (isinstance(call.func, ast.Attribute) and call.func.attr in methods):
            return False
        if not self._target(call.func.value):
            return False
        self._all((*call.args, *call.keywords))
        return True

    def visit_Assign(self, node: ast.Assign) -> None:
        self._assign(node.targets, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        path = _dotted_name(node.target)
        if path is None:
            self._assign([node.target], node.value)
        else:
            self.filled.add(path)
            self.visit(node.value)

    def visit_Delete(self, node: ast.Delete) -> None:
        self._assign(node.targets, None)

    def _assign(self, targets: list[ast.expr], value: ast.expr | None) -> None:
        only = targets[0] if len(targets) == 1 else None
        held = isinstance(only, ast.Subscript) and self._target(only)
        if not held:
            self._all(targets)
        if value is not None:
            names = any(isinstance(part, ast.NamedExpr) for part in ast.walk(value))
            self.own = _base(only) if held and only is not None and not names else None
            self.visit(value)
        self.own = None

    def _target(self, node: ast.expr) -> bool:
        """Record a container that is filled; False if it is not a plain dotted name."""
        path = _base(node)
        if path is None:
            return False
        self.filled.add(path)
        while isinstance(node, (ast.Subscript, ast.Call)):
            self._all([node.slice] if isinstance(node, ast.Subscript) else node.args)
            node = node.value if isinstance(node, ast.Subscript) else _called(node)
        return True

    def _all(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)


def _base(node: ast.expr) -> Path | None:
    """Return the container under `a.b`, `a.b[k]`, `a.b[k][l]` and `a.b.setdefault(k, [])`."""
    while True:
        if isinstance(node, ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call) and _called(node) is not node:
            node = _called(node)
        else:
            return _dotted_name(node)


def _called(node: ast.Call) -> ast.expr:
    function = node.func
    if isinstance(function, ast.Attribute) and function.attr == "setdefault":
        return function.value
    return node


def _dotted_name(node: ast.expr) -> Path | None:
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        path = _dotted_name(node.value)
        return None if path is None else (*path, node.attr)
    return None
