"""Modes: let the calls of a context use the cache in another way than usual.

A mode is kept in a context variable, so that other tasks and threads are not affected.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any, Final, Literal, get_args

from memo.errors import OptionError, nearest_hint, public
from memo.runtime.named_tuple import NamedTuple
from memo.settings import durations
from memo.settings.durations import seconds

Kind = Literal["refresh", "off", "only"]
REFRESH: Final = "refresh"
OFF: Final = "off"
ONLY: Final = "only"
MODE_KINDS: Final[tuple[str, ...]] = get_args(Kind)


class Mode(NamedTuple):
    """The mode in which calls use the cache.

    Attributes:
        kind: `"refresh"`: compute and store; `"off"`: neither read nor store; `"only"`: never
            compute; None: the default.
        max_age: seconds; older entries are not used.
    """

    kind: str | None = None
    max_age: float | None = None

    def over(self, outer: Mode | None) -> Mode:
        """Return this mode within another one, which sets what this one leaves open."""
        if outer is None:
            return self
        return Mode(
            outer.kind if self.kind is None else self.kind,
            outer.max_age if self.max_age is None else self.max_age,
        )


def check_mode(kind: Any, max_age: Any) -> Mode:
    """Return the mode for these arguments of a caller.

    Raises:
        OptionError: there is no such mode, or the age is not a duration.
    """
    if kind is not None and (not isinstance(kind, str) or kind not in MODE_KINDS):
        near = nearest_hint(kind, MODE_KINDS) if isinstance(kind, str) else ""
        listed = ", ".join(f'"{one}"' for one in MODE_KINDS)
        raise OptionError("mode", kind, f"the modes are {listed}{near}")
    return Mode(kind, None if max_age is None else seconds("max_age", max_age))


CURRENT_MODE: ContextVar[Mode | None] = ContextVar("memo_mode", default=None)


class mode:  # noqa: N801 - a context manager, which reads as one
    """Change how the calls of a `with` block, and everything that they call, use the cache.

    ::

        with memo.mode("refresh"):
            report()

    Args:
        mode: `"refresh"`: compute and store; `"off"`: neither read nor store; `"only"`: never
            compute, but raise `NotCachedError` with the explanation; None: the default.
        max_age: a duration (`"1m"`); older entries are not used, even within their ttl.

    Raises:
        OptionError: there is no such mode, or the age is not a duration.
    """

    @public
    def __init__(
        self, mode: Kind | None = None, max_age: float | str | durations.timedelta | None = None
    ) -> None:
        self._mode = check_mode(mode, max_age)
        self._tokens: list[Token[Mode | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(CURRENT_MODE.set(self._mode.over(CURRENT_MODE.get())))

    def __exit__(self, *_: object) -> None:
        CURRENT_MODE.reset(self._tokens.pop())
