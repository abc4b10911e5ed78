"""Cached functions, their calls and the outcomes of calls, as the engine sees them."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from memo.errors import MemoError, lacks_resources
from memo.keys.call_keys import Call, Keyer
from memo.keys.offloading import HeavyError
from memo.records.stamp_types import Times
from memo.runtime import events
from memo.runtime.events import MISS
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.runtime.reasons import SOURCE_UNREACHABLE
from memo.settings.live_values import Live
from memo.settings.options import Policy
from memo.stores.protocols import PendingLookup
from memo.validity import check
from memo.validity.check import Verdict, judge
from memo.validity.dependencies import Dependencies

if TYPE_CHECKING:
    from memo.stores.chain import Chain

NOTHING = object()
"""Placeholder for a missing value, since None is a valid result."""


AnswerCall: TypeAlias = Callable[  # takes the port, the function, the call, its args and kwargs
    [Port, "Function", Call, tuple[Any, ...], Mapping[str, Any]], Coroutine[Any, Any, Any]
]


Arguments: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
KeyArguments: TypeAlias = Callable[[tuple[Any, ...], Mapping[str, Any]], Arguments]


def _as_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    return args, kwargs


class History:
    """The facts that calls of a function in this process leave for later ones.

    Attributes:
        backoff: key -> (monotonic time before which no refresh is tried, length of that pause).
        keys_by_appearance: text of the visible arguments -> the keys that they gave; None once a
            warning was given.
        last_duration: seconds that its latest computation took, or None.
        last_manifest: chain and code version of the last recorded manifest.
        warned: a warning has said that its results are not stored.
    """

    __slots__ = ("backoff", "keys_by_appearance", "last_duration", "last_manifest", "warned")

    def __init__(self) -> None:
        self.backoff: dict[str, tuple[float, float]] = {}
        self.keys_by_appearance: dict[str, set[str]] | None = {}
        self.last_duration: float | None = None
        self.last_manifest: tuple[weakref.ref[Chain], str] | None = None
        self.warned = False


class Function:
    """A cached function as the engine sees it.

    Attributes:
        id: `"module:qualname"`.
        run: the user's function.
        keyer: makes keys from its arguments and its code version.
        policy: its ttl and the other rules for the age of its entries.
        chain: returns the chain that holds its entries under the current settings.
        live: the live configuration, if its policy has a `ttl_key`, or None.
        record_manifest: records the parts that make up a code version; returns False if it failed.
        compress: returns the size in bytes above which results are compressed, or None.
        dependencies: takes the file and call stamps of one call, if the function has `depends_on`.
        replay: what it prints and displays is stored with its results, and shown again on a hit.
        answer: answers one of its calls, as a coroutine over the port.
        key_arguments: returns the arguments that make the key of a call, from those that repeat it.
        publish_own_changes: tells other processes which state the function changes itself.
        history: shared with its copies for other policies.
        cutoff: if a recomputed result is equal to the last one, entries built on it stay valid.
        is_async: `run` returns an awaitable.
    """

    __slots__ = (
        "__weakref__",
        "answer",
        "chain",
        "compress",
        "cutoff",
        "dependencies",
        "history",
        "id",
        "is_async",
        "key_arguments",
        "keyer",
        "live",
        "policy",
        "publish_own_changes",
        "record_manifest",
        "replay",
        "run",
    )

    def __init__(
        self,
        function_id: str,
        run: Callable[..., Any],
        keyer: Keyer,
        policy: Policy,
        chain: Callable[[], Chain],
        answer: AnswerCall,
        live: Live | None = None,
        dependencies: Dependencies | None = None,
        record_manifest: Callable[[str, Callable[[], Mapping[str, str]]], bool] | None = None,
        compress: Callable[[], int | None] = lambda: None,
        *,
        replay: bool = False,
        cutoff: bool = False,
        is_async: bool = False,
        publish_own_changes: Callable[[str, Mapping[str, str]], None] | None = None,
    ) -> None:
        self.id = function_id
        self.run = run
        self.keyer = keyer
        self.policy = policy
        self.chain = chain
        self.live = live
        self.dependencies = dependencies
        self.record_manifest = record_manifest
        self.compress = compress
        self.replay = replay
        self.publish_own_changes = publish_own_changes
        self.cutoff = cutoff
        self.answer = answer
        self.key_arguments: KeyArguments = _as_given
        self.is_async = is_async
        self.history = History()

    def own_changes_warning(self, names: Sequence[str], found: str = "") -> str:
        """Return the text of the warning that the function changes some state itself.

        Args:
            found: a clause to add if another host noticed.
        """
        return (
            f"{self.id} changes {', '.join(names)} while it runs{found}, so that is left out of "
            "its key; pass whatever affects the result as an argument instead."
        )

    def judge(
        self,
        times: Times,
        expired: int | None = None,
        raised: bool = False,
        unreachable: bool = False,
    ) -> Verdict:
        """Judge the age of an entry; see `memo.validity.check.Judge`.

        An exception (`cache_errors`) has its own ttl.  An entry with a source that cannot be
        queried is a miss, or, with `stale_if_error`, stays valid for its ttl.
        """
        if unreachable and not self.policy.stale_if_error:
            return Verdict(MISS, SOURCE_UNREACHABLE)
        policy, ttl = self._policy_and_live_ttl(raised)
        return judge(times, policy, self.chain().clock, ttl, expired)

    def live_ttl(self) -> float | None:
        """Return the ttl of the live configuration in seconds, or None."""
        live, key = self.live, self.policy.ttl_key
        return None if live is None or key is None else live.get(key)

    def _policy_and_live_ttl(self, raised: bool) -> tuple[Policy, float | None]:
        """Return the rules for the age of results, or of stored exceptions."""
        return (self.policy.of_errors, None) if raised else (self.policy, self.live_ttl())

    def ttl_in_force(self, times: Times, *, raised: bool = False) -> float | None:
        """Return the ttl of an entry now, in nanoseconds; see `check.ttl_in_force`."""
        return check.ttl_in_force(times, *self._policy_and_live_ttl(raised))

    def remaining(self, times: Times, *, raised: bool = False) -> int | None:
        """Return the nanoseconds for which an entry is still fresh; see `check.remaining`."""
        policy, ttl = self._policy_and_live_ttl(raised)
        return check.remaining(times, policy, self.chain().clock, ttl)

    def with_policy(self, policy: Policy) -> Function:
        """Return a copy of the function with another policy."""
        made = copy.copy(self)
        made.policy = policy
        return made


_CUTOFFS: weakref.WeakValueDictionary[str, Function] = weakref.WeakValueDictionary()


def register_cutoff(function: Function) -> None:
    """Let a function answer for its id when a `cutoff` result is asked for again."""
    if function.cutoff:
        _CUTOFFS[function.id] = function


def cutoff_function(function_id: str) -> Function | None:
    """Return the latest `cutoff=True` function with this id in this process, or None."""
    return _CUTOFFS.get(function_id)


class Job:
    """A call in progress.

    Attributes:
        name: the name under which its entry is stored.
        pending_lookup: a lookup that has read its stamps, for `take_stamps`, or None.
        repeated: the arguments that repeat the call, if they are not those that make its key.
    """

    __slots__ = (
        "args",
        "call",
        "chain",
        "function",
        "kwargs",
        "name",
        "pending_lookup",
        "repeated",
    )

    def __init__(
        self,
        function: Function,
        chain: Chain,
        call: Call,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.function = function
        self.chain = chain
        self.call = call
        self.args = args
        self.kwargs = kwargs
        self.name = chain.name(function.id, call.text)
        self.pending_lookup: PendingLookup | None = None
        self.repeated: Arguments | None = None


class Raised:
    """An exception of the user's function, which the wrapper raises without memo's frames."""

    __slots__ = ("error", "traceback")

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.traceback = error.__traceback__

    def again(self) -> BaseException:
        """Return the exception with its original traceback, however often it was raised."""
        return self.error.with_traceback(self.traceback)


class Outcome(NamedTuple):
    """The outcome of a run of the function: it returned `value`, or raised `error`."""

    value: Any = None
    error: BaseException | None = None

    @property
    def error_name(self) -> str:
        """The name of the exception's type; `""` if the function returned."""
        return "" if self.error is None else type(self.error).__name__

    def __repr__(self) -> str:
        return f"<Outcome {type(self.value if self.error is None else self.error).__name__}>"


