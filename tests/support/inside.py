"""The one place where tests look inside a cached function."""

from typing import Any

from memo.engine.call import Function


def inside(function: Any) -> Function:
    """The engine's record of a cached function."""
    made: Function = function._function
    return made
