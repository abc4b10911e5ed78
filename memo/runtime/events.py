"""Events: one frozen record per outcome, and the hooks that receive them.

The engine emits them; counters, `%cache_stats`, logs, progress and telemetry are hooks.  Nothing
else counts.  An event never contains a cached value, an argument's value, a secret or a password.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import wraps
from inspect import iscoroutinefunction

from memo.errors import OptionError
from memo.runtime.named_tuple import NamedTuple

HIT = "hit"
"""A stored value was returned and is fresh."""
STALE = "stale"
"""A stored value past its ttl, or past its refresh threshold, was returned; a refresh follows."""
MISS = "miss"
"""No stored value could be used; `reason` says why."""
COMPUTE_STARTED = "compute_started"
COMPUTE_ENDED = "compute_ended"
"""The function begins to run; it has ended, in whatever way.  `reason` is `"refresh"` in the
background. At the end `seconds` is how long it ran itself, without cached calls inside it; `detail`
is the type of the exception that it raised, `INTERRUPTED` if it was cancelled or interrupted."""
INTERRUPTED = "interrupted"
COMPUTED = "computed"
"""The function ran and returned; `seconds` is how long it ran."""
FAILED = "failed"
"""The function ran and raised; `reason` is the type of the exception."""
COALESCED = "coalesced"
"""A caller got the result of a computation that another caller or process had begun; `seconds` is
how long it waited, `saved` how much longer its own computation would have taken."""
REVALIDATED = "revalidated"
"""A stored value was confirmed, since its inputs came back equal (`cutoff`).  `reason` is what put
it in doubt, or `BY_REFRESH`; `seconds` is the time of the check, `saved` how much longer a
computation would have taken."""
BY_REFRESH = "refresh"
"""The reason of an event in a background refresh."""
STORED = "stored"
"""A result was written; `size` in bytes, `tier` names the tiers, `detail` one that follows."""
UPLOAD_STARTED = "upload_started"
UPLOADED = "uploaded"
UPLOAD_FAILED = "upload_failed"
"""The upload of a stored result to a shared tier begins, has ended, or has failed (`detail` says
why); `size` in bytes."""
FETCH_STARTED = "fetch_started"
FETCHED = "fetched"
FETCH_FAILED = "fetch_failed"
"""The download of a big payload from a shared tier begins, has ended, or has failed."""
REFRESH_STARTED = "refresh_started"
REFRESH_DONE = "refresh_done"
REFRESH_FAILED = "refresh_failed"
"""A background refresh began, stored its result, or failed (the old value stays)."""
REFRESHED_ELSEWHERE = "refreshed by another process"
"""The reason of a `REFRESH_DONE` that computed nothing, since another process was doing it."""
REFRESHING, REFRESHED, FAILED_REFRESH = "refreshing", "refreshed", "refresh failed"
"""The states of a refresh, by its last event."""
INVALIDATION = "invalidated"
"""An invalidation; `reason` is the caller's, `detail` names the target."""
REPLAYED = "replayed"
"""A journalled invalidation reached its tier."""
WAITING = "waiting"
WAIT_ENDED = "wait_ended"
"""A caller begins to wait for another process's lease, or stops waiting; `detail` is the holder."""
WAITED = "waited"
"""A caller waited for another process's lease; `seconds` is how long."""
LOCK_TIMEOUT = "lock_timeout"
"""A caller waited `lock_timeout` seconds for another holder, then computed by itself."""
LEASE_LOST = "lease_lost"
"""A lease was lost while its holder was computing."""
TIER_DOWN = "tier_down"
TIER_UP = "tier_up"
"""A tier's breaker opened, or closed again."""
TIER_LOST = "tier_lost"
"""A shared tier came back without its data, or a custom store has none yet; `detail` says what
happens to results."""
RECONFIGURED = "reconfigured"
"""From now on the settings describe another chain."""
ERROR = "error"
"""A fault of the cache, which did not reach the caller; `reason` names its kind."""


class Event(NamedTuple):
    """One outcome of a call: a hit, a miss, an invalidation, a fault.

    Attributes:
        kind: one of the names of this module.
        function: id of the cached function (`"module:qualname"`), or `""`.
        key: the key's text, or `""`.
        tier: name of the tier that answered or failed, or `""`.
        reason: why, such as `"expired"` or `"not cached yet"` for a miss.
        seconds: how long it took; for `HIT` and `STALE` the whole lookup.
        size: bytes of the record and its payload.
        saved: seconds that a computation would have taken, from the entry's recorded cost; 0 if no
            caller waits for the answer.
        detail: more, in words; never a cached value or an argument.
    """

    kind: str
    function: str = ""
    key: str = ""
    tier: str = ""
    reason: str = ""
    seconds: float = 0.0
    size: int = 0
    saved: float = 0.0
    detail: str = ""


Hook = Callable[[Event], None]
_hooks: tuple[Hook, ...] = ()
_lock = threading.Lock()


_running: ContextVar[tuple[Hook, ...]] = ContextVar("memo_running_hooks", default=())
"""The hooks that the current code runs in."""


def on_event(hook: Hook) -> Callable[[], None]:
    """Call `hook(event)` for every event from now on, in the thread in which it happens.

    A hook must be quick and must not block.  One that raises is reported once on standard error and
    is still called; the cached call is not affected.  A hook may call cached functions: it does not
    get the events of its own calls, but other hooks do.

    Args:
        hook: a function that takes one `Event`.

    Returns:
        A function that removes the hook; calling it again does nothing.

    Raises:
        OptionError: the hook is not callable, or it is async.
    """
    if not callable(hook):
        raise OptionError("hook", hook, "must be a function of one event.")
    if iscoroutinefunction(hook) or iscoroutinefunction(type(hook).__call__):
        raise OptionError("hook", hook, "must not be async: nothing would await it.")

    @wraps(hook, assigned=(), updated=())
    def call(event: Event) -> None:
        running = _running.get()
        if call in running:
            return
        token = _running.set((*running, call))
        try:
            hook(event)
        finally:
            _running.reset(token)

    return add_hook(call)


def add_hook(hook: Hook) -> Callable[[], None]:
    """Like `on_event`, for a hook of memo's own that calls no cached function."""
    global _hooks
    with _lock:
        _hooks = (*_hooks, hook)

    def remove() -> None:
        global _hooks
        with _lock:
            _hooks = tuple(h for h in _hooks if h is not hook)

    return remove


_reported_hooks: set[int] = set()


def emit(event: Event) -> None:
    """Pass an event to every hook."""
    for hook in _hooks:
        try:
            hook(event)
        except Exception as error:
            if id(hook) not in _reported_hooks:
                _reported_hooks.add(id(hook))
                with suppress(Exception):  # standard error may be closed, and `repr` may raise
                    own = getattr(hook, "__wrapped__", hook)
                    print(f"memo: event hook {own!r} raised {error!r}", file=sys.stderr)
