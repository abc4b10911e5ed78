"""Tell what a call of a function returns: a value, an awaitable, a generator or an async one.

The outermost function that is an `async def` or a generator function decides.  A plain `def` around
one (`functools.wraps`) usually returns what the function inside returns; its source tells if it
returns something else, such as `asyncio.run(function(...))` or `list(function(...))`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import ast

ASYNC: Final = "async"
GENERATOR: Final = "generator"
ASYNC_GENERATOR: Final = "async generator"
PLAIN: Final = ""
_MAX_LAYERS: Final = 100
"""Maximum number of decorators and partials around a function that are looked through."""


def kind_of(function: Any) -> str:
    """Return what a call returns: `ASYNC`, `GENERATOR`, `ASYNC_GENERATOR`, else `PLAIN`."""
    layer: Any = function
    for _ in range(_MAX_LAYERS):
        own = _own_kind(layer)
        if own:
            return own
        if isinstance(layer, functools.partial):
            layer = layer.func
        else:
            inner: Any = getattr(layer, "__wrapped__", None)
            if inner is None or not _returns_result_of(inner, layer):
                break
            layer = inner
    return PLAIN


def _own_kind(function: Any) -> str:
    """Return the kind of a function, or of the `__call__` of an object."""
    called = (function,) if inspect.isroutine(function) else (function, type(function).__call__)
    for one in called:
        if inspect.iscoroutinefunction(one):
            return ASYNC
        if inspect.isasyncgenfunction(one):
            return ASYNC_GENERATOR
        if inspect.isgeneratorfunction(one):
            return GENERATOR
    return PLAIN


def _returns_result_of(inner: Any, wrapper: Any) -> bool:
    """True if a wrapper returns what the function inside returns; also if nothing tells."""
    if getattr(wrapper, "__globals__", None) is vars(contextlib):  # it returns a context manager
        return False
    called = _variables_with(inner, wrapper) if inspect.isfunction(wrapper) else set()
    node = _source_node(wrapper) if called else None
    return node is None or _returns_a_call(node, called)


def _variables_with(inner: Any, wrapper: Any) -> set[str]:
    """Return the names of the captured variables of a wrapper that hold the function inside."""
    found = set()
    for name, cell in zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # the variable is not set yet
            if cell.cell_contents is inner:
                found.add(name)
    return found


def _source_node(function: Any) -> ast.FunctionDef | None:
    """Return the parsed source of a `def`; None if there is none."""
    import ast
    import textwrap

    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(function.__code__))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return body[0] if len(body) == 1 and isinstance(body[0], ast.FunctionDef) else None


def _returns_a_call(node: ast.FunctionDef, called: set[str]) -> bool:
    """True if a `def` returns the result of a call of one of these names; also if it calls none."""
    import ast

    own = list(_own_nodes(node))
    for one in own:  # `async def run(): return await function()` stands for the function
        if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef)) and _mentions(one, called):
            called = called | {one.name}

    def is_call(value: Any) -> bool:
        function = value.func if isinstance(value, ast.Call) else None
        return isinstance(function, ast.Name) and function.id in called

    if not any(map(is_call, own)):
        return True
    assigned = [
        (target.id, one.value)
        for one in own
        if isinstance(one, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and one.value is not None
        for target in (one.targets if isinstance(one, ast.Assign) else [one.target])
        if isinstance(target, ast.Name)
    ]
    changed = {name for name, value in assigned if _mentions(value, {name})}
    results = {n for n, value in assigned if any(map(is_call, _possible_values(value)))} - changed
    returned = [value for one in own if isinstance(one, ast.Return) and (value := one.value)]
    return any(
        is_call(value) or (isinstance(value, ast.Name) and value.id in results)
        for whole in returned
        for value in _possible_values(whole)
    )


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those inside its inner functions."""
    import ast

    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _own_nodes(child)


def _mentions(node: ast.AST, names: set[str]) -> bool:
    import ast

    return any(isinstance(one, ast.Name) and one.id in names for one in ast.walk(node))


def _possible_values(node: ast.expr) -> Iterator[ast.expr]:
    """Yield the expressions of which one is the value of this one."""
    import ast

    if isinstance(node, ast.IfExp):
        yield from (*_possible_values(node.body), *_possible_values(node.orelse))
    elif isinstance(node, ast.BoolOp):
        for one in node.values:
            yield from _possible_values(one)
    elif isinstance(node, ast.NamedExpr):
        yield from _possible_values(node.value)
    else:
        yield node
