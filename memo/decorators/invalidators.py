"""The decorator `invalidate_cache`, and the functions `invalidate` and `expire`."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, Final, ParamSpec, TypeVar, cast

from memo.coordination.flights import FLIGHTS
from memo.decorators import assembly, names
from memo.decorators.cached_function import CachedFunction, functions, turn_of_key
from memo.engine import invalidating
from memo.engine.invalidating import Hint, Invalidation, Matches
from memo.errors import (
    EventLoopError,
    NothingMatchedError,
    OptionError,
    TierError,
    cut_to_user_frames,
    label,
    public,
    shown,
)
from memo.keys import resolvers
from memo.keys.call_keys import address_digest, normal_prefix, possible_prefixes
from memo.keys.values import value_encoding
from memo.metrics.running_computations import turn_of_running
from memo.records.seal import Header
from memo.records.stamp_types import ADDRESS, Ref
from memo.runtime import events
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.native import native
from memo.runtime.port import Port
from memo.settings import options
from memo.stores.chain import Chain
from memo.stores.protocols import CacheProtocol
from memo.validity import stamps
from memo.validity.stamps import Turn, tag_turns

P = ParamSpec("P")
R = TypeVar("R")


def _all_chains() -> list[Chain]:
    """Return every chain of this process that may hold entries."""
    found = [assembly.default_chain(), *(f._function.chain() for f in functions())]
    return list({id(chain): chain for chain in found}.values())


def address_turns(address: str) -> list[Turn]:
    """Return the turns that invalidate an address, one for each prefix that it may have."""
    pair = (ADDRESS, address_digest(address))
    return [Turn(stamps.group("p", one), (pair,), whole=True) for one in possible_prefixes(address)]


class _Target(NamedTuple):
    """The target named by one of the options `prefix`, `tag`, `function` and `key`.

    Attributes:
        turns: the turns that invalidate it.
        description: the target in words.
        hint: returns the names that were probably intended.
    """

    turns: list[Turn]
    description: str
    hint: Hint | None = None


async def _parse_target(
    port: Port, prefix: str | None, tag: str | None, function: Any, key: str | None
) -> _Target:
    given = {"prefix": prefix, "tag": tag, "function": function, "key": key}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        first, *others = named or ["prefix"]
        both = "".join(f"is given with {name}={shown(given[name])}; " for name in others[:1])
        fix = f"{both}give exactly one of prefix=, tag=, function=, key=."
        raise OptionError(first, given[first], fix)
    name = named[0]
    if name == "function":
        identity = await names.function_named(port, "function", function, _ids_here())
        return _Target([Turn(f"f:{identity}")], f"function {label(identity)!r}")
    text = options.text(name, given[name])
    assert text is not None
    if name == "prefix":
        turns = [Turn(stamps.group("p", normal_prefix(text)))]
        return _Target(
            turns, f"prefix {shown(text)}", _nearest_hint(names.PREFIX, text.rstrip(":"))
        )
    if name == "tag":
        return _Target(list(tag_turns(text)), f"tag {shown(text)}", _nearest_hint(names.TAG, text))
    return await _key_target(port, text)


def _ids_here() -> list[str]:
    """Return the ids of the functions of this process."""
    return [function.function_id for function in functions()]


async def _names_of(port: Port, kind: str) -> list[str]:
    """Return the prefixes or tags of the functions of this process and this host."""
    return [*await names.names_on_host(port, assembly.default_chain(), kind), *_names_here(kind)]


def _names_here(kind: str) -> list[str]:
    """Return the prefixes or tags of the functions of this process."""
    keyers = [function._function.keyer for function in functions()]
    if kind == names.PREFIX:
        return [keyer.prefix for keyer in keyers]
    return [tag for keyer in keyers for tag in keyer.fixed_tags]


def _nearest_hint(kind: str, name: str) -> Hint:
    """Return a hint with the prefix or tag that was probably intended."""
    return functools.partial(_did_you_mean, kind, name)


def _did_you_mean(kind: str, name: str, found: Matches) -> str:
    """Ask for the prefix or tag that was probably intended: of an entry or of a function here.

    Generations of this host are not searched, since an earlier typo may have created one.
    """
    here = [group[2:] for group in found.groups if group.startswith(f"{kind}:")]
    known = [one for one in (*here, *_names_here(kind)) if one != name]
    return names.did_you_mean(names.nearest(name, known))


# --- keys and addresses --------------------------------------------------------------------------


async def _key_target(port: Port, text: str) -> _Target:
    """Return the target for an address, or for a key from `f.key(...)`."""
    if "*" in text:
        head = text.partition("*")[0]
        prefix = head.rpartition(":")[0] or head
        rest = f"write prefix={prefix!r}" if prefix else "write prefix="
        fix = (
            f"names one address and is no pattern; {rest} to invalidate all addresses of a prefix."
        )
        raise OptionError("key", text, fix)
    if re.fullmatch(_KEY_PATTERN, text):
        turns = await _turns_of_key(port, text)
        return _Target(turns, f"key {text!r}", _elsewhere_hint)

    def hint(found: Matches) -> str:
        return names.did_you_mean(names.nearest(text, found.others))

    return _Target(address_turns(text), f"key {shown(text)}", hint)


def _elsewhere_hint(_: Matches) -> str:
    """Return the hint that a key does not find calls which only other hosts know."""
    return UNKNOWN_KEY_HINT if assembly.default_chain().authorities.shared is not None else ""


_KEY_PATTERN: Final = r"[0-9a-f]{40}"
UNKNOWN_KEY_HINT: Final = (
    "a call that another host is computing now is not known by its key here: "
    "give its address, tag or function"
)


async def _turns_of_key(port: Port, key: str) -> list[Turn]:
    """Return the turns that invalidate the call of a key; none if this host does not know it."""
    given = turn_of_key(key)
    if given is not None:
        return [given]
    for flight in FLIGHTS.joinable_flights():
        if flight.name.endswith(f":{key}"):
            return [_whole_turn(ref) for ref in flight.refs if ref.group.startswith("f:")]
    elsewhere = await port.offload(turn_of_running, key)
    if elsewhere is not None:
        return [elsewhere]
    identities = await names.known_functions(port, _ids_here())
    for chain in _all_chains():
        header = await _header_with_key(port, chain, identities, key)
        if header is not None:
            own = invalidating.own_refs(header)
            return [_whole_turn(ref) for ref in own if ref.group.startswith("f:")]
    return []


async def _header_with_key(
    port: Port, chain: Chain, identities: Sequence[str], key: str
) -> Header | None:
    """Return the header of the entry with a key, of any of these functions."""
    for identity in identities:
        for secret in chain.secrets:
            header = await chain.stored_header(port, chain.name(identity, key, secret))
            if header is not None:
                return header
    return None


def _whole_turn(ref: Ref) -> Turn:
    return Turn(ref.group, ref.arguments or (), whole=True)


# --- functions at module level -------------------------------------------------------------------


async def _invalidate_target(
    port: Port, target: Mapping[str, Any], reason: str, *, soft: bool, strict: bool
) -> Invalidation:
    options.flag("strict", strict)
    turns, target_text, hint = await _parse_target(port, **target)
    done = await invalidating.invalidate(
        port, _all_chains(), turns, target_text, reason, soft=soft, hint=hint, search_shared=strict
    )
    if strict and done.missed:
        raise NothingMatchedError(done)
    return done


@public
def invalidate(
    *,
    prefix: str | None = None,
    tag: str | None = None,
    function: CachedFunction[..., Any] | Callable[..., Any] | str | None = None,
    key: str | None = None,
    reason: str = "",
    strict: bool = False,
) -> Invalidation:
    """Invalidate entries, in every process and on every host that shares the cache.

    Args:
        prefix: an address prefix, as in `cache(key_prefix=...)`: all its entries.
        tag: as in `cache(tags=...)`.
        function: a cached function, its id `"module:qualname"`, or the name that tables show.
        key: an address, `"prefix:arg:arg"`, which matches exactly and never as a pattern; or a key
            from `f.key(...)`.
        reason: kept with the invalidation, and shown by `explain`.
        strict: raise if no valid entry is known here that it could match.  A Redis is then searched
            for entries that this host does not have, for at most 50 ms.

    Returns:
        The entries that matched, and the outcome in each tier.

    Raises:
        OptionError: not exactly one target was given, or no function has the name, or several have.
        NothingMatchedError: with `strict`; the invalidation was carried out nevertheless.
    """
    target = {"prefix": prefix, "tag": tag, "function": function, "key": key}
    return drive(_invalidate_target(BLOCKING, target, reason, soft=False, strict=strict))


@public
async def ainvalidate(
    *,
    prefix: str | None = None,
    tag: str | None = None,
    function: CachedFunction[..., Any] | Callable[..., Any] | str | None = None,
    key: str | None = None,
    reason: str = "",
    strict: bool = False,
) -> Invalidation:
    """Like `invalidate`, without blocking the event loop."""
    target = {"prefix": prefix, "tag": tag, "function": function, "key": key}
    return await _invalidate_target(native(), target, reason, soft=False, strict=strict)


@public
def expire(
    *,
    prefix: str | None = None,
    tag: str | None = None,
    function: CachedFunction[..., Any] | Callable[..., Any] | str | None = None,
    key: str | None = None,
    reason: str = "",
    strict: bool = False,
) -> Invalidation:
    """Let entries expire now, in every process and on every host that shares the cache.

    Unlike after `invalidate`, an old value may still be served: within `stale_while_revalidate`
    while one refresh runs, within `stale_if_error` if computing raises.  The arguments, the result
    and the errors are those of `invalidate`.
    """
    target = {"prefix": prefix, "tag": tag, "function": function, "key": key}
    return drive(_invalidate_target(BLOCKING, target, reason, soft=True, strict=strict))


@public
async def aexpire(
    *,
    prefix: str | None = None,
    tag: str | None = None,
    function: CachedFunction[..., Any] | Callable[..., Any] | str | None = None,
    key: str | None = None,
    reason: str = "",
    strict: bool = False,
) -> Invalidation:
    """Like `expire`, without blocking the event loop."""
    target = {"prefix": prefix, "tag": tag, "function": function, "key": key}
    return await _invalidate_target(native(), target, reason, soft=True, strict=strict)


MAX_COUNTED_CALLS: Final = 5
"""Calls of a decorated function whose matches are counted, unless one matches earlier."""
SIMILAR: Final = "there are entries such as"


class InvalidationAfterCall:
    """The invalidation that follows each call of a function decorated by `invalidate_cache`."""

    def __init__(
        self,
        function: Callable[..., Any],
        key_prefix: str | None,
        key_resolver: Callable[..., Any] | str | None,
        provider: CacheProtocol | Chain | None,
        targets: Sequence[CachedFunction[Any, Any]],
        match: Sequence[str],
        tags: Sequence[str],
        soft: bool,
    ) -> None:
        self.prefix = None if key_prefix is None else normal_prefix(key_prefix)
        self.soft = soft
        self.targets = targets
        self.match = match
        self.chain = assembly.chain_getter(provider)
        self.own_chain = provider is not None
        self.signature = inspect.signature(function)
        options.check_names("match", match, self.signature.parameters)
        self.template, self.resolver, self.resolver_arguments = None, None, None
        if isinstance(key_resolver, str):
            self.template = _template(key_resolver, self.signature)
        elif key_resolver is not None:
            self.resolver = key_resolver
            self.resolver_arguments = _resolver_arguments(key_resolver, self.signature)
        self.tags = [_tag(tag, self.signature) for tag in tags]
        self.has_resolver = key_resolver is not None
        self.function_name = getattr(function, "__qualname__", repr(function))
        self.checks_left = MAX_COUNTED_CALLS
        self.resolver_gave_none = False

    async def carry_out(
        self, port: Port, result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Carry out the invalidation; raise nothing, since the function has returned.

        If the exact entries cannot be determined, all candidates are dropped, with an event and a
        warning.  Warnings come last, since a warning may be an error.
        """
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = _by_name(self.signature, bound.arguments)
        everything = {**arguments, "result": result}
        wrong: list[Exception] = []
        messages: list[str] = []
        tags = self._tags(everything, wrong)
        turns, target = self._turns(everything, tags, wrong)
        if turns:
            chains = [self.chain()] if self.own_chain else _all_chains()
            unknown = await self._unknown_names(port, turns, tags or ())
            try:
                done = await invalidating.invalidate(
                    *(port, chains, turns, target, f"after {self.function_name}"),
                    soft=self.soft,
                    count=bool(self.checks_left),
                    hint=self._hint(turns, unknown),
                )
                messages += self._match_warning(done)
            except TierError as refused:  # a tier refuses it for good
                messages.append(self._failure_warning(refused, "nothing was invalidated"))
        if self.resolver_gave_none and self.checks_left:
            messages += self._resolver_warning()
        chosen = {name: arguments[name] for name in self.match}
        for function in self.targets:
            messages += await self._invalidate_function(port, function, chosen)
        messages += [self._fallback_warning(error, tagged=tags is not None) for error in wrong]
        for message in messages:
            warnings.warn(message, stacklevel=2)

    def _resolver_warning(self) -> list[str]:
        """Return the warning that the resolver returned None in each of the first calls."""
        self.checks_left -= 1
        if self.checks_left:
            return []
        message = (
            f"invalidate_cache of {self.function_name}: its key_resolver returned None in "
            f"{MAX_COUNTED_CALLS} calls, so nothing was invalidated; return an address, "
            "or [] for none."
        )
        return [message]

    async def _invalidate_function(
        self,
        port: Port,
        function: CachedFunction[Any, Any],
        chosen: Mapping[str, Any],
    ) -> list[str]:
        """Invalidate the entries of a function with some arguments; return warnings."""
        reason, count = f"after {self.function_name}", bool(self.checks_left)
        messages: list[str] = []
        try:
            drop = function._invalidation((), chosen, reason, soft=self.soft, count=count)
        except Exception as error:  # an argument has no key
            every = f"all entries of {label(function.function_id)} were invalidated instead"
            messages.append(self._failure_warning(error, every))
            drop = function._invalidation((), {}, reason, soft=self.soft, count=False)
        try:
            messages += self._match_warning(await drop(port))
        except TierError as refused:
            messages.append(self._failure_warning(refused, "nothing was invalidated"))
        return messages

    async def _unknown_names(
        self, port: Port, turns: Sequence[Turn], tags: Sequence[str]
    ) -> list[tuple[str, str]]:
        """Return the prefixes or tags that are unknown, so that no entry can match them."""
        if not self.checks_left:
            return []
        groups = [turn.group.partition(":") for turn in turns]
        prefixes = [name for kind, _, name in groups if kind == names.PREFIX]
        known = await _names_of(port, names.PREFIX)
        if prefixes and not [
            name for name in prefixes if await names.is_known(port, names.PREFIX, name, known)
        ]:
            return [(names.PREFIX, prefixes[0])]
        known = await _names_of(port, names.TAG) if tags else []
        return [(names.TAG, tag) for tag in tags if tag not in known]

    def _hint(self, turns: Sequence[Turn], unknown: Sequence[tuple[str, str]]) -> Hint:
        """Return a hint why nothing matched: an unknown prefix or tag, or addresses that differ."""

        def cause(found: Matches) -> str:
            for kind, name in unknown:
                meant = _did_you_mean(kind, name, found)
                if kind == names.PREFIX:
                    return f"nothing here has the prefix {name!r}{'; ' * bool(meant)}{meant}"
                if meant:
                    return f"nothing here has the tag {name!r}; {meant}"
            starts = tuple(f"{turn.group[2:]}:" for turn in turns if turn.group.startswith("p:"))
            there = [one for one in found.others if starts and one.startswith(starts)]
            return f"{SIMILAR} {there[0]!r}" if there else ""

        return cause

    def _match_warning(self, done: Invalidation) -> list[str]:
        """Return the warning that the first calls matched nothing, with a hint why."""
        if not self.checks_left:
            return []
        if not done.missed:
            self.checks_left = 0
            return []
        self.checks_left -= 1
        if not done.hint or (self.checks_left and SIMILAR in done.hint):
            return []
        self.checks_left = 0
        end = "" if done.hint.endswith("?") else "."
        message = (
            f"invalidate_cache of {self.function_name}: nothing matched "
            f"{done.target}{done.uncounted_caveat}; {done.hint}{end}"
        )
        return [message]

    def _tags(self, everything: Mapping[str, Any], wrong: list[Exception]) -> list[str] | None:
        """Return the tags of a call; None if they cannot be determined."""
        try:
            return [
                tag if isinstance(tag, str) else tag.resolve(everything).text for tag in self.tags
            ]
        except Exception as error:
            wrong.append(error)
            return None

    def _turns(
        self, everything: Mapping[str, Any], tags: Sequence[str] | None, wrong: list[Exception]
    ) -> tuple[list[Turn], str]:
        if tags is None:
            return [Turn("n")], "everything"
        turns = [turn for tag in tags for turn in tag_turns(tag)]
        named = [f"tag {tag}" for tag in tags]
        addresses: list[str] | None = None
        if self.has_resolver:
            try:
                addresses = self._addresses(everything)
            except Exception as error:
                wrong.append(error)
        for address in addresses or ():
            turns += address_turns(address)
            named.append(f"key {address}")
        if addresses is None and self.prefix is not None:
            turns.append(Turn(stamps.group("p", self.prefix)))
            named.append(f"prefix {self.prefix}")
        elif addresses is None and self.has_resolver:
            turns.append(Turn("n"))
            named.append("everything")
        return turns, ", ".join(named)

    def _fallback_warning(self, error: Exception, tagged: bool) -> str:
        """Report an error because of which more was invalidated; return the warning."""
        what = "the whole prefix" if tagged and self.prefix is not None else "everything"
        return self._failure_warning(error, f"{what} was invalidated instead")

    def _failure_warning(self, error: Exception, consequence: str) -> str:
        """Emit the event of an error; return the warning."""
        fault = f"{type(error).__name__}: {str(error).rstrip('.')}"
        message = f"invalidate_cache of {self.function_name}: {fault}"
        events.emit(events.Event(events.ERROR, reason="key_resolver", detail=message))
        return f"{message}; so {consequence}"

    def _addresses(self, everything: Mapping[str, Any]) -> list[str]:
        if self.template is not None:
            return [self._with_prefix(self.template.resolve(everything).text)]
        assert self.resolver is not None
        wanted = everything if self.resolver_arguments is None else self.resolver_arguments
        chosen = {name: everything[name] for name in wanted if name in everything}
        resolved = self.resolver(**chosen)
        self.resolver_gave_none = resolved is None
        return [
            self._with_prefix(address) for address in _address_list(resolved, self.function_name)
        ]

    def _with_prefix(self, address: str) -> str:
        if self.prefix is None or address.startswith(f"{self.prefix}:"):
            return address
        return f"{self.prefix}:{address}"


