"""Normalised text of code objects.

Rules of this module:

1.  The text of a function is its source without decorators, docstrings, comments and layout: parsed
    and written out again.  A source is believed only when compiling it gives this very code object
    (or one that does the same), since a file may have been edited after it was imported.
2.  Where no such source is found (`exec`, frozen code, rewritten asserts) the text is the bytecode
    with every operand written out by value and type: no line numbers, no file name, no docstring.
"""

from __future__ import annotations
import __future__ as future

import ast
import copy
import dis
import functools
import linecache
import sys
import threading
import weakref
from collections.abc import Iterator
from types import CodeType
from typing import Any

from memo.keys.fingerprint import names_used
from memo.keys.fingerprint.names_used import Fills, Path, Use, instructions
from memo.runtime import fork
from memo.runtime.named_tuple import NamedTuple


class Code(NamedTuple):
    """Normalised text of a code object, and the names that it uses.

    Attributes:
        text: normalised source, or bytecode.
        source: whether `text` is source.
        uses: sorted, each once.
        assigned: uses that the code rebinds.
        filled: dotted names of counters and containers that the code only fills.
        items: each use that is subscripted or called with a text, with that text.
        names: every name and attribute that the code mentions.
        changed: names that it assigns, sets or fills in any way.
        read: the names of attributes that it reads, of anything.
    """

    text: str
    source: bool
    uses: tuple[Use, ...]
    assigned: frozenset[Use]
    filled: frozenset[Path]
    items: frozenset[tuple[Use, str]]
    names: frozenset[str]
    changed: frozenset[str]
    read: frozenset[str]


KNOWN: dict[int, tuple[weakref.ref[CodeType], Code]] = {}
"""By address, since two code objects may be equal and yet have different sources."""


def read(code: CodeType, namespace: dict[str, Any]) -> Code:
    """Normalise a code object, once for each.

    Args:
        code: of a function or a lambda.
        namespace: the globals of the function, through which a loader may have its source.
    """
    at = id(code)
    known = KNOWN.get(at)
    if known is not None and known[0]() is code:
        return known[1]
    found = _read(code, namespace)
    KNOWN[at] = (weakref.ref(code, lambda gone: _forget(at, gone)), found)
    return found


def _forget(at: int, gone: weakref.ref[CodeType]) -> None:
    known = KNOWN.get(at)
    if known is not None and known[0] is gone:
        del KNOWN[at]


def _read(code: CodeType, namespace: dict[str, Any]) -> Code:
    node = source_node(code, namespace)
    text = None if node is None else _text(node)
    scanned = names_used.scan(code)
    fills = _fills(code) if node is None else names_used.filled(node)
    return Code(
        bytecode(code) if text is None else text,
        text is not None,
        scanned.uses,
        scanned.assigned,
        fills.only,
        scanned.items,
        scanned.names,
        scanned.changed | fills.names,
        fills.read,
    )


def _fills(code: CodeType) -> Fills:
    """Without source: every name, where the code sets items of anything."""
    sets = any(i.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") for i in instructions(code))
    inner = [_fills(part) for part in code.co_consts if isinstance(part, CodeType)]
    every = frozenset((*code.co_names, *code.co_freevars))
    names = (every if sets else frozenset()).union(*(one.names for one in inner))
    return Fills(frozenset(), names, every.union(*(one.read for one in inner)))


# --- source ---------------------------------------------------------------------------------------

_Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
_FUTURES = functools.reduce(
    lambda flags, name: flags | getattr(future, name).compiler_flag, future.all_feature_names, 0
)
_SCANNED = 64
"""Source files whose parse is kept; a notebook of more cells parses the oldest again."""
_ATTEMPTS = 100
"""How often a source is parsed that another thread's parsing spoils."""


class _Index(NamedTuple):
    codes: dict[tuple[str, int], list[CodeType]]
    nodes: dict[tuple[str, int], list[_Node]]


def source_node(code: CodeType, namespace: dict[str, Any]) -> _Node | None:
    """The syntax tree of a code object; None when no source gives this code."""
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, namespace)
    if not lines:
        return None
    source, flags = "".join(lines), code.co_flags & _FUTURES
    return _find(code, index_of(source, flags)) or _find(code, index_of(_written(source), flags))


def _find(code: CodeType, index: _Index | None) -> _Node | None:
    if index is None:
        return None
    twin = _twin(code, index)
    return None if twin is None else _node(twin, index)


_parsing = threading.Lock()
fork.in_child(_parsing._at_fork_reinit)  # type: ignore[attr-defined]


def _parsed(source: str) -> ast.Module:
    """`ast.parse`, safe while other threads parse.

    In older releases of Python 3.11 and 3.12 its guard against deep recursion counts for threads
    together: one finds what another has counted, and raises SystemError (python/cpython#106905).
    """
    with _parsing:
        for _ in range(_ATTEMPTS - 1):
            try:
                return ast.parse(source)
            except SystemError:  # a thread that is not ours
                continue
        return ast.parse(source)


