"""Everything that memo raises, and nothing else.

::

    MemoError
    ├── OptionError        (ValueError, TypeError)   a bad option of a decorator or of a call
    ├── SettingError       (ValueError)              a bad setting, with where it came from
    │   └── SecretError                              a secret that cannot be trusted
    ├── BundleError        (ValueError)              not a bundle, or not one to be trusted
    ├── KeyingError        (TypeError)               an argument that has no sound key
    ├── ReentryError       (RecursionError)          a computation that waits for itself
    ├── EventLoopError     (RuntimeError)            an async call where asyncio does not run
    ├── DependencyError    (FileNotFoundError)       a `depends_on` callable raised
    ├── NothingMatchedError (LookupError)            an invalidation with `strict=True` hit nothing
    ├── NotCachedError     (LookupError)             a call in mode "only" has no entry
    ├── MissingExtraError  (ImportError)             an optional package that is not installed
    ├── EntryError                                   a stored entry that must not be believed
    └── TierError                                    a tier that failed
        └── TierUnavailable                          a tier that cannot be reached

The first ten reach the caller, since the caller made the mistake.  `EntryError` and `TierError`
are faults of the cache: the engine turns them into an event and a fall-through.
"""

from __future__ import annotations

import errno
import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=BaseException)


class MemoError(Exception):
    """The root of all errors of memo."""


class OptionError(MemoError, ValueError, TypeError):
    """An option has a wrong value or a wrong type.

    Args:
        option: the name of the option.
        value: the given value.
        fix: what to write instead, as the rest of a sentence.
    """

    def __init__(self, option: str, value: object, fix: str) -> None:
        super().__init__(f"{option}={shown(value)}: {fix}")
        self.option = option
        self.value = value
        self.fix = fix


class SettingError(MemoError, ValueError):
    """A setting has a wrong value; the message names the setting, its source and the fix."""

    def __init__(self, setting: str, source: str, fix: str) -> None:
        super().__init__(f"setting {setting!r} (from {source}): {fix}")
        self.setting = setting
        self.source = source
        self.fix = fix


class SecretError(SettingError):
    """The secret is too short, readable by others, or not a plain file of this user."""


class BundleError(MemoError, ValueError):
    """A file is not a bundle, needs its key, was sealed with another one, or was changed."""


class KeyingError(MemoError, TypeError):
    """An argument has no sound key; the message names function, path, type and fix."""


class ReentryError(MemoError, RecursionError):
    """A cached computation asked for its own result, and so would wait for itself forever."""


class EventLoopError(MemoError, RuntimeError):
    """An async function or helper of memo was awaited where no event loop of asyncio runs."""


class DependencyError(MemoError, FileNotFoundError):
    """A callable that a function depends on (`depends_on`) raised, or a URL is malformed."""


class NothingMatchedError(MemoError, LookupError):
    """An invalidation with `strict=True` matched no entry.

    Attributes:
        outcome: the result it would have returned; the invalidation was carried out nevertheless.
    """

    def __init__(self, outcome: object) -> None:
        super().__init__(str(outcome))
        self.outcome = outcome


class NotCachedError(MemoError, LookupError):
    """A call in the mode `"only"` has no entry that could answer it.

    Attributes:
        explanation: the reason, as returned by `explain`.
    """

    def __init__(self, explanation: object) -> None:
        super().__init__(str(explanation))
        self.explanation = explanation


class MissingExtraError(MemoError, ImportError):
    """A feature needs an optional package; the message has the install command."""


class EntryError(MemoError):
    """A stored entry must not be used: damaged, forged, foreign, or of another format.

    Args:
        reason: one of the miss reasons of `runtime.reasons`, for instance `"unreadable"`.
        detail: what exactly was wrong, without any stored value.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class TierError(MemoError):
    """A tier failed: an error reply, a full disk, a damaged index.

    Attributes:
        kind: one word for the fault, such as the code of an error reply; `""`: unknown.
        detail: the message of the server or of the operating system.
    """

    kind = ""
    detail = ""


class TierUnavailable(TierError):
    """A tier cannot be reached: refused, silent past its deadline, or its breaker is open.

    Attributes:
        reported: an event has already reported it, when the outage began.
    """

    def __init__(self, message: str, *, reported: bool = False) -> None:
        super().__init__(message)
        self.reported = reported


def described(error: BaseException) -> str:
    """Return an error as text: its type and its message."""
    return f"{type(error).__name__}: {error}"


def file_fault(what: str, error: OSError) -> TierError:
    """Return the `TierError` for a file that cannot be used; it names the content, not the path."""
    return TierError(f"{what}: {type(error).__name__}: {error.strerror}")


def shown(value: object, limit: int = 80) -> str:
    """Return a short, safe text of a value for an error message: at most `limit` characters."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return shortened(text, limit)


