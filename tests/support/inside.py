"""What a cached function is made of: the one place where tests look inside it."""

from typing import Any

from memo.engine.call import Function


def inside(function: Any) -> Function:
    """What the engine knows of a cached function."""
    made: Function = function._function
    return made
