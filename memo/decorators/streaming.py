"""Cached generators and async generators: streamed on the first call, replayed after that."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar, cast

from memo.decorators import assembly
from memo.decorators.cached_function import CachedFunction, with_max_age
from memo.decorators.helpers import takes_any_arguments
from memo.engine import answering
from memo.engine.call import Function, Job, Raised, report_if_resource_failure
from memo.engine.sequences import streams
from memo.engine.sequences.streams import END, Reader
from memo.errors import NotCachedError, OptionError, at_the_call
from memo.records.spool import Spool, Stream
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.native import native
from memo.settings import modes, options

P = ParamSpec("P")
R = TypeVar("R")


def class_for(function: Any, given: Mapping[str, Any]) -> type[CachedFunction[Any, Any]]:
    """Return the class of the cached function to create for a generator function.

    Raises:
        OptionError: an option cannot be combined with it.
    """
    for name, why in _NOT_WITH_GENERATORS.items():
        if given[name]:
            raise OptionError(name, given[name], f"cannot be combined with a generator: {why}.")
    for name in ("ttl", "cache_if"):
        _refuse_function_of_result(name, given[name])
    return AsyncStreaming if options.generator_kind(function) == "async" else Streaming


def _refuse_function_of_result(name: str, value: Any) -> None:
    if callable(value):
        raise OptionError(name, value, "needs a result, which a generator does not have.")


_NOT_WITH_GENERATORS = {
    "each": "it has no result that could be split",
    "replay": "its output belongs to no single item",
    "cache_errors": "it may raise after callers have seen its first items",
    "soft_timeout": "its items come one by one",
    "cutoff": "its items are used before there is a value to compare; return a list instead",
}
"""Options that cannot be combined with generators, and why."""


class _Streaming(CachedFunction[P, R]):
    """The common part of both classes."""

    def __init__(self, function: Callable[P, R], given: Mapping[str, Any]) -> None:
        super().__init__(function, given)
        if self._function.keyer.has_late_tags:
            fix = "need a result, which a generator does not have; make them from the arguments."
            raise OptionError("tags", given["tags"], fix)
        self.is_async = isinstance(self, AsyncStreaming)
        self._function.run = streams.returning_spool(function, self._spool, self.is_async)

    def _checked_ttl(self, ttl: Any) -> Any:
        _refuse_function_of_result("ttl", ttl)
        return super()._checked_ttl(ttl)

    def _spool(self) -> Spool:
        return streams.spool_for(self._function)

    def _as_generator(self, items: Any) -> Any:
        """Return items as the function would: as a generator, or as an async one."""
        raise NotImplementedError

    def _items_of(self, reader: Reader) -> Any:
        """Return a generator, or an async one, over the items of a reader."""
        raise NotImplementedError

    @takes_any_arguments
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        mode = self._mode()
        if self._bypasses_cache(mode):
            return self.__wrapped__(*args, **kwargs)
        function = with_max_age(self._function, mode)
        try:
            call = function.keyer.call(args, kwargs)
            job = Job(function, function.chain(), call, args, dict(kwargs))
        except Exception as error:
            if report_if_resource_failure(error):
                return self.__wrapped__(*args, **kwargs)
            at_the_call(error)
            raise
        if mode.kind == modes.ONLY:
            return cast("R", self._stored_only(function, args, kwargs))
        fresh, keep = mode.kind is not None, mode.kind != modes.OFF
        reader = Reader(job, self.__wrapped__, fresh=fresh, keep=keep)
        made = self._items_of(reader)
        name = getattr(self.__wrapped__, "__name__", made.__name__)
        made.__name__, made.__qualname__ = name, getattr(self.__wrapped__, "__qualname__", name)
        return cast("R", made)

    def _stored_only(self, function: Function, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return the stored items.

        Raises:
            NotCachedError: there are none.
        """
        found = drive(answering.read_stored(BLOCKING, function, args, kwargs))
        if not isinstance(found, Stream):
            raise NotCachedError(drive(self._explain_call(BLOCKING, function, args, kwargs)))
        return self._as_generator(found.items())

    async def _refresh(self, port: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        done = await super()._refresh(port, args, kwargs)
        return done if type(done) is Raised else self._as_generator(cast("Spool", done).items())

    async def _put(self, port: Any, value: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Store the items of an iterable; on an event loop it may be an async one."""
        if not assembly.enabled():
            return
        spool = self._spool()
        spool = (
            await streams.aspool_all(value, spool)
            if port.native
            else streams.spool_all(value, spool)
        )
        await super()._put(port, spool, args, kwargs)

    async def _peek(self, port: Any, args: Any, kwargs: dict[str, Any], default: Any) -> Any:
        found = await super()._peek(port, args, kwargs, default)
        return self._as_generator(found.items()) if isinstance(found, Stream) else found


class Streaming(_Streaming[P, R]):
    """A cached generator function."""

    def _as_generator(self, items: Iterator[Any]) -> Any:
        return (item for item in items)

    def _items_of(self, reader: Reader) -> Generator[Any, None, Any]:
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

    async def _as_generator(self, items: Iterator[Any]) -> Any:
        for item in items:
            yield item

    async def _items_of(self, reader: Reader) -> AsyncIterator[Any]:
        __tracebackhide__ = True
        try:
            while (item := await reader.next(native())) is not END:
                if type(item) is Raised:
                    raise item.again()
                yield item
        finally:
            await reader.leave(native())