@functools.lru_cache(maxsize=_SCANNED)
def _written(source: str) -> str:
    """A source as Python writes it out: what `%autoreload` compiles when it patches a function."""
    try:
        return ast.unparse(_parsed(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""


@functools.lru_cache(maxsize=_SCANNED)
def index_of(source: str, flags: int) -> _Index | None:
    """The functions of a source by their place in it; None: it cannot be parsed."""
    try:
        tree = _parsed(source)
        flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        module = compile(tree, "<source>", "exec", flags=flags, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    index = _Index({}, {})
    for found in _codes(module):
        index.codes.setdefault((found.co_name, found.co_firstlineno), []).append(found)
    for node in ast.walk(tree):
        if isinstance(node, _Node):
            index.nodes.setdefault(_place(node), []).append(node)
    return index


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _place(node: _Node) -> tuple[str, int]:
    if isinstance(node, ast.Lambda):
        return "<lambda>", node.lineno
    return node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])


def _twin(code: CodeType, index: _Index) -> CodeType | None:
    """The code object of the source that is this one, or does the same elsewhere in the file."""
    for found in index.codes.get((code.co_name, code.co_firstlineno), ()):
        if found == code:
            return found
    alike = [
        found for (name, _), group in index.codes.items() if name == code.co_name for found in group
    ]
    alike.sort(key=lambda found: found.co_qualname != code.co_qualname)
    wanted = bytecode(code)
    return next((found for found in alike if bytecode(found) == wanted), None)


def _node(code: CodeType, index: _Index) -> _Node | None:
    nodes = index.nodes.get((code.co_name, code.co_firstlineno), [])
    if len(nodes) > 1:
        nodes = [node for node in nodes if _encloses(node, code)][-1:]
    return nodes[0] if nodes else None


def _encloses(node: _Node, code: CodeType) -> bool:
    """True if all of a code object's positions lie inside a node (innermost nodes come last)."""
    body = node.body if isinstance(node, ast.Lambda) else node
    first = (body.lineno, body.col_offset)
    last = (body.end_lineno or 0, body.end_col_offset or 0)
    spans = [
        (line, column, end, stop)
        for line, end, column, stop in code.co_positions()
        if line is not None and end is not None and column is not None and stop
    ]
    return bool(spans) and all(
        first <= (line, column) and (end, stop) <= last for line, column, end, stop in spans
    )


def _text(node: _Node) -> str | None:
    node = copy.deepcopy(node)
    if not isinstance(node, ast.Lambda):
        node.decorator_list = []
    try:
        text = ast.unparse(_Bare().visit(node))
    except (ValueError, RecursionError):  # an f-string that cannot be written out, deep nesting
        return None
    return text + "\n# asserts off" if sys.flags.optimize and _asserts(node) else text


def _asserts(node: _Node) -> bool:
    """True if `python -O` changes what the code does."""
    return any(
        isinstance(part, ast.Assert) or (isinstance(part, ast.Name) and part.id == "__debug__")
        for part in ast.walk(node)
    )


class _Bare(ast.NodeTransformer):
    """Takes docstrings and other lonely strings away, and the `u` of a string."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        value = node.value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return None
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        node.kind = None
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == [] and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node


# --- bytecode -------------------------------------------------------------------------------------

_KINDS = 0x04 | 0x08 | 0x20 | 0x80 | 0x100 | 0x200
"""`*args`, `**kwargs`, generator, coroutine, iterable coroutine, async generator."""
_UNREAD = {"__doc__", "__firstlineno__"}


def bytecode(code: CodeType) -> str:
    """The bytecode of a code object as text, the same wherever and however it was laid out."""
    kept = _kept(code)
    places = {item.offset: at for at, item in enumerate(kept)}
    places.update(_targets(code, kept))
    lines = [
        (
            f"code {code.co_name} {code.co_argcount} {code.co_posonlyargcount}"
            f" {code.co_kwonlyargcount} {code.co_flags & _KINDS} {code.co_varnames}"
            f" {code.co_cellvars} {code.co_freevars}"
        )
    ]
    lines += [_line(item, places) for item in kept]
    for entry in getattr(dis.Bytecode(code), "exception_entries", ()):
        ends = [places.get(at, len(kept)) for at in (entry.start, entry.end, entry.target)]
        lines.append(f"except {ends} {entry.depth} {entry.lasti}")
    return "\n".join(lines)


def _kept(code: CodeType) -> list[dis.Instruction]:
    kept: list[dis.Instruction] = []
    for item in instructions(code):
        if item.opname == "STORE_NAME" and item.argval in _UNREAD and kept:
            kept.pop()
        else:
            kept.append(item)
    return kept


def _targets(code: CodeType, kept: list[dis.Instruction]) -> dict[int, int]:
    """For every offset, the ordinal of the first kept instruction at or after it."""
    targets: dict[int, int] = {}
    at = 0
    for offset in range(0, len(code.co_code) + 2, 2):
        while at < len(kept) and kept[at].offset < offset:
            at += 1
        targets[offset] = at
    return targets


def _line(item: dis.Instruction, places: dict[int, int]) -> str:
    if item.opcode in _JUMPS:
        return f"{item.opname} to {places.get(item.argval)}"
    if item.opname in ("LOAD_CONST", "KW_NAMES", "RETURN_CONST"):
        return f"{item.opname} {constant(item.argval)}"
    by_name = item.argval if isinstance(item.argval, (str, tuple)) else item.arg
    return f"{item.opname} {by_name} {item.arg if item.opcode in _FLAGGED else ''}"


_JUMPS = {*dis.hasjrel, *dis.hasjabs}
_FLAGGED = {dis.opmap[name] for name in ("BINARY_OP", "COMPARE_OP") if name in dis.opmap}


def constant(value: Any) -> str:
    """A constant of a code object as text: typed, and sets in one order."""
    if isinstance(value, CodeType):
        return "{" + bytecode(value) + "}"
    if isinstance(value, tuple):
        return "(" + ",".join(map(constant, value)) + ")"
    if isinstance(value, frozenset):
        return "set(" + ",".join(sorted(map(constant, value))) + ")"
    if isinstance(value, slice):
        return "slice" + constant((value.start, value.stop, value.step))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"int {value:x}"
    return f"{type(value).__name__} {value!r}"
