"""Turn the arguments of a call into the key of its entry, and the address that invalidates it.

Rules of this module:

1.  All spellings of a call have one key: positional, by keyword, in any order, with defaults.
2.  The *key* is made of the function, the class of `self`, the code version and the typed
    arguments.  The *address* is readable text, `prefix:arg:arg`; several keys may share one.
3.  The signature is read at decoration; calls are bound by a plan that is made then.
4.  Everything about a call is derived from encodings made before the function runs, so a function
    that changes its arguments does not change the key.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

from memo.errors import KeyingError, OptionError, label, nearest_hint, shown, type_named
from memo.keys import instances, resolvers, summaries
from memo.keys.bindings import (
    NOT_GIVEN,
    BindingError,
    annotated_converters,
    annotations_of,
    bind,
    empty_function,
    make_plan,
    signature_of,
)
from memo.keys.encoding import atoms
from memo.keys.encoding.atoms import SIMPLE
from memo.keys.encoding.canonical import Unkeyable
from memo.keys.fingerprint.function_version import Identity
from memo.keys.fingerprint.held_values import STATELESS, SelfState
from memo.keys.instances import Attributes
from memo.keys.offloading import LIGHT_ENCODERS, refuse_heavy
from memo.keys.resolvers import Resolved, Resolver, Template, address_text
from memo.keys.values import value_encoding
from memo.records.stamp_types import ADDRESS, Ref
from memo.runtime.checksums import blake2b
from memo.runtime.named_tuple import NamedTuple, new_tuple
from memo.settings import options
from memo.validity import stamps

MAX_MEMOIZED_CALLS: Final = 256
"""Maximum number of calls of a function whose keys are memoized.  A hit in memory takes 4.4 µs with
that and 6.1 without (the row "hit, 5-field dict, memory" of docs/performance.md)."""
MAX_CALLS_SEEN_ONCE: Final = 1024
"""Maximum number of calls that are remembered as seen once; beyond it all are forgotten."""
MAX_MEMOIZED_CHARACTERS: Final = 256
"""Maximum length in characters of a text argument whose call is memoized."""
_STEADY_TYPES: Final = frozenset({int, type(None)})
"""Types besides text that are immutable, and whose equal values have equal encodings.  Bool and
float do not qualify: `True` equals 1, and 0.0 equals -0.0."""
GLOBAL_PREFIX: Final = "global:"
"""Prefix of the names of globals in `ignore`."""
SELF_STATE: Final = "@self"
"""Name for the digest of `self` among the digests of the arguments."""
RESULT: Final = "result"
"""Name under which a template or a callable for tags gets the result."""
CACHE_KEY: Final = "__cache_key__"
"""Method by which a class defines the key of its instances, for its cached methods."""


# --- addresses -----------------------------------------------------------------------------------


MAX_PREFIX_CHARACTERS = 1000
"""Maximum length of a prefix in characters; only so much of an address is searched for prefixes."""
MAX_KEYWORD_CHARACTERS = 200
"""Maximum length in characters of a keyword in generations; a longer one is represented by its
digest."""


def normal_prefix(key_prefix: str) -> str:
    """Check an address prefix; return it without its trailing colon.

    Raises:
        OptionError: it is empty, is too long, or has braces.
    """
    prefix = key_prefix.rstrip(":")
    if len(prefix) > MAX_PREFIX_CHARACTERS:
        fix = f"has {len(prefix):,} characters; a prefix has at most {MAX_PREFIX_CHARACTERS:,}."
        raise OptionError("key_prefix", key_prefix, fix)
    if not set("{}").isdisjoint(prefix):
        fix = "is static, so it has no braces; write a template as key_resolver=."
        raise OptionError("key_prefix", key_prefix, fix)
    if not prefix:
        raise OptionError("key_prefix", key_prefix, 'is empty; write a name such as "products".')
    return prefix


def address(prefix: str, *parts: str) -> str:
    """Return the address made of a prefix and parts: `prefix:part:part`."""
    return ":".join((prefix, *parts))


def possible_prefixes(address: str) -> list[str]:
    """Return the prefixes that an address may have, shortest first: each part before a colon."""
    head = address[: MAX_PREFIX_CHARACTERS + 1]
    ends = [at for at, one in enumerate(head) if one == ":" and at <= MAX_PREFIX_CHARACTERS]
    whole = [address] if len(address) <= MAX_PREFIX_CHARACTERS else []
    return [*(head[:end] for end in ends), *whole]


@functools.lru_cache(maxsize=1024)
def prefix_groups(prefix: str) -> tuple[str, ...]:
    """Return the groups of a prefix, and of each prefix that it begins with."""
    return tuple(stamps.group("p", one) for one in possible_prefixes(prefix))


def address_digest(address: str) -> str:
    """Return the digest of an address in the group of its prefix: 16 hexadecimal digits."""
    return atoms.short_digest(atoms.text(address))


def _with_prefix(prefix: str, text: str) -> str:
    """Put a prefix in front of a text, unless it begins with that already."""
    if text == prefix or text.startswith(f"{prefix}:"):
        return text
    return f"{prefix}:{text}"


# --- one call ------------------------------------------------------------------------------------


class SelfPart(NamedTuple):
    """The part of `self` or `cls` that belongs to a key.

    Attributes:
        owner: its class, `"module:qualname"`.
        value: the key that the class defines for the instance, or `NOT_GIVEN`.
        encoding: the encoding of that value, or of the attributes that count; it may be empty.
        state: the attributes that count.
    """

    owner: str
    value: Any = NOT_GIVEN
    encoding: bytes = b""
    state: Attributes = instances.NO_ATTRIBUTES

    def digest(self) -> str:
        """Return the digest of the class and the state: 16 hexadecimal digits."""
        return atoms.short_digest(atoms.text(self.owner) + self.encoding)

    def describe(self, parameter: str) -> Iterator[tuple[str, str, str]]:
        """Yield name, short text and digest of the class, and of each attribute that counts.

        Args:
            parameter: the name of the parameter that takes it, such as `"@self"`.
        """
        described = (
            "" if self.value is NOT_GIVEN else summaries.describe_value(CACHE_KEY, self.value)
        )
        name = self.owner.rpartition(":")[2]
        encoding = b"" if self.state.names else self.encoding
        digest = atoms.short_digest(atoms.text(self.owner) + encoding)
        yield parameter, (f"{name}({described})" if described else name), digest
        for name, value, one in zip(*self.state[:3], strict=True):
            text = "nothing" if value is NOT_GIVEN else summaries.describe_value(name, value)
            yield f"{parameter}.{name}" if name else f"{parameter}.*", text, atoms.short_digest(one)


class Call:
    """A call: its key, its address and its groups.

    Attributes:
        text: the key: 40 hexadecimal digits.
        code: the code version that is part of it.
    """

    __slots__ = (
        "__dict__",
        "_encodings",
        "_keyer",
        "_names",
        "_resolved",
        "_self_part",
        "_tags",
        "_values",
        "code",
        "text",
    )

    def __init__(
        self,
        text: str,
        keyer: Keyer,
        names: tuple[str, ...],
        values: Sequence[Any],
        encodings: Sequence[bytes],
        resolved: Resolved | None = None,
        tags: tuple[str, ...] = (),
        self_part: SelfPart | None = None,
        code: str = "",
    ) -> None:
        self.text = text
        self.code = code
        self._keyer = keyer
        self._names = names
        self._values = values
        self._encodings = encodings
        self._resolved = resolved
        self._tags = tags
        self._self_part = self_part

    def __repr__(self) -> str:
        return f"<call {self._keyer.function_id} {self.text}>"

    @property
    def address(self) -> str:
        """The address, `"prefix:arg:arg"`."""
        return self.addresses[0][1]

    @functools.cached_property
    def addresses(self) -> tuple[tuple[str, str], ...]:
        """The prefixes of the call, each with the address under it; the first is the main one."""
        if self._resolved is not None:
            return self._keyer.resolved_addresses(self._resolved.text)
        prefix = self._keyer.prefix
        return ((prefix, address(prefix, *self._address_parts())),)

    @property
    def shown(self) -> str:
        """The address for display, without secret arguments."""
        prefix, whole = self.addresses[0]
        resolved = self._resolved is not None
        return summaries.mask_address(whole, prefix, self.summary, resolved=resolved)

    def _address_parts(self) -> list[str]:
        found: list[str] = []
        fixed = self._keyer.names
        for at, name, value, encoding in self._sorted_arguments():
            if at < len(fixed) and name == self._keyer.plan.var_positional:
                found += [address_text(item, value_encoding(item, name)) for item in value]
            elif at < len(fixed):
                found.append(address_text(value, encoding))
            else:
                found.append(f"{name}={address_text(value, encoding)}")
        return found

    def _sorted_arguments(self) -> list[tuple[int, str, Any, bytes]]:
        """Return position, name, value and encoding of each argument; sort `**kwargs` by name.

        The key depends on the order of `**kwargs`; the address and the summary do not.
        """
        count = len(self._names)
        every = list(zip(range(count), self._names, self._values, self._encodings, strict=True))
        fixed = count if self._resolved is not None else len(self._keyer.names)
        return every[:fixed] + sorted(every[fixed:], key=lambda one: one[1])

    @functools.cached_property
    def _digests(self) -> list[str]:
        """The digest of each argument, as `arguments` and the summary show it."""
        return list(map(atoms.short_digest, self._encodings))

    @functools.cached_property
    def arguments(self) -> tuple[tuple[str, str], ...]:
        """The name and the digest (16 hexadecimal digits) of each argument, sorted by name."""
        pairs = list(zip(self._keyer.ref_names(self._names), self._digests, strict=True))
        if self._resolved is not None:
            pairs.append((ADDRESS, atoms.short_digest(self._resolved.encoding)))
        if self._self_part is not None:
            pairs.append((SELF_STATE, self._self_part.digest()))
        return tuple(sorted(pairs))

    @property
    def self_state(self) -> Attributes:
        """The attributes of `self` in the key, as they were when it was made."""
        return instances.NO_ATTRIBUTES if self._self_part is None else self._self_part.state

    @property
    def depends_on_order(self) -> bool:
        """True if it has several entries of `**kwargs`, whose order is part of the key."""
        return self._resolved is None and len(self._names) > len(self._keyer.names) + 1

    @property
    def left_out(self) -> tuple[str, ...]:
        """Descriptions of the state of `self` that has no sound key."""
        lost = () if self._self_part is None else self._self_part.state.left_out
        return tuple(f"{self._keyer.plan.self_name}.{path}: {why}" for path, why in lost)

    @functools.cached_property
    def refs(self) -> tuple[Ref, ...]:
        """The generations on which an entry of this call depends."""
        refs = [Ref("n"), Ref(f"f:{self._keyer.function_id}", self.arguments)]
        for prefix, whole in self.addresses:
            pair = ((ADDRESS, address_digest(whole)),)
            refs += [Ref(group, pair) for group in prefix_groups(prefix)]
        refs += [Ref(stamps.group("t", tag)) for tag in self._tags]
        return tuple(refs)

    @functools.cached_property
    def summary(self) -> str:
        """JSON for display: see `summaries`."""
        return summaries.make_summary(self._describe())

    def encoded_arguments(self) -> Iterator[tuple[str, Any, bytes]]:
        """Yield name, value and encoding of each argument."""
        return zip(self._names, self._values, self._encodings, strict=True)

    def _describe(self) -> Iterator[tuple[str, str, str]]:
        """Yield name, short text and digest of each part of the key."""
        if self._self_part is not None:
            yield from self._self_part.describe(
                f"{summaries.SPECIAL_PREFIX}{self._keyer.plan.self_name}"
            )
        if self._resolved is not None:
            names = (*self._keyer.plan.names, *self._names)
            hidden = next(filter(summaries.is_secret, names), "")
            text = summaries.describe_value(hidden, self._resolved.text)
            yield summaries.RESOLVED, text, atoms.short_digest(self._resolved.encoding)
        for at, name, value, _ in self._sorted_arguments():
            yield name, summaries.describe_value(name, value), self._digests[at]


class _Head(NamedTuple):
    """The first part that the keys of a function and class have in common, with its sources."""

    code: str
    state: SelfState
    facts: bytes


# --- the maker of keys ---------------------------------------------------------------------------


class Keyer:
    """Makes the keys of a function; it checks all options, at decoration.

    Args:
        function: the function itself.
        identity: its code version.
        function_id: its id, `"module:qualname"` or its `name`.
        key_prefix: address prefix; None: the function's name.
        key_resolver: a callable, a template, a list of names, or None.
        ignore: names of arguments that are not part of the key.
        tags: names, or a callable that returns them from the bound arguments.
        method: its first positional argument is `self` or `cls`.
        form: the form of its entries if it is not the result: its output as well, say.

    Attributes:
        usual_count: a call with this many positional arguments, `self` included, and no others
            fits the function; -1: such calls have to be bound.

    Raises:
        OptionError: an option is wrong.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        identity: Identity,
        function_id: str,
        key_prefix: str | None,
        key_resolver: Any,
        ignore: Iterable[str],
        tags: Iterable[str] | Callable[..., Any],
        method: bool,
        form: str = "",
    ) -> None:
        self.identity = identity
        self.function_id = function_id
        self._form_mark = f"+{form}" if form else ""
        self._function = function
        self._given_resolver = key_resolver
        self._given_tags = tags
        self._ignore = options.texts("ignore", ignore)
        self._fixed_prefix = None if key_prefix is None else normal_prefix(key_prefix)
        self.prefix = self._fixed_prefix or function_id.rpartition(":")[2]
        self._signature = signature_of(function)
        self._annotated = annotated_converters(function, self._signature)
        self.method = method

    @property
    def method(self) -> bool:
        """True if the first positional argument is `self` or `cls`."""
        return self._method

    @method.setter
    def method(self, method: bool) -> None:
        self._method = method
        self._prepare()

    def _prepare(self) -> None:
        """Prepare everything that is the same for all calls."""
        self.plan = make_plan(self._signature, self._method)
        self._check_known("ignore", self._ignore)
        self.names = tuple(n for n in self.plan.names if n not in self._ignore)
        kept = [i for i, name in enumerate(self.plan.names) if name not in self._ignore]
        self._kept_positions = kept if len(kept) < len(self.plan.names) else None
        plain = not (self.plan.var_positional or self.plan.keyword_only)
        self._positional_count = (
            len(self.plan.positional) if plain and self._kept_positions is None else -1
        )
        self.usual_count = (
            self._positional_count + self._method if self._positional_count >= 0 else -1
        )
        self._converters = {n: f for n, f in self._annotated.items() if n in self.names}
        self._resolver = self._checked_resolver()
        self._prepare_tags()
        made = bool(self._templates) or (callable(self._given_tags) and not self.has_late_tags)
        self._needs_names = bool(self._converters) or self._resolver is not None or made
        self._heads: dict[str, _Head] = {}
        self._warned_left_out = False
        self._self_counts = self._method and not self._options_cover_self()
        self._memoizable_count = -1 if self._method or self._needs_names else self._positional_count
        self.seen_once: set[int] = set()
        self._fitting_shapes: set[tuple[Any, ...]] = set()
        self.memoized: dict[tuple[Any, ...], tuple[str, Call]] = {}

    def _options_cover_self(self) -> bool:
        """True if the options say what counts of `self`."""
        self_name = self.plan.self_name
        needs = () if self._resolver is None else self._resolver.needs or ()
        return self_name in self._ignore or self_name in needs

    def _check_known(self, option: str, names: Iterable[str]) -> None:
        for name in names:
            if name == self.plan.self_name != "":
                continue
            if name not in self.plan.names and not self.plan.var_keyword:
                known = ", ".join(self.plan.names) or "none"
                near = nearest_hint(name, self.plan.names) or "."
                fix = f"is not an argument of the function, which has: {known}{near}"
                raise OptionError(option, name, fix)

    def _checked_resolver(self) -> Resolver | None:
        if self._given_resolver is None:
            return None
        names, extra, self_name = self.plan.names, self.plan.var_keyword, self.plan.self_name
        return resolvers.make_resolver(self._given_resolver, names, extra, self_name)

    def _prepare_tags(self) -> None:
        """Separate the tags that are fixed, that need the arguments, and that need the result."""
        names, extra, self_name = self.plan.names, self.plan.var_keyword, self.plan.self_name
        given, every = self._given_tags, (*names, RESULT)
        self._tags: tuple[str, ...] = ()
        self._templates: tuple[Template, ...] = ()
        self._late_templates: tuple[Template, ...] = ()
        self._tag_arguments: tuple[str, ...] | None = ()
        self.has_late_tags = False
        if callable(given):
            self.has_late_tags = RESULT not in names and _has_parameter(given, RESULT)
            known = every if self.has_late_tags else names
            self._tag_arguments = resolvers.declared_arguments(
                "tags", given, known, extra, self_name
            )
            return
        parsed = [
            resolvers.parse_tag(one, every, extra, self_name)
            for one in options.texts("tags", given)
        ]
        self._tags = tuple(one for one in parsed if isinstance(one, str))
        made = [one for one in parsed if not isinstance(one, str)]
        late = [one for one in made if RESULT in one.needs and RESULT not in names]
        self._late_templates = tuple(late)
        self._templates = tuple(one for one in made if one not in late)
        self.has_late_tags = bool(late)

    @property
    def fixed_tags(self) -> list[str]:
        """The tags that every entry has."""
        return list(self._tags)

    def check_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check that the arguments of a call fit the function.

        Raises:
            TypeError: they do not; the message is the function's own.
        """
        shape = (len(args), *kwargs)
        if shape in self._fitting_shapes:
            return
        skipped = 1 if self._method else 0
        if len(args) < skipped:
            self._raise_misfit(args, kwargs)
        try:
            bind(self.plan, args[skipped:], kwargs)
        except BindingError:
            self._raise_misfit(args, kwargs)
        if len(self._fitting_shapes) < MAX_MEMOIZED_CALLS:
            self._fitting_shapes.add(shape)

    # --- a call ---------------------------------------------------------------------------------

    def owner(self, args: tuple[Any, ...]) -> type | None:
        """Return the class of the object that a method is called on; None for a function."""
        if not self._method or not args:
            return None
        own = args[0]
        return own if isinstance(own, type) else type(own)

    def code(self, args: tuple[Any, ...]) -> str:
        """Return the code version for a call; for a method it depends on the object's class."""
        return self.identity.digest_for_call(self.owner(args))

    def state(self, own: Any) -> SelfState:
        """Return the description of the state that the method reads of an object."""
        if own is NOT_GIVEN or not self._method or isinstance(own, type):
            return STATELESS
        self.identity.digest(type(own))
        return self.identity.state(type(own))

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], light: bool = False) -> Call:
        """Make the key, address and groups of a call.

        Args:
            light: refuse arguments whose key would take long to make.

        Raises:
            KeyingError: an argument has no sound key, or a user's function for keys raised.
            TypeError: the arguments do not fit the function.
            HeavyError: with `light`: the arguments are too big.
        """
        owner = self.owner(args) if self._method else None
        code = self.identity.digest_for_call(owner)
        state = STATELESS if owner is None else self.identity.state(owner)
        if self._self_counts:
            return self._call_on_object(code, args, kwargs, light, state)
        steady = len(args) == self._memoizable_count and not kwargs
        if steady:
            for value in args:
                kind = type(value)
                if kind is str:
                    if len(value) > MAX_MEMOIZED_CHARACTERS:
                        steady = False
                elif kind not in _STEADY_TYPES:
                    steady = False
            known = self.memoized.get(args) if steady else None
            if known is not None and known[0] == code:
                return known[1]
        call = self._make_call(code, args, kwargs, light, state)
        if steady:
            self._remember(code, args, call)
        return call

    def _call_on_object(
        self,
        code: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        light: bool,
        state: SelfState,
    ) -> Call:
        """Make the call of a method for which the state of its object counts; memoize it."""
        memo_key = None
        if not kwargs and len(args) == self.usual_count:
            memo_key = self._memo_key(args, state)
            known = None if memo_key is None else self.memoized.get(memo_key)
            if known is not None and known[0] == code:
                return known[1]
        call = self._make_call(code, args, kwargs, light, state)
        if memo_key is not None:
            self._remember(code, memo_key, call)
        return call

    def _memo_key(self, args: tuple[Any, ...], state: SelfState) -> tuple[Any, ...] | None:
        """Return the class, types and values that determine a method's call, if these alone do."""
        own, *given = args
        kind = type(own)
        if self._needs_names or not instances.is_plain(kind, state):
            return None
        held = instances.dict_of(own, kind)
        try:
            given += [held[name] for name in state.names]
        except KeyError:
            return None
        kinds = []
        for value in given:
            one = type(value)
            if one is str:
                if len(value) > MAX_MEMOIZED_CHARACTERS:
                    return None
            elif one is float:
                if not value or value != value:  # noqa: PLR0124 - 0.0 == -0.0, NaN != NaN
                    return None
            elif one is not int and one is not bool and value is not None:
                return None
            kinds.append(one)
        return (kind, *kinds, *given)

    def _make_call(
        self,
        code: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        light: bool,
        state: SelfState,
    ) -> Call:
        own: Any = None
        self_part: SelfPart | None = None
        if self._method:
            if not args:
                self._raise_misfit(args, kwargs)
            own, args = args[0], args[1:]
            self_part = self.self_part(own, state, light)
        if kwargs or len(args) != self._positional_count or self._needs_names:
            if light:
                refuse_heavy(args, kwargs)
            return self._make_call_by_binding(code, own, self_part, state, args, kwargs)
        try:
            if light:
                encodings = [LIGHT_ENCODERS[type(value)](value) for value in args]
            else:
                encodings = [SIMPLE[type(value)](value) for value in args]
        except KeyError:
            if light:
                refuse_heavy(args, kwargs)
            encodings = [self.encode_argument(n, v) for n, v in zip(self.names, args, strict=True)]
        head = self._head(self_part, state, code)
        text = blake2b(head + b"".join(encodings), digest_size=atoms.DIGEST_BYTES).hexdigest()
        return Call(text, self, self.names, args, encodings, None, self._tags, self_part, code)

    def _remember(self, code: str, args: tuple[Any, ...], call: Call) -> None:
        """Memoize a call from its second occurrence on; one-off calls are not worth it.

        A full table takes no more calls; when enough other calls were seen it is cleared.

        Args:
            args: the values that determine the call; all of them are immutable.
        """
        hashed = hash(args)
        if hashed not in self.seen_once:
            if len(self.seen_once) >= MAX_CALLS_SEEN_ONCE:
                self.seen_once, self.memoized = set(), {}
            self.seen_once.add(hashed)
        elif len(self.memoized) < MAX_MEMOIZED_CALLS or args in self.memoized:
            self.memoized[args] = code, call

    def _head(self, self_part: SelfPart | None, state: SelfState, code: str) -> bytes:
        """Return the first part of a key: function, class, code version and state."""
        owner = "" if self_part is None else self_part.owner
        known = self._heads.get(owner)
        if known is None or known.code != code or known.state is not state:
            facts = atoms.text(self.function_id) + atoms.text(owner)
            facts += atoms.text(code + self._form_mark) + value_encoding(self.names)
            if self._self_counts:
                facts += value_encoding((state.names, state.whole))
            known = self._heads[owner] = _Head(code, state, facts)
        return known.facts if self_part is None else known.facts + self_part.encoding

    def _make_call_by_binding(
        self,
        code: str,
        own: Any,
        self_part: SelfPart | None,
        state: SelfState,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Call:
        try:
            values, extra = bind(self.plan, args, kwargs)
        except BindingError:
            self._raise_misfit(args if not self._method else (own, *args), kwargs)
        head = self._head(self_part, state, code)
        if self._needs_names:
            everything = self._arguments_by_name(own, values, extra)
            tags = self._tags_of(everything)
            if self._resolver is not None:
                return self._call_from_resolver(code, head, everything, tags, self_part)
        else:
            tags = self._tags
        return self._call_from_arguments(code, head, values, extra, tags, self_part)

    def _call_from_arguments(
        self,
        code: str,
        head: bytes,
        values: list[Any],
        extra: dict[str, Any],
        tags: tuple[str, ...],
        self_part: SelfPart | None,
    ) -> Call:
        """Make a call whose key consists of its arguments."""
        if self._kept_positions is not None:
            values = [values[i] for i in self._kept_positions]
        names = self.names
        encodings = self._encode_all(names, values)
        if extra:
            extra = self._counted_keywords(extra)
        if extra:
            head += b"*" + value_encoding(list(extra))
            encodings += self._encode_all(tuple(extra), list(extra.values()))
            names, values = names + tuple(extra), [*values, *extra.values()]
        text = blake2b(head + b"".join(encodings), digest_size=atoms.DIGEST_BYTES).hexdigest()
        return Call(text, self, names, values, encodings, None, tags, self_part, code)

    def _counted_keywords(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of `**kwargs` that are not ignored, by their names or as a whole."""
        if self.plan.var_keyword in self._ignore:
            return {}
        return {name: value for name, value in extra.items() if name not in self._ignore}

    def _call_from_resolver(
        self,
        code: str,
        head: bytes,
        everything: Mapping[str, Any],
        tags: tuple[str, ...],
        self_part: SelfPart | None,
    ) -> Call:
        """Make a call whose key comes from the resolver."""
        resolved = self._resolve(everything)
        chosen = self._selecting_encodings(everything)
        return Call(
            atoms.hashed(head + b"@" + resolved.encoding).hex(),
            self,
            tuple(chosen),
            [everything[name] for name in chosen],
            list(chosen.values()),
            resolved,
            tags,
            self_part,
            code,
        )

    def _arguments_by_name(
        self, own: Any, values: list[Any], extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        everything = dict(zip(self.plan.names, values, strict=True))
        everything.update({n: v for n, v in extra.items() if n not in everything})
        if self.plan.self_name:
            everything[self.plan.self_name] = own
        return everything

    def _raise_misfit(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> NoReturn:
        name = getattr(self._function, "__qualname__", self.function_id)
        try:
            empty_function(name, self._signature)(*args, **kwargs)
        except TypeError as error:
            raise TypeError(str(error)) from None
        raise TypeError(f"{name}() does not take these arguments")

    def self_part(self, own: Any, state: SelfState, light: bool = False) -> SelfPart:
        """Return the part of `self` or `cls` in a key: its own key, or the state that counts."""
        kind = own if isinstance(own, type) else type(own)
        owner = f"{kind.__module__}:{kind.__qualname__}"
        if not self._self_counts:
            return SelfPart(owner)
        if hasattr(kind, CACHE_KEY):
            return self._key_from_class(owner, own)
        found = instances.attributes_of(own, state, light)
        if found.left_out and not self._warned_left_out:
            self._warn_left_out(found)
        encoding = b"".join(found.encodings)
        made: SelfPart = new_tuple(SelfPart, (owner, NOT_GIVEN, encoding, found))
        return made

    def _key_from_class(self, owner: str, own: Any) -> SelfPart:
        """Return the key that a class defines for its instances."""
        function = getattr(own, CACHE_KEY)
        if isinstance(own, type) and not hasattr(function, "__self__"):
            return SelfPart(owner)
        try:
            value = function()
            encoding = value_encoding(value, f"{self.plan.self_name}.{CACHE_KEY}()")
            return SelfPart(owner, value, b"&" + atoms.with_length(encoding))
        except Unkeyable as error:
            raise resolvers.as_keying_error(error, self.function_id, self.plan.self_name) from None
        except Exception as error:
            message = f"{CACHE_KEY}() raised {type(error).__name__}: {error}"
            raise KeyingError(f"{label(self.function_id)}: {message}") from error

    def _warn_left_out(self, found: Attributes) -> None:
        """Warn once about state of `self` that is left out of the keys, and how to decide."""
        self._warned_left_out = True
        self_name = self.plan.self_name or "self"
        names = sorted({f"{self_name}.{path}" for path, _ in found.left_out})
        lost = ", ".join(names)
        verbs = "has no sound key and is" if len(names) == 1 else "have no sound key and are"
        warnings.warn(
            f"{label(self.function_id)} reads {lost}, which {verbs} left out: "
            "objects that differ only there share results. Decide what counts: a method "
            f"{CACHE_KEY}() on the class, "
            f'key_resolver="{{{self_name}.tenant}}:{{x}}", or ignore=["{self_name}"].',
            stacklevel=2,
        )

    def _encode_all(self, names: Sequence[str], values: Sequence[Any]) -> list[bytes]:
        if not self._converters:
            try:
                return [SIMPLE[type(value)](value) for value in values]
            except KeyError:
                pass
        return [
            self.encode_argument(name, value) for name, value in zip(names, values, strict=True)
        ]

    def encode_argument(self, name: str, value: Any) -> bytes:
        """Return the encoding of one argument, as it is in keys."""
        if name in self._converters:
            value = self._converters[name](value)
        try:
            return value_encoding(value, name)
        except Unkeyable as error:
            if self.plan.defaults.get(name, NOT_GIVEN) is value:
                return b"~default"  # a marker such as object(), which only the code gives a meaning
            raise resolvers.as_keying_error(error, self.function_id, name) from error.__cause__

    def _resolve(self, everything: Mapping[str, Any]) -> Resolved:
        assert self._resolver is not None
        try:
            return self._resolver.resolve(everything)
        except KeyingError as error:
            raise KeyingError(f"{label(self.function_id)}: {error}") from error.__cause__
        except Unkeyable as error:
            name = re.split(r"[.\[(]", error.path, maxsplit=1)[0]
            raise resolvers.as_keying_error(error, self.function_id, name) from error.__cause__

    def _tags_of(self, everything: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the tags of a call that do not depend on its result."""
        if callable(self._given_tags):
            return () if self.has_late_tags else self._tags_from_callable(everything)
        if not self._templates:
            return self._tags
        return (*self._tags, *self._fill_templates(self._templates, everything))

    def _tags_from_callable(self, everything: Mapping[str, Any]) -> tuple[str, ...]:
        assert callable(self._given_tags)
        try:
            tags = resolvers.call_resolver(
                self._given_tags, "tags", self._tag_arguments, self.plan.self_name, everything
            )
        except KeyingError as error:
            raise KeyingError(f"{label(self.function_id)}: {error}") from error.__cause__
        return options.texts("tags", tags)

    def _fill_templates(
        self, templates: Iterable[Template], everything: Mapping[str, Any]
    ) -> tuple[str, ...]:
        try:
            return tuple(template.resolve(everything).text for template in templates)
        except KeyingError as error:
            message = str(error).replace("key_resolver", "tags")
            raise KeyingError(f"{label(self.function_id)}: {message}") from error.__cause__

    def late_tags(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> tuple[str, ...]:
        """Return the tags of a call that depend on its result.

        Raises:
            KeyingError: the callable raised, or a placeholder cannot be resolved.
            OptionError: the callable did not return a list of texts.
        """
        own = args[0] if self._method else None
        values, extra = bind(self.plan, args[1:] if self._method else args, kwargs)
        everything = {**self._arguments_by_name(own, values, extra), RESULT: result}
        if callable(self._given_tags):
            return self._tags_from_callable(everything)
        return self._fill_templates(self._late_templates, everything)

    # --- addresses given by a caller --------------------------------------------------------------

    def resolved_addresses(self, text: str) -> tuple[tuple[str, str], ...]:
        """Return the prefixes and addresses of a resolved text.

        Without a `key_prefix` there may be two: under the prefix that the text begins with, and
        under the function's name.
        """
        assert self._resolver is not None
        by_prefix = self.prefix, _with_prefix(self.prefix, text)
        if self._fixed_prefix is not None:
            return (by_prefix,)
        if self._resolver.head:
            return (self._resolver.head, text), by_prefix
        first, colon, _ = text.partition(":")
        if colon and first and first != self.prefix:
            return by_prefix, (first, text)
        return (by_prefix,)

    # --- invalidation by arguments --------------------------------------------------------------

    def argument_digests(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        own: Any = NOT_GIVEN,
        state: SelfState = STATELESS,
        helper: str = "invalidate",
    ) -> tuple[tuple[tuple[str, str], ...], bool]:
        """Return the names and digests of some arguments, and True if they determine the call.

        Args:
            args: positional arguments; for a method without `self`.
            own: the object whose entries are selected; `NOT_GIVEN`: those of all objects.
            state: the state of the object that the method reads.
            helper: the name of the helper that was called, for errors.

        Raises:
            OptionError: there is no such argument, or none of them selects entries.
            KeyingError: an argument has no sound key.
        """
        given, extra = self._given_arguments(args, kwargs, helper)
        self_digest = (
            () if own is NOT_GIVEN else ((SELF_STATE, self.self_part(own, state).digest()),)
        )
        if not given and not extra:
            return self_digest, False
        if self._resolver is not None:
            everything = {**extra, **given}
            if self_digest:
                everything[self.plan.self_name] = own
            return tuple(sorted((*self_digest, *self._digests_by_resolver(everything)))), False
        chosen = [(n, n, v) for n, v in given.items() if n not in self._ignore]
        if extra:
            counted = self._counted_keywords(extra)
            chosen += [(self._ref_name(n), n, v) for n, v in counted.items()]
        if not chosen:
            raise _not_selecting_error({**extra, **given})
        pairs = [
            (safe, atoms.short_digest(self.encode_argument(name, v))) for safe, name, v in chosen
        ]
        counts = self.plan.var_keyword and self.plan.var_keyword not in self._ignore
        whole = given.keys() >= set(self.names) and not counts
        return tuple(sorted((*self_digest, *pairs))), whole and bool(
            self_digest or not self._method
        )

    def arguments_text(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Describe some arguments as in the source of a call: see `summaries`."""
        names = (*self.plan.names, *[""] * len(args))
        pairs = zip(names, args, strict=False)
        texts = [summaries.describe_value(name, value) for name, value in pairs]
        texts += [f"{k}={summaries.describe_value(k, value)}" for k, value in kwargs.items()]
        return ", ".join(texts)

    def type_mismatches(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Describe the arguments whose type does not match their annotation; `""` if none."""
        given = {**dict(zip(self.plan.names, args, strict=False)), **kwargs}
        wrong = [
            f"{name}={shown(given[name])} is {type_named(type(given[name]))}, "
            f"but is annotated {_annotation_text(hint)}"
            for name, hint in annotations_of(self._function, self._signature)
            if name in given and hint is not inspect.Parameter.empty
            if not _may_be_of(given[name], hint)
        ]
        return "; ".join(dict.fromkeys(wrong))

    def _given_arguments(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], helper: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the given parameters, and the entries of `**kwargs`."""
        try:
            values, extra = bind(self.plan, args, kwargs, not_given=NOT_GIVEN)
        except BindingError:
            own = self.plan.self_name
            if own and own in kwargs:
                fix = "is the object of a method: for its entries, call the helper on it instead."
                raise OptionError(own, kwargs[own], fix) from None
            self.check_names(helper, kwargs)
            many = f"takes at most {len(self.plan.positional)} arguments by position, each once."
            raise OptionError(helper, tuple(args), many) from None
        pairs = zip(self.plan.names, values, strict=True)
        return {name: value for name, value in pairs if value is not NOT_GIVEN}, extra

    def _digests_by_resolver(self, given: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """Return the digest of the resolved value, or of the arguments if too few are given."""
        assert self._resolver is not None
        needs = self.plan.names if self._resolver.needs is None else self._resolver.needs
        if given.keys() >= set(needs):
            return ((ADDRESS, atoms.short_digest(self._resolve(given).encoding)),)
        chosen = self._selecting_encodings(given)
        if not chosen:
            raise _not_selecting_error(given)
        return tuple(
            sorted((self._ref_name(n, False), atoms.short_digest(e)) for n, e in chosen.items())
        )

    def _selecting_encodings(self, given: Mapping[str, Any]) -> dict[str, bytes]:
        """Return the encodings of the arguments that select entries besides the resolved value."""
        assert self._resolver is not None
        names = self._resolver.names
        wanted = [n for n in given if n != self.plan.self_name] if names is None else names
        return {
            name: self.encode_argument(name, given[name])
            for name in wanted
            if name in given and self._selects(given[name])
        }

    def _selects(self, value: Any) -> bool:
        assert self._resolver is not None
        return (
            not self._resolver.plain
            or type(value) in atoms.PLAIN_TYPES
            or resolvers.has_readable_text(value)
        )

    def check_names(self, option: str, names: Iterable[str]) -> None:
        """Check that all names are arguments of the function that are part of its keys.

        Raises:
            OptionError: one of them is not.
        """
        names = list(names)
        self._check_known(option, names)
        for name in names:
            extra = name not in self.plan.names and self.plan.var_keyword in self._ignore
            if extra or name in self._ignore:
                raise OptionError(option, name, "is ignored, so it selects no entries.")

    def ref_names(self, names: Sequence[str]) -> list[str]:
        """Return the names of a call's arguments for refs; those of `**kwargs` come last."""
        fixed = len(self.names)
        return [self._ref_name(name, at >= fixed) for at, name in enumerate(names)]

    def _ref_name(self, name: str, extra: bool = True) -> str:
        """Return a name as it is; if it is long, ambiguous or no identifier, `%` and a digest."""
        if name.isidentifier() and not (extra and name in self.plan.names):
            return (
                name
                if len(name) <= MAX_KEYWORD_CHARACTERS
                else f"%{atoms.short_digest(atoms.text(name))}"
            )
        return f"%{atoms.short_digest(atoms.text(name))[:8]}"


def _not_selecting_error(given: Mapping[str, Any]) -> OptionError:
    name, value = next(iter(given.items()))
    return OptionError(name, value, "is not part of the key, so it selects no entries.")


def _may_be_of(value: Any, hint: Any) -> bool:
    """True if a value may have the type of an annotation, or if that cannot be determined."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_may_be_of(value, part) for part in parts)
    if origin is typing.Annotated:
        return _may_be_of(value, parts[0])
    if origin is typing.Literal:
        return type(value) in map(type, parts)
    if hint is None:
        return value is None
    if isinstance(origin, type):  # of `list[int]`, say; what it contains is not checked
        hint = origin
    if not isinstance(hint, type):
        return True
    try:
        return isinstance(value, hint) or (
            hint in _ACCEPTED_TYPES and isinstance(value, _ACCEPTED_TYPES[hint])
        )
    except TypeError:  # a protocol without runtime checks
        return True


_ACCEPTED_TYPES: Final[dict[type, tuple[type, ...]]] = {float: (int,), complex: (int, float)}
"""Type -> other types whose values a parameter of that type takes."""


def _annotation_text(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    """True if a function declares a parameter of this name."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # reported by `resolvers.declared_arguments`
        return False
