"""Invalidating: the decorator, and the helpers at module level."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar, cast

from memo import assembly, engine, events, options, resolvers
from memo.chain import Chain
from memo.decorators import CachedFunction, functions
from memo.drivers import BLOCKING, drive, native
from memo.engine import Invalidation
from memo.errors import OptionError
from memo.jobs import users
from memo.keys import address_digest, normal_prefix, prefixes
from memo.port import Port
from memo.stamps import ADDRESS, Turn
from memo.tiers import CacheProtocol

P = ParamSpec("P")
R = TypeVar("R")


def _all_chains() -> list[Chain]:
    """Every chain of this process that may hold entries."""
    found = [assembly.default_chain(), *(f._function.chain() for f in functions())]
    return list({id(chain): chain for chain in found}.values())


def address_turns(address: str, prefix: str | None = None) -> list[Turn]:
    """The turns that make the entries of one address untrue, under each prefix it may have."""
    wanted = prefixes(address) if prefix is None else [prefix]
    pair = (ADDRESS, address_digest(address))
    return [Turn(f"p:{one}", (pair,), whole=True) for one in wanted]


def _turns(
    prefix: str | None, tag: str | None, function: Any, key: str | None
) -> tuple[list[Turn], str]:
    given = {"prefix": prefix, "tag": tag, "function": function, "key": key}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise OptionError(
            ", ".join(named) or "prefix",
            None if not named else given[named[0]],
            "give exactly one of prefix=, tag=, function=, key=.",
        )
    name = named[0]
    if name == "function":
        identity = function.function_id if hasattr(function, "function_id") else function
        return [Turn(f"f:{options.text('function', identity)}")], f"function {identity}"
    text = options.text(name, given[name])
    assert text is not None
    if name == "prefix":
        return [Turn(f"p:{normal_prefix(text)}")], f"prefix {text}"
    if name == "tag":
        return [Turn(f"t:{text}")], f"tag {text}"
    return address_turns(text), f"key {text}"


def invalidate(
    *,
    prefix: str | None = None,
    tag: str | None = None,
    function: Any = None,
    key: str | None = None,
    reason: str = "",
) -> Invalidation:
    """Make entries untrue, in every process and on every host that shares the tiers.

    Args:
        prefix: an address prefix, as in `cache(key_prefix=...)`: all its entries.
        tag: as in `cache(tags=...)`.
        function: a cached function, or its identity `"module:qualname"`.
        key: an address, `"prefix:arg:arg"`; it matches exactly, never as a pattern.
        reason: kept with the invalidation, and shown by `explain`.

    Returns:
        How it went, tier by tier.

    Raises:
        OptionError: not exactly one target was given.
    """
    turns, target = _turns(prefix, tag, function, key)
    return drive(engine.invalidate(BLOCKING, _all_chains(), turns, target, reason))


async def ainvalidate(
    *,
    prefix: str | None = None,
    tag: str | None = None,
    function: Any = None,
    key: str | None = None,
    reason: str = "",
) -> Invalidation:
    """As `invalidate`, without blocking the event loop."""
    turns, target = _turns(prefix, tag, function, key)
    return await engine.invalidate(native(), _all_chains(), turns, target, reason)


class _Plan:
    """What an `invalidate_cache` decorator does after its function returned."""

    def __init__(
        self,
        function: Callable[..., Any],
        key_prefix: str | None,
        key_resolver: Callable[..., Any] | None,
        provider: CacheProtocol | Chain | None,
        targets: Sequence[CachedFunction[Any, Any]],
        match: Sequence[str],
        tags: Sequence[str],
    ) -> None:
        self.prefix = None if key_prefix is None else normal_prefix(key_prefix)
        self.resolver = key_resolver
        self.targets = targets
        self.match = match
        self.tags = tags
        self.chain = assembly.chain_of(provider)
        self.own_chain = provider is not None
        self.signature = inspect.signature(function)
        options.known("match", match, self.signature.parameters)
        self.wants = None if key_resolver is None else _declared(key_resolver, self.signature)
        self.who = getattr(function, "__qualname__", repr(function))

    async def carry_out(
        self, port: Port, result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Drop what the call asks for; the function has returned, so nothing is raised any more.

        What cannot be told exactly is dropped as a whole, with an event and a warning.
        """
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = _flat(self.signature, bound.arguments)
        wrong: list[Exception] = []
        turns, target = self._turns(result, arguments, wrong)
        if turns:
            chains = [self.chain()] if self.own_chain else _all_chains()
            await engine.invalidate(port, chains, turns, target, f"after {self.who}")
        chosen = {name: arguments[name] for name in self.match}
        for function in self.targets:
            await self._target(port, function, chosen, wrong)
        for error in wrong:
            self._complain(error)

    async def _target(
        self,
        port: Port,
        function: CachedFunction[Any, Any],
        chosen: Mapping[str, Any],
        wrong: list[Exception],
    ) -> None:
        try:
            work = function._invalidate(port, (), chosen, f"after {self.who}")
        except Exception as error:  # an argument that has no key
            wrong.append(error)
            work = function._invalidate(port, (), {}, f"after {self.who}")
        await work

    def _turns(
        self, result: Any, arguments: Mapping[str, Any], wrong: list[Exception]
    ) -> tuple[list[Turn], str]:
        turns = [Turn(f"t:{tag}") for tag in self.tags]
        named = [f"tag {tag}" for tag in self.tags]
        addresses: list[str] | None = None
        if self.resolver is not None:
            try:
                addresses = self._addresses(result, arguments)
            except Exception as error:
                wrong.append(error)
        for address in addresses or ():
            turns += address_turns(address)
            named.append(f"key {address}")
        if addresses is None and self.prefix is not None:
            turns.append(Turn(f"p:{self.prefix}"))
            named.append(f"prefix {self.prefix}")
        elif addresses is None and self.resolver is not None:
            turns.append(Turn("n"))
            named.append("everything")
        return turns, ", ".join(named)

    def _complain(self, error: Exception) -> None:
        what = "the whole prefix" if self.prefix is not None else "everything"
        what = what if self.resolver is not None else "all entries of its functions"
        told = f"invalidate_cache of {self.who}: {type(error).__name__}: {error}"
        events.emit(events.Event(events.ERROR, reason="key_resolver", detail=told))
        warnings.warn(f"{told}; so {what} was invalidated instead", stacklevel=2)

    def _addresses(self, result: Any, arguments: Mapping[str, Any]) -> list[str]:
        assert self.resolver is not None
        everything = {**arguments, "result": result}
        names = everything if self.wants is None else self.wants
        wanted = {name: everything[name] for name in names if name in everything}
        resolved = self.resolver(**wanted)
        many = [resolved] if isinstance(resolved, str) else list(resolved or ())
        for one in many:
            if not isinstance(one, str) or not one:
                raise OptionError(
                    "key_resolver", one, f"of {self.who} must give an address or a list of them."
                )
        return [self._full(one) for one in many]

    def _full(self, address: str) -> str:
        if self.prefix is None or address.startswith(f"{self.prefix}:"):
            return address
        return f"{self.prefix}:{address}"


