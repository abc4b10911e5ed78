"""Options of `cache`, checked at decoration; each error names the option, its value and the fix."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from memo.errors import OptionError
from memo.runtime.clock import SECOND
from memo.runtime.named_tuple import NamedTuple
from memo.settings import function_kinds
from memo.settings.durations import seconds

DEFAULT_THRESHOLD = 0.8


INHERIT = "inherit"
"""A ttl: as long as the shortest-lived cached result that an entry was built on."""


class Policy(NamedTuple):
    """The rules by which a function's entries age; checked at decoration.

    Attributes:
        ttl: seconds, None for no expiry, a callable that returns either from the result, or
            `INHERIT`.
        use_jitter: shorten each ttl by up to `TTL_JITTER`.
        refresh_ahead: after `refresh_threshold * ttl` a hit also starts a refresh.
        refresh_threshold: fraction of the ttl, in (0, 1).
        stale_while_revalidate: seconds past the ttl in which the old value is served and refreshed.
        stale_if_error: seconds past the ttl in which the old value is served if computing raises.
        use_lock: compute a key only once across processes and hosts.
        lock_timeout: longest wait for another process, in seconds; None: as long as that one lives.
        ttl_key: key in the live configuration that overrides `ttl`.
        cache_if: predicate of the result; if False, it is returned but not stored.
        retry_after: seconds after a failure in which an old value is served without another try.
        max_age: seconds; older entries are not used, even within their ttl and stale windows.
        soft_timeout: seconds after which an old value is served while the computation goes on; 0:
            never.
        errors: exception types that are stored, each with its ttl in seconds or None.
    """

    ttl: float | Callable[[Any], Any] | str | None = 60.0
    use_jitter: bool = False
    refresh_ahead: bool = False
    refresh_threshold: float = DEFAULT_THRESHOLD
    stale_while_revalidate: float = 0.0
    stale_if_error: float = 0.0
    use_lock: bool = False
    lock_timeout: float | None = 30.0
    ttl_key: str | None = None
    cache_if: Callable[[Any], bool] | None = None
    max_age: float | None = None
    retry_after: float = 0.0
    soft_timeout: float = 0.0
    errors: tuple[tuple[type[Exception], float | None], ...] = ()

    @property
    def of_errors(self) -> Policy:
        """Return how stored exceptions age.

        By the ttl that each was stored with, and never stale.
        """
        return Policy(ttl=None, max_age=self.max_age)

    def error_ttl(self, error: BaseException) -> int | None:
        """Return the nanoseconds for which an exception is stored; -1: no expiry, None: not at all.

        The nearest type in its method resolution order counts, that is the most specific one.
        """
        known = dict(self.errors)
        kind = next((kind for kind in type(error).__mro__ if kind in known), None)
        if kind is None:
            return None
        ttl = known[kind]
        return -1 if ttl is None else max(1, int(ttl * SECOND))

    @property
    def grace(self) -> float:
        """Seconds past the ttl for which an entry is worth keeping."""
        return max(self.stale_while_revalidate, self.stale_if_error)


def policy(
    *,
    ttl: Any,
    use_jitter: bool,
    use_lock: bool,
    lock_timeout: Any,
    refresh_ahead: bool,
    refresh_threshold: float | None,
    ttl_key: str | None,
    stale_while_revalidate: Any,
    stale_if_error: Any,
    cache_if: Callable[[Any], bool] | None,
    retry_after: Any,
    soft_timeout: Any,
    cache_errors: Any,
) -> Policy:
    """Return the policy that these options describe.

    Raises:
        OptionError: an option is wrong, or two of them contradict each other.
    """
    if refresh_threshold is not None and not refresh_ahead:
        raise OptionError("refresh_threshold", refresh_threshold, "needs refresh_ahead=True.")
    if ttl is None and refresh_ahead and ttl_key is None:
        raise OptionError("refresh_ahead", True, "needs a ttl: without one nothing ever ages.")
    pause, window = (_window("retry_after", retry_after), _window("stale_if_error", stale_if_error))
    if pause and not window:
        fix = "needs stale_if_error, which keeps the old value to answer with."
        raise OptionError("retry_after", retry_after, fix)
    soft = _window("soft_timeout", soft_timeout)
    if soft and not window:
        fix = "needs stale_if_error, which keeps the old value to answer with."
        raise OptionError("soft_timeout", soft_timeout, fix)
    return Policy(
        ttl=given_ttl("ttl", ttl),
        use_jitter=flag("use_jitter", use_jitter),
        refresh_ahead=flag("refresh_ahead", refresh_ahead),
        refresh_threshold=_threshold(refresh_threshold),
        stale_while_revalidate=_window("stale_while_revalidate", stale_while_revalidate),
        stale_if_error=window,
        use_lock=flag("use_lock", use_lock),
        lock_timeout=seconds("lock_timeout", lock_timeout, zero=True),
        ttl_key=text("ttl_key", ttl_key),
        cache_if=_predicate("cache_if", cache_if),
        retry_after=pause,
        soft_timeout=soft,
        errors=_errors("cache_errors", cache_errors),
    )


def _errors(option: str, value: Any) -> tuple[tuple[type[Exception], float | None], ...]:
    """Return the exception types, each with its ttl in seconds or None."""
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise OptionError(option, value, 'must be a mapping such as {KeyError: "5m"}.')
    for kind in value:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise OptionError(option, value, f"{kind!r} is not an exception type.")
        if not issubclass(kind, Exception):
            fix = f"{kind.__name__} ends programs or tasks, so it is never stored."
            raise OptionError(option, value, fix)
    return tuple((kind, seconds(f"{option}[{kind.__name__}]", ttl)) for kind, ttl in value.items())


def given_ttl(option: str, value: Any) -> Any:
    """Return a ttl in seconds, None for no expiry, a callable of the result, or `INHERIT`."""
    if value == INHERIT and isinstance(value, str):
        return value
    return _of_result(option, value) if callable(value) else seconds(option, value)


def _threshold(value: Any) -> float:
    if value is None:
        return DEFAULT_THRESHOLD
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 < value < 1:
        raise OptionError(
            "refresh_threshold", value, "must be a fraction of the ttl between 0 and 1, like 0.8."
        )
    return float(value)


def _window(option: str, value: Any) -> float:
    number = seconds(option, value, zero=True, fix="0 turns it off")
    if number is None:
        raise OptionError(option, value, "must be seconds past the ttl; 0 turns it off.")
    return number


def flag(option: str, value: Any) -> bool:
    """Check that the value is True or False."""
    if not isinstance(value, bool):
        raise OptionError(option, value, "must be True or False.")
    return value


MAX_FUNCTION_NAME_CHARACTERS = 1000
"""Maximum length in characters of a name that is given to a function."""


def text(option: str, value: Any, longest: int | None = None) -> str | None:
    """Check that the value is a text that is not empty, or None."""
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise OptionError(option, value, "must be a text that is not empty.")
    if longest is not None and len(value) > longest:
        fix = f"has {len(value):,} characters; write at most {longest:,}."
        raise OptionError(option, value, fix)
    return value


def texts(option: str, value: Any) -> tuple[str, ...]:
    """Check that the value is a list of texts; a single text, a common mistake, is an error."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        example = value if isinstance(value, str) and value else "a"
        raise OptionError(option, value, f'must be a list of texts, for instance ["{example}"].')
    many = tuple(value)
    for one in many:
        if not isinstance(one, str) or not one:
            raise OptionError(option, value, f"must be a list of strings; {one!r} is not one.")
    return many


