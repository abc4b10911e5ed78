"""Cached generators and async generators: streamed on the first call, replayed after that."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar, cast

from memo.decorators import assembly
from memo.decorators.cached_function import MISSING, CachedFunction, aged
from memo.decorators.helpers import helper, passes_on
from memo.engine import answering
from memo.engine.call import Function, Job, Raised, hindered
from memo.engine.sequences import streams
from memo.engine.sequences.streams import END, Reader
from memo.errors import NotCachedError, OptionError, at_the_call
from memo.records.spool import Spool, Stream
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.native import native, run_elsewhere
from memo.settings import modes, options

P = ParamSpec("P")
R = TypeVar("R")


def kind(function: Any, given: Mapping[str, Any]) -> type[CachedFunction[Any, Any]]:
    """Return the class of the cached function to create for a generator function.

    Raises:
        OptionError: an option cannot be combined with it.
    """
    for name, why in _ALONE.items():
        if given[name]:
            raise OptionError(name, given[name], f"does not go with a generator: {why}.")
    for name in ("ttl", "cache_if"):
        if callable(given[name]):
            raise OptionError(
                name, given[name], "asks for a result, which a generator does not have."
            )
    return AsyncStreaming if options.generates(function) == "async" else Streaming


_ALONE = {
    "each": "it has no answer that could be divided",
    "replay": "what it shows belongs to no single item",
    "cache_errors": "it may raise after its first items were seen",
    "soft_timeout": "its items come one by one",
    "cutoff": "its items are used before there is a value to compare; return a list instead",
}
"""Options that cannot be combined with generators, and why."""


class _Streaming(CachedFunction[P, R]):
    """The common part of both kinds."""

    def __init__(self, function: Callable[P, R], given: Mapping[str, Any]) -> None:
        super().__init__(function, given)
        if self._function.keyer.has_late_tags:
            fix = "ask for a result, which a generator does not have; make them from the arguments."
            raise OptionError("tags", given["tags"], fix)
        self.is_async = isinstance(self, AsyncStreaming)
        self._function.run = streams.run_through(function, self._spool, self.is_async)

    def _spool(self) -> Spool:
        return streams.spool_for(self._function)

    def _made(self, items: Any) -> Any:
        """Return items in the form the function returns: a generator, or an async one."""
        raise NotImplementedError

    def _consumed(self, reader: Reader) -> Any:
        raise NotImplementedError

    @passes_on
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        mode = self._mode()
        if mode.kind == modes.OFF:
            return self.__wrapped__(*args, **kwargs)
        function = aged(self._function, mode)
        try:
            call = function.call(args, kwargs)
            job = Job(function, function.chain(), call, args, dict(kwargs))
        except Exception as error:
            if hindered(error):
                return self.__wrapped__(*args, **kwargs)
            at_the_call(error)
            raise
        if mode.kind == modes.ONLY:
            return cast("R", self._stored_only(function, args, kwargs))
        reader = Reader(job, self.__wrapped__, fresh=mode.kind == modes.REFRESH)
        made = self._consumed(reader)
        name = getattr(self.__wrapped__, "__name__", made.__name__)
        made.__name__, made.__qualname__ = name, getattr(self.__wrapped__, "__qualname__", name)
        return cast("R", made)

    def _stored_only(self, function: Function, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return the stored items.

        Raises:
            NotCachedError: there are none.
        """
        found = drive(answering.only(BLOCKING, function, args, kwargs))
        if not isinstance(found, Stream):
            raise NotCachedError(self._explained(function, args, kwargs))
        return self._made(found.items())

    @helper()
    def refresh(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Run the generator to its end now, store its items, and return them."""
        if not assembly.enabled():
            return self.__wrapped__(*args, **kwargs)
        if self.is_async:
            done = run_elsewhere(lambda port: answering.refresh(port, self._function, args, kwargs))
        else:
            done = drive(answering.refresh(BLOCKING, self._function, args, kwargs))
        return self._refreshed(done, args, kwargs)

    @helper()
    async def arefresh(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """As `refresh`, without blocking the event loop."""
        if not self.is_async:
            return await native().offload(lambda: self.refresh(*args, **kwargs))
        if not assembly.enabled():
            return self.__wrapped__(*args, **kwargs)
        done = await answering.refresh(native(), self._function, args, kwargs)
        return self._refreshed(done, args, kwargs)

    def _refreshed(self, done: Any, args: Any, kwargs: Any) -> Any:
        if type(done) is Raised:
            raise done.again()
        return self._made(cast("Spool", done).items())

    @helper(value=inspect.Parameter.empty)
    def put(self, value: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Store the items of an iterable as the result of a call, without running the function."""
        if assembly.enabled():
            spool = streams.spooled(value, self._spool())
            drive(answering.put(BLOCKING, self._function, args, kwargs, spool))

    @helper(value=inspect.Parameter.empty)
    async def aput(self, value: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """As `put`, without blocking the event loop; also takes an async iterable."""
        if assembly.enabled():
            spool = await streams.aspooled(value, self._spool())
            await answering.put(native(), self._function, args, kwargs, spool)

    @helper(default=None)
    def peek(self, /, *args: Any, default: Any = MISSING, **kwargs: Any) -> Any:
        """Return the stored items if a call would replay them, else `default` (None).

        Never computes.
        """
        return self._peeked(CachedFunction.peek(self, *args, default=default, **kwargs))

    @helper(default=None)
    async def apeek(self, /, *args: Any, default: Any = MISSING, **kwargs: Any) -> Any:
        """As `peek`, without blocking the event loop."""
        return self._peeked(await CachedFunction.apeek(self, *args, default=default, **kwargs))

    def _peeked(self, found: Any) -> Any:
        return self._made(found.items()) if isinstance(found, Stream) else found


class Streaming(_Streaming[P, R]):
    """A cached generator function."""

    def _made(self, items: Iterator[Any]) -> Any:
        return (item for item in items)

    def _consumed(self, reader: Reader) -> Generator[Any, None, Any]:
        __tracebackhide__ = True
        try:
            while (item := drive(reader.next(BLOCKING))) is not END:
                if type(item) is Raised:
                    raise item.again()
                yield item
            return reader.returned
        finally:
            drive(reader.leave(BLOCKING))


class AsyncStreaming(_Streaming[P, R]):
    """A cached async generator function."""

    async def _made(self, items: Iterator[Any]) -> Any:
        for item in items:
            yield item

    async def _consumed(self, reader: Reader) -> AsyncIterator[Any]:
        __tracebackhide__ = True
        try:
            while (item := await reader.next(native())) is not END:
                if type(item) is Raised:
                    raise item.again()
                yield item
        finally:
            await reader.leave(native())