def shortened(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters, with `…` in place of what is cut off."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def encodable(text: str) -> str:
    r"""Return a text with lone surrogates, which cannot be encoded, written as `\ud800`."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def type_named(kind: type) -> str:
    """Return the name of a type with its article: `an int`, `a list`."""
    return f"{'an' if kind.__name__[:1].lower() in set('aeiou') else 'a'} {kind.__name__}"


_FOLDER_DIGEST = r"~[0-9a-f]+(?=:)"


def label(function: str) -> str:
    """Return the readable name of a function: `load`, `etl:load`, `tour.ipynb:load`.

    This is its id without `__main__:` and without the digest that tells apart notebooks of the
    same name in different directories.
    """
    return re.sub(_FOLDER_DIGEST, "", function, count=1).removeprefix("__main__:")


def nearest_hint(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean 'ttl'?` if one of some names is close to a wrong one, else `""`."""
    import difflib  # needed only for an error

    known = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), known, 1, cutoff=0.6)
    return f"; did you mean {known[found[0]]!r}?" if found else ""


def cut_to_user_frames(error: E) -> E:
    """Cut a traceback so that it begins at the user's first frame, if it has one.

    A bare `raise` after it adds no frame of memo.
    """
    return error.with_traceback(_users_frames(error) or error.__traceback__)


def _users_frames(error: BaseException) -> TracebackType | None:
    frames = error.__traceback__
    while (
        frames is not None
        and frames.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _HIDDEN_PACKAGES
    ):
        frames = frames.tb_next
    return frames


_HIDDEN_PACKAGES = frozenset({"memo", "asyncio", "concurrent"})
"""Packages whose frames are hidden; the last two wait for work that runs elsewhere."""


def at_the_call(error: E) -> E:
    """Cut the traceback of an error that a public function raises; see `cut_to_user_frames`.

    If no frame is the user's, a mistake in the call is shown without any of memo's frames, and any
    other error keeps them all.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if _is_argument_error(last) or isinstance(error, MemoError):
        return error.with_traceback(_users_frames(error))
    return cut_to_user_frames(error)


def _is_argument_error(last: TracebackType | None) -> bool:
    """True if the arguments did not fit: memo was binding them, or passing them on."""
    if last is None or last.tb_frame.f_globals.get("__name__", "").partition(".")[0] != "memo":
        return False
    return last.tb_frame.f_code.co_name in ("_raise_misfit", "called", "awaited")


class ending_at_the_call:  # noqa: N801 - a context manager, which reads as one
    """Let the tracebacks of errors end at the line that called a public function."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None:
            at_the_call(error)
            if isinstance(error, MemoError):
                error.__suppress_context__ = True


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Let the traceback of an error end at the line that called a public function.

    It then shows the mistake instead of memo's own frames.  An unknown option is an `OptionError`
    that names the nearest one.
    """

    @functools.cache
    def names() -> list[str] | None:
        parameters = inspect.signature(function).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return None
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return [parameter.name for parameter in parameters if parameter.kind in named]

    def check(given: Mapping[str, object]) -> None:
        known = names()
        wrong = None if known is None else next((name for name in given if name not in known), None)
        if known is not None and wrong is not None:
            there = nearest_hint(wrong, known) or f"; there are: {', '.join(known)}."
            raise OptionError(wrong, given[wrong], f"there is no such option{there}")

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True
        with ending_at_the_call():
            if kwargs:
                check(kwargs)
            return function(*args, **kwargs)

    @functools.wraps(function)
    async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
        __tracebackhide__ = True
        with ending_at_the_call():
            if kwargs:
                check(kwargs)
            return await cast("Awaitable[Any]", function(*args, **kwargs))

    return cast("Callable[P, R]", awaited) if inspect.iscoroutinefunction(function) else called


_OUT_OF_RESOURCES = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN}
)


def lacks_resources(error: BaseException | None) -> bool:
    """True if an error, or its cause, says that the process has run out of a resource.

    No descriptor, thread or memory is left, the interpreter is shutting down and cannot import a
    module, or memo was reinstalled and one of its modules is missing.
    """
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").partition(".")[0] == __package__
    if isinstance(error, MissingExtraError):
        return False
    if isinstance(error, MemoError):
        return lacks_resources(error.__cause__ or error.__context__)
    if isinstance(error, OSError):
        return error.errno in _OUT_OF_RESOURCES
    late = type(error) is RuntimeError and str(error).startswith("can't ")
    return late or isinstance(error, (ImportError, MemoryError))