def _declared(resolver: Callable[..., Any], signature: inspect.Signature) -> tuple[str, ...] | None:
    """The names that a resolver takes; None: everything, since it takes `**kwargs`.

    Raises:
        OptionError: it takes what is neither `result` nor an argument of the function.
    """
    names = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    open_ = len(names) < len(signature.parameters)
    return resolvers.declared("key_resolver", resolver, [*names, "result"], open_, "")


def _flat(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Bound arguments by name, with those of `**kwargs` under their own names."""
    flat = dict(arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            flat.update(flat.pop(parameter.name, {}))
    return flat


def _cached(option: str, value: Any) -> list[CachedFunction[Any, Any]]:
    one_only = isinstance(value, CachedFunction) or not isinstance(value, Iterable)
    many: list[Any] = [value] if one_only else list(cast("Iterable[Any]", value))
    many = [getattr(one, "__func__", one) for one in many]  # of methods, the function itself
    for one in many:
        if not isinstance(one, CachedFunction):
            raise OptionError(option, one, "must be functions that @cache decorates.")
    return many


def invalidate_cache(
    key_prefix: str | None = None,
    key_resolver: Callable[..., Any] | None = None,
    provider: CacheProtocol | Chain | None = None,
    *,
    functions: Iterable[CachedFunction[Any, Any]] = (),
    match: Iterable[str] = (),
    tags: Iterable[str] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """After the decorated function (sync or async) returned without raising, drop what is named.

    Args:
        key_prefix: an address prefix; without `key_resolver` all of it goes.
        key_resolver: gets `result` and the bound arguments by name, takes those that it declares,
            and returns an address or a list of them.  A prefix that is missing is put in front.
        provider: whose entries; default: every chain in use.
        functions: cached functions of which entries go.
        match: names of arguments of the decorated function; the entries of `functions` whose
            arguments of these names have the same values go.  None: all entries of them.
        tags: tags whose entries go.

    Raises:
        OptionError: nothing is named, or an option is wrong.
    """
    prefix = options.text("key_prefix", key_prefix)
    targets = _cached("functions", functions)
    names, tagged = options.texts("match", match), options.texts("tags", tags)
    if key_resolver is not None and not callable(key_resolver):
        raise OptionError("key_resolver", key_resolver, "must be a function that gives addresses.")
    if names and not targets:
        raise OptionError("match", names, "selects entries of functions=, which is missing.")
    if prefix is None and key_resolver is None and not targets and not tagged:
        raise OptionError(
            "key_prefix", None, "name what to drop: key_prefix, key_resolver, functions or tags."
        )
    for target in targets:
        target._function.keyer.check_names("match", names)
    assembly.chain_of(provider)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if isinstance(function, (staticmethod, classmethod)):
            kind: Any = type(function)
            return cast("Callable[P, R]", kind(decorate(function.__func__)))
        options.function("function", function)
        plan = _Plan(function, prefix, key_resolver, provider, targets, names, tagged)
        if options.is_async(function):
            return cast("Callable[P, R]", _async(function, plan))
        return _sync(function, plan)

    return decorate


def _sync(function: Callable[P, R], plan: _Plan) -> Callable[P, R]:
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            users(error)
            raise
        if inspect.iscoroutine(result):  # it has not done anything yet
            return cast("R", _awaited(result, plan, args, kwargs))
        drive(plan.carry_out(BLOCKING, result, args, kwargs))
        return result

    return wrapper


def _async(function: Callable[..., Any], plan: _Plan) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return await _awaited(function(*args, **kwargs), plan, args, kwargs)

    return wrapper


async def _awaited(
    work: Awaitable[Any], plan: _Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    try:
        result = await work
    except Exception as error:
        users(error)
        raise
    await _to_the_end(native(), lambda port: plan.carry_out(port, result, args, kwargs))
    return result


async def _to_the_end(port: Port, work: Callable[[Port], Coroutine[Any, Any, None]]) -> None:
    """Wait for work that goes on when whoever waits for it is cancelled."""
    over = port.waiter()
    failed: list[Exception] = []

    async def inside(port: Port) -> None:
        try:
            await work(port)
        except Exception as error:  # a warning that is an error
            failed.append(error)
        finally:
            over.set()

    port.spawn(inside, "memo-invalidate")
    await port.wait(over, None)
    if failed:
        raise failed[0]