def _address_list(resolved: Any, function_name: str) -> list[str]:
    """Return the addresses in a resolver's result; a number is formatted as in a template."""
    if resolved is None:
        return []
    many = isinstance(resolved, (list, tuple, set, frozenset, Iterator))
    found = [_address(one) for one in (resolved if many else [resolved])]
    if not all(found):
        raise OptionError("key_resolver", resolved, f"of {function_name} returned an empty address")
    return found


def _address(value: Any) -> str:
    if isinstance(value, str):
        return value
    return resolvers.address_text(value, value_encoding(value, "key_resolver()"))


def _placeholders(signature: inspect.Signature) -> tuple[list[str], str]:
    """Return the names that placeholders may have, with `result`, and the name of `**kwargs`."""
    named = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    return [*named, "result"], "".join(signature.parameters.keys() - named)


def _template(text: str, signature: inspect.Signature) -> resolvers.Template:
    """Parse a template with placeholders for `result` and the function's arguments.

    Raises:
        OptionError: it has another placeholder, or none.
    """
    return resolvers.Template(text, *_placeholders(signature), "")


def _tag(text: str, signature: inspect.Signature) -> str | resolvers.Template:
    """Parse a tag, which may be a template.

    Raises:
        OptionError: it has a placeholder that is neither `result` nor an argument.
    """
    return resolvers.parse_tag(text, *_placeholders(signature), "")