_SIZE_PATTERN = r"(?ai)(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]i?b|b)?"
_SIZE_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def size(value: Any) -> int | None:
    """Return bytes, from a number or from text such as `"10GiB"`; None if it is neither."""
    if isinstance(value, str) and (found := re.fullmatch(_SIZE_PATTERN, value.strip())):
        number, unit = found.groups()
        return int(float(number) * _SIZE_UNITS[(unit or "b").lower()])
    return value if isinstance(value, int) and not isinstance(value, bool) else None


COMPRESSED_FROM_BYTES = 64 * 1024
"""Bytes from which `compress=True` compresses; smaller results load faster uncompressed."""


def compress(option: str, value: Any) -> int | None:
    """Return the bytes from which results are compressed, from True, False or a size; None: never.

    Raises:
        OptionError: it is something else.
    """
    if isinstance(value, bool):
        return COMPRESSED_FROM_BYTES if value else None
    number = size(value)
    if number is None or number <= 0:
        fix = 'must be True, False, or the size from which results are compressed, like "1MiB".'
        raise OptionError(option, value, fix)
    return number


def _predicate(option: str, value: Any) -> Any:
    if value is None:
        return None
    if not callable(value):
        raise OptionError(option, value, "must be a function of the result.")
    return _of_result(option, value)


