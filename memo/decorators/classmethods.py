"""Class methods: give a cached function inside `@classmethod` its class.

Up to Python 3.12 a classmethod binds the object that it wraps, so that `C.load.refresh(1)` gets the
class.  Since 3.13 it creates a plain method, which passes the class on when it is called, but not
when an attribute is accessed.  So a cached function that is created in a class body leaves a note
there; when the class is created, the note binds the function and is removed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

UNBOUND: Final = sys.version_info >= (3, 13)
"""True if a classmethod binds its function as a plain method."""
NOTE_ATTRIBUTE: Final = "__memo_note__"
"""The attribute that holds the note in a class body."""
_MAX_SEARCHED_FRAMES: Final = 16
"""Maximum number of stack frames that are searched for a class body, since decorators may call each
other."""


class Note:
    """A placeholder in a class body until the class exists.

    Attributes:
        functions: the cached functions created in the body, each with a callable that binds it.
    """

    def __init__(self) -> None:
        self.functions: list[tuple[Any, Callable[[], None]]] = []

    def __set_name__(self, owner: type, name: str) -> None:
        if vars(owner).get(name) is self:
            delattr(owner, name)
        for attribute, value in list(vars(owner).items()):
            if type(value) is classmethod:
                self._bind(owner, attribute, value.__func__)

    def _bind(self, owner: type, attribute: str, held: Any) -> None:
        for function, bind in self.functions:
            if function is held:
                bind()
                setattr(owner, attribute, function)


def bind_later(made: Any, bind: Callable[[], None], function: Callable[..., Any]) -> None:
    """Bind a cached function to its class later, if it is under `@classmethod` in a class body.

    Args:
        made: the cached function.
        bind: turns it into a class method.
        function: the function that it caches; its qualified name identifies the class body.
    """
    outer = getattr(function, "__qualname__", "").rpartition(".")[0]
    if not UNBOUND or not outer or outer.endswith("<locals>"):
        return
    body = _class_body(outer)
    if body is not None:
        body.setdefault(NOTE_ATTRIBUTE, Note()).functions.append((made, bind))


def in_class_body() -> bool:
    """True if the body of a class is running, and the caller is called from there."""
    return _class_body() is not None


def _class_body(name: str | None = None) -> Any:
    """Return the namespace of a class whose body is running, or None.

    Args:
        name: the qualified name of the class; None: any class.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MAX_SEARCHED_FRAMES):
        if frame is None:
            return None
        optimized = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # the frame of a function
        running = None if optimized else frame.f_locals.get("__qualname__")
        if running is not None and name in (None, running):
            return frame.f_locals
        frame = frame.f_back
    return None
