"""Normalize code objects to text.

Rules of this module:

1.  The text of a function is its source without decorators, docstrings, comments and layout: parsed
    and unparsed.  A source is used only if compiling it gives this very code object (or an
    equivalent one), since a file may have been edited after it was imported.
2.  Without such a source (`exec`, frozen code, rewritten asserts) the text is the bytecode with
    every operand written by value and type: no line numbers, no file name, no docstring.
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
from memo.keys.fingerprint.names_used import FilledNames, Path, Use, instructions
from memo.runtime import fork
from memo.runtime.named_tuple import NamedTuple


class Code(NamedTuple):
    """The normalized text of a code object, and the names that it uses.

    Attributes:
        text: normalized source, or bytecode.
        source: `text` is source.
        uses: sorted, without duplicates.
        assigned: uses that the code rebinds.
        filled: dotted names of counters and containers that the code only fills.
        items: each use that is subscripted or called with a string, with that string.
        names: every name and attribute that the code mentions.
        changed: names that it assigns, sets or fills in any way.
        read: the names of attributes that it reads, of any object.
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


CODE_CACHE: dict[int, tuple[weakref.ref[CodeType], Code]] = {}
"""Code objects by address, since two of them may be equal and yet have different sources."""


def read(code: CodeType, namespace: dict[str, Any]) -> Code:
    """Normalize a code object, once for each.

    Args:
        code: the code of a function or a lambda.
        namespace: the globals of the function, through which a loader may provide its source.
    """
    at = id(code)
    known = CODE_CACHE.get(at)
    if known is not None and known[0]() is code:
        return known[1]
    found = _read(code, namespace)
    CODE_CACHE[at] = (weakref.ref(code, lambda gone: _forget(at, gone)), found)
    return found


def _forget(at: int, gone: weakref.ref[CodeType]) -> None:
    known = CODE_CACHE.get(at)
    if known is not None and known[0] is gone:
        del CODE_CACHE[at]


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


def _fills(code: CodeType) -> FilledNames:
    """Find the filled names without source: every name, if the code sets items of anything."""
    sets = any(i.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") for i in instructions(code))
    inner = [_fills(part) for part in code.co_consts if isinstance(part, CodeType)]
    every = frozenset((*code.co_names, *code.co_freevars))
    names = (every if sets else frozenset()).union(*(one.names for one in inner))
    return FilledNames(frozenset(), names, every.union(*(one.read for one in inner)))


# --- source ---------------------------------------------------------------------------------------

_Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_FUTURES = functools.reduce(
    lambda flags, name: flags | getattr(future, name).compiler_flag, future.all_feature_names, 0
)
_MAX_PARSED_SOURCES = 64
"""Source files whose parse is kept; a notebook with more cells parses the oldest again."""
_PARSE_ATTEMPTS = 100
"""Number of times a source is parsed if another thread's parsing interferes."""


class _Index(NamedTuple):
    codes: dict[tuple[str, int], list[CodeType]]
    nodes: dict[tuple[str, int], list[_Node]]


def source_node(code: CodeType, namespace: dict[str, Any]) -> _Node | None:
    """Return the syntax tree of a code object; None if no source compiles to it."""
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, namespace)
    if not lines:
        return None
    source, flags = "".join(lines), code.co_flags & _FUTURES
    return _find(code, index_of(source, flags)) or _find(code, index_of(_unparsed(source), flags))


def _find(code: CodeType, index: _Index | None) -> _Node | None:
    if index is None:
        return None
    twin = _matching_code(code, index)
    return None if twin is None else _node(twin, index)


_parsing = threading.Lock()
fork.in_child(_parsing._at_fork_reinit)  # type: ignore[attr-defined]


def _parse(source: str) -> ast.Module:
    """Like `ast.parse`, but safe while other threads parse.

    In older releases of Python 3.11 and 3.12 its recursion counter is shared by threads: one sees
    the count of another, and raises SystemError (python/cpython#106905).
    """
    with _parsing:
        for _ in range(_PARSE_ATTEMPTS - 1):
            try:
                return ast.parse(source)
            except SystemError:  # a thread outside of memo is parsing
                continue
        return ast.parse(source)


@functools.lru_cache(maxsize=_MAX_PARSED_SOURCES)
def _unparsed(source: str) -> str:
    """Return a source as `ast.unparse` writes it, which `%autoreload` compiles."""
    try:
        return ast.unparse(_parse(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""


@functools.lru_cache(maxsize=_MAX_PARSED_SOURCES)
def index_of(source: str, flags: int) -> _Index | None:
    """Return the functions of a source by their position; None if it cannot be parsed."""
    try:
        tree = _parse(source)
        flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        module = compile(tree, "<source>", "exec", flags=flags, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    index = _Index({}, {})
    for found in _codes(module):
        index.codes.setdefault((found.co_name, found.co_firstlineno), []).append(found)
    for node in ast.walk(tree):
        if isinstance(node, _Node):
            index.nodes.setdefault(_position(node), []).append(node)
    return index


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _position(node: _Node) -> tuple[str, int]:
    if isinstance(node, ast.Lambda):
        return "<lambda>", node.lineno
    return node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])


def _matching_code(code: CodeType, index: _Index) -> CodeType | None:
    """Return the code object of a source that equals this one, or else an equivalent one."""
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
    """True if all positions of a code object are inside a node."""
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
        text = ast.unparse(_DocstringRemover().visit(node))
    except (ValueError, RecursionError):  # an f-string that cannot be unparsed, or deep nesting
        return None
    return text + "\n# asserts off" if sys.flags.optimize and _asserts(node) else text


def _asserts(node: _Node) -> bool:
    """True if `python -O` changes what the code does."""
    return any(
        isinstance(part, ast.Assert) or (isinstance(part, ast.Name) and part.id == "__debug__")
        for part in ast.walk(node)
    )


class _DocstringRemover(ast.NodeTransformer):
    """Removes docstrings and other string statements, and the `u` prefix of strings."""

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

_KIND_FLAGS = 0x04 | 0x08 | 0x20 | 0x80 | 0x100 | 0x200
"""`*args`, `**kwargs`, generator, coroutine, iterable coroutine, async generator."""
_UNREAD = {"__doc__", "__firstlineno__"}


def bytecode(code: CodeType) -> str:
    """Return the bytecode of a code object as text, independent of its position and layout."""
    kept = _kept_instructions(code)
    places = {item.offset: at for at, item in enumerate(kept)}
    places.update(_targets(code, kept))
    lines = [
        (
            f"code {code.co_name} {code.co_argcount} {code.co_posonlyargcount}"
            f" {code.co_kwonlyargcount} {code.co_flags & _KIND_FLAGS} {code.co_varnames}"
            f" {code.co_cellvars} {code.co_freevars}"
        )
    ]
    lines += [_line(item, places) for item in kept]
    for entry in getattr(dis.Bytecode(code), "exception_entries", ()):
        ends = [places.get(at, len(kept)) for at in (entry.start, entry.end, entry.target)]
        lines.append(f"except {ends} {entry.depth} {entry.lasti}")
    return "\n".join(lines)


def _kept_instructions(code: CodeType) -> list[dis.Instruction]:
    kept: list[dis.Instruction] = []
    for item in instructions(code):
        if item.opname == "STORE_NAME" and item.argval in _UNREAD and kept:
            kept.pop()
        else:
            kept.append(item)
    return kept


def _targets(code: CodeType, kept: list[dis.Instruction]) -> dict[int, int]:
    """Map every offset to the ordinal of the first kept instruction at or after it."""
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
    """Return a constant of a code object as text: typed, and sets in one order."""
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