def _of_result(option: str, value: Callable[..., Any]) -> Any:
    """Check that the value is a plain function that takes the result."""
    if is_async(value):
        raise OptionError(option, value, "must not be async: it is asked before storing.")
    try:
        inspect.signature(value).bind(None)
    except TypeError:
        raise OptionError(option, value, "must take one argument, the result.") from None
    except ValueError:  # written in C: errors show when it is called
        pass
    return value


def is_async(function: Any) -> bool:
    """True if a call returns an awaitable: `async def`, a partial of one, or such a `__call__`."""
    return function_kinds.kind_of(function) == function_kinds.ASYNC


def function(
    option: str,
    value: Any,
    *,
    generators: bool = True,
    example: str = "@cache or @cache(ttl=60)",
) -> Callable[..., Any]:
    """Check the function that is decorated.

    Args:
        option: the name to use in the error.
        value: the decorated object.
        generators: it may be a generator function.
        example: how the decorator is written.

    Raises:
        OptionError: it is not callable, or a generator function where that is not allowed.
    """
    refuse_property(value)
    if not callable(value):
        raise OptionError(option, value, f"must be a function; write {example}.")
    if not generators and generator_kind(value):
        fix = "is a generator function, which has not run when it returns; decorate its caller."
        raise OptionError(option, value, fix)
    made: Callable[..., Any] = value
    return made


def refuse_property(value: Any) -> None:
    """Refuse a property in place of a function, naming the order that works."""
    if isinstance(value, (property, functools.cached_property)):
        kind = type(value).__name__
        fix = f"must be a function, and is a {kind}: write @{kind} above @cache."
        raise OptionError("function", value, fix)


def generator_kind(function: Any) -> str:
    """Return `"sync"` or `"async"` for a generator function, else `""`."""
    return _GENERATOR_KINDS.get(function_kinds.kind_of(function), "")


_GENERATOR_KINDS = {function_kinds.GENERATOR: "sync", function_kinds.ASYNC_GENERATOR: "async"}


def check_names(option: str, names: Sequence[str], allowed: Iterable[str]) -> None:
    """Check that every name is one of `allowed`."""
    pool = tuple(allowed)
    for name in names:
        if name not in pool:
            raise OptionError(
                option, name, f"is not an argument here; the arguments are {', '.join(pool)}."
            )


def refuse_whole_keywords(option: str, value: Any, name: str, extra: str) -> None:
    """Refuse the name of `**kwargs` itself (`extra`): its keywords have names of their own."""
    if extra and name == extra:
        fix = (
            f"{name!r} is the ** parameter itself; name the keywords that matter, each by its own "
            f"name, or give a function that takes **{name}."
        )
        raise OptionError(option, value, fix)