def warn_at_definition(function: Callable[..., Any], message: str) -> None:
    """Warn at the line where a function is defined, since the call may be anywhere."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        warnings.warn(message, stacklevel=2)
    else:
        warnings.warn_explicit(message, UserWarning, code.co_filename, code.co_firstlineno)


def error_text(error: BaseException) -> str:
    """Describe an error for an event; one that is not memo's by its place: it may quote a value."""
    text = str(error) if isinstance(error, MemoError) else _raised_at(error)
    return f"{type(error).__name__}: {text}"


async def make_call(
    port: Port, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Call:
    """Make the key of a call, in a thread if it would block an event loop."""
    try:
        return function.keyer.call(args, kwargs, port.native)
    except HeavyError:
        pass  # errors raised below must not have this one as their context
    call = await port.offload(function.keyer.call, args, kwargs)
    await port.offload(getattr, call, "refs")  # a cached property; slow for long addresses
    return call


async def reload_live_if_due(port: Port, function: Function) -> None:
    """Reload the live configuration if the function takes its ttl from it and a reload is due."""
    live = function.live
    if live is not None and live.due():
        await port.offload(live.refresh)


def report_if_resource_failure(error: Exception) -> bool:
    """True, after an event, if the cache failed for lack of a resource: compute without it."""
    if not lacks_resources(error):
        return False
    events.emit(events.Event(events.ERROR, reason="engine", detail=error_text(error)))
    return True


def _raised_at(error: BaseException) -> str:
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    return "" if frames is None else f"{frames.tb_frame.f_code.co_filename}:{frames.tb_lineno}"


def emit(job: Job, kind: str, **facts: Any) -> None:
    """Emit an event about a call."""
    events.emit(events.Event(kind, job.function.id, job.call.text, **facts))


def writer_name() -> str:
    """Return the name of this host and process, for entries and notes."""
    return f"{_node()}/{os.getpid()}"


@functools.cache
def _node() -> str:
    return os.uname().nodename