def _resolver_arguments(
    resolver: Callable[..., Any], signature: inspect.Signature
) -> tuple[str, ...] | None:
    """Return the names of the arguments that a resolver takes; None if it takes `**kwargs`.

    Raises:
        OptionError: it takes one that is neither `result` nor an argument of the function.
    """
    return resolvers.declared_arguments("key_resolver", resolver, *_placeholders(signature), "")


def _by_name(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return bound arguments by name; those in `**kwargs` by their own names."""
    flat = dict(arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            flat.update(flat.pop(parameter.name, {}))
    return flat


def _checked_functions(option: str, value: Any) -> list[CachedFunction[Any, Any]]:
    one_only = isinstance(value, CachedFunction) or not isinstance(value, Iterable)
    many: list[Any] = [value] if one_only else list(cast("Iterable[Any]", value))
    many = [getattr(one, "__func__", one) for one in many]  # for a method, its function
    for one in many:
        if not isinstance(one, CachedFunction):
            raise OptionError(option, one, "must be functions that @cache decorates.")
    return many


_EXAMPLE: Final = '@invalidate_cache(key_prefix="products") above a function'


@public
def invalidate_cache(
    key_prefix: str | None = None,
    key_resolver: Callable[..., Any] | str | None = None,
    provider: CacheProtocol | Chain | None = None,
    *,
    functions: Iterable[CachedFunction[Any, Any]] = (),
    match: Iterable[str] = (),
    tags: Iterable[str] = (),
    soft: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Invalidate entries each time the decorated function, sync or async, has returned.

    If it raises, nothing is invalidated.

    Args:
        key_prefix: an address prefix; without `key_resolver`, all its entries are invalidated.
        key_resolver: the addresses to invalidate: a template such as `"products:{product_id}"` of
            the bound arguments and `result`, or a function that takes some of them by name and
            returns an address or a list of addresses (numbers and dates are formatted as in a
            template).  `key_prefix` is put in front of an address without it.
        provider: invalidate its entries only; default: those of every chain in use.
        functions: cached functions whose entries are invalidated.
        match: names of arguments of the decorated function: only those entries of `functions` are
            invalidated whose arguments of these names have the same values.  Default: all.
        tags: tags whose entries are invalidated, also templates such as `"user:{uid}"` of the bound
            arguments and `result`.
        soft: let the entries expire, as `memo.expire` does, instead of invalidating them.

    Raises:
        OptionError: no target is given, or an option is wrong.
    """
    if callable(key_prefix):
        raise OptionError("key_prefix", key_prefix, f"is a function; write {_EXAMPLE}.")
    prefix = options.text("key_prefix", key_prefix)
    targets = _checked_functions("functions", functions)
    matched, tagged = options.texts("match", match), options.texts("tags", tags)
    if key_resolver is not None and not (callable(key_resolver) or isinstance(key_resolver, str)):
        fix = "must be a template, or a function that returns addresses."
        raise OptionError("key_resolver", key_resolver, fix)
    options.flag("soft", soft)
    if matched and not targets:
        raise OptionError("match", matched, "selects entries of functions=, which is missing.")
    if prefix is None and key_resolver is None and not targets and not tagged:
        fix = "leaves nothing to invalidate; give key_prefix, key_resolver, functions or tags."
        raise OptionError("key_prefix", None, fix)
    for target in targets:
        target._function.keyer.check_names("match", matched)
    assembly.chain_getter(provider)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if isinstance(function, (staticmethod, classmethod)):
            kind: Any = type(function)
            return cast("Callable[P, R]", kind(decorate(function.__func__)))
        options.function("function", function, generators=False, example=_EXAMPLE)
        plan = InvalidationAfterCall(
            function, prefix, key_resolver, provider, targets, matched, tagged, soft
        )
        if options.is_async(function):
            return cast("Callable[P, R]", _async(function, plan))
        return _sync(function, plan)

    return public(decorate)


def _sync(function: Callable[P, R], plan: InvalidationAfterCall) -> Callable[P, R]:
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            cut_to_user_frames(error)
            raise
        if inspect.iscoroutine(result):  # it has not run yet
            return cast("R", _await_and_invalidate(result, plan, args, kwargs))
        drive(plan.carry_out(BLOCKING, result, args, kwargs))
        return result

    return wrapper


def _async(function: Callable[..., Any], plan: InvalidationAfterCall) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return await _await_and_invalidate(function(*args, **kwargs), plan, args, kwargs)

    return wrapper


async def _await_and_invalidate(
    work: Awaitable[Any],
    plan: InvalidationAfterCall,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    try:
        port = native()  # fails before the function runs: after a run, it has to invalidate
    except EventLoopError:
        if inspect.iscoroutine(work):
            work.close()
        raise
    try:
        result = await work
    except Exception as error:
        cut_to_user_frames(error)
        raise
    await _run_uncancelled(port, lambda port: plan.carry_out(port, result, args, kwargs))
    return result


async def _run_uncancelled(port: Port, work: Callable[[Port], Coroutine[Any, Any, None]]) -> None:
    """Run work that goes on even if its caller is cancelled, and wait for it."""
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
