"""The options of `cache`: their types, their checks, and the engine's function made from them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from memo import engine, stores
from memo.decorators import assembly
from memo.engine import same_types
from memo.engine.call import Function
from memo.keys import bindings
from memo.keys.call_keys import GLOBAL_PREFIX, Call, Keyer
from memo.keys.fingerprint.function_version import Identity
from memo.keys.values import value_digest
from memo.runtime.port import Port
from memo.settings import durations, options
from memo.settings.options import Policy
from memo.stores.protocols import CacheProtocol
from memo.validity.dependencies import Dependencies, File, checked_interval

if TYPE_CHECKING:
    from typing import TypedDict

Ttl: TypeAlias = "float | durations.timedelta | str | Callable[[Any], Any] | None"
"""A ttl: seconds, a `timedelta`, `"1h30m"`, None for no expiry, or a callable of the result."""
Span: TypeAlias = "float | durations.timedelta | str"
"""A length of time: seconds, a `timedelta`, or a text such as `"1h30m"`."""
Dependency: TypeAlias = "str | os.PathLike[str] | File | Callable[..., Any]"
"""A file, directory, glob or URL, a `memo.File`, or a callable."""


if TYPE_CHECKING:

    class Options(TypedDict, total=False):
        """The options of `cache` as keywords, for `cache(f, ttl=5)`."""

        ttl: Ttl
        key_prefix: str | None
        key_resolver: Callable[..., Any] | str | Sequence[str] | None
        use_jitter: bool
        use_lock: bool
        lock_timeout: Span | None
        refresh_ahead: bool
        refresh_threshold: float | None
        provider: CacheProtocol | stores.Chain | None
        ttl_key: str | None
        tags: Iterable[str] | Callable[..., Iterable[str]]
        depends_on: Dependency | Iterable[Dependency]
        check_every: Span
        ignore: Iterable[str]
        version: str | None
        stale_while_revalidate: Span
        stale_if_error: Span
        retry_after: Span
        soft_timeout: Span
        cache_errors: Mapping[type[Exception], Span | None] | None
        each: str | None
        cutoff: bool
        name: str | None
        cache_if: Callable[[Any], bool] | None
        compress: bool | int | str | None
        replay: bool


def check(given: Mapping[str, Any]) -> None:
    """Check the options as far as possible without the function.

    Raises:
        OptionError: an option is wrong.
    """
    options.texts("ignore", given["ignore"])
    options.text("name", given["name"], options.MAX_FUNCTION_NAME_CHARACTERS)
    options.text("version", given["version"])
    options.text("key_prefix", given["key_prefix"])
    options.flag("replay", given["replay"])
    options.text("each", given["each"])
    options.flag("cutoff", given["cutoff"])
    _tags(given["tags"])
    checked_interval(given["check_every"])
    assembly.chain_getter(given["provider"])
    assembly.compression_getter(given["compress"])
    _policy(given)


def make_function(
    function: Callable[..., Any], identity: str, given: Mapping[str, Any]
) -> Function:
    """Make the `Function` that the engine works with.

    Args:
        given: every option of `cache`.

    Raises:
        OptionError: one of them is wrong.
    """
    replay = options.flag("replay", given["replay"])
    ignored = options.texts("ignore", given["ignore"])
    state = [label for label in ignored if label.startswith(GLOBAL_PREFIX)]
    keyer = Keyer(
        function,
        identity=Identity(
            function,
            version=options.text("version", given["version"]),
            name=given["name"],
            ignored=state,
            find_originals=functools.partial(assembly.known_own_changes, identity),
        ),
        function_id=identity,
        key_prefix=options.text("key_prefix", given["key_prefix"]),
        key_resolver=given["key_resolver"],
        ignore=[name for name in ignored if name not in state],
        tags=_tags(given["tags"]),
        method=_is_method(function),
        form=_form(function, given),
    )
    policy = _policy(given)
    return Function(
        identity,
        function,
        keyer,
        policy,
        assembly.chain_getter(given["provider"]),
        _answer,
        assembly.live if policy.ttl_key is not None else None,
        _dependencies(function, identity, given),
        assembly.record_manifest,
        assembly.compression_getter(given["compress"]),
        replay=replay,
        cutoff=options.flag("cutoff", given["cutoff"]),
        is_async=options.is_async(function),
        publish_own_changes=assembly.publish_own_changes,
    )


_POLICY_OPTIONS = (
    "ttl",
    "use_jitter",
    "use_lock",
    "lock_timeout",
    "refresh_ahead",
    "refresh_threshold",
    "ttl_key",
    "stale_while_revalidate",
    "stale_if_error",
    "retry_after",
    "soft_timeout",
    "cache_errors",
    "cache_if",
)


def _policy(given: Mapping[str, Any]) -> Policy:
    return options.policy(**{name: given[name] for name in _POLICY_OPTIONS})


def _tags(tags: Any) -> Any:
    return tags if callable(tags) else options.texts("tags", tags)


def _form(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """Return the form in which results are stored, as it is part of the keys."""
    if options.generator_kind(function):
        return "items"
    return "each" if given["each"] is not None else "replay" if given["replay"] else ""


def _is_method(function: Callable[..., Any]) -> bool:
    """True if a function is decorated in a class body and takes `self` or `cls`.

    A bound method has its object already: its signature begins after `self`.
    """
    outer, _, _ = getattr(function, "__qualname__", "").rpartition(".")
    if not outer or outer.endswith("<locals>"):
        return False
    return next(iter(bindings.signature_of(function).parameters), "") in {"self", "cls", "mcs"}


def _dependencies(
    function: Callable[..., Any], identity: str, given: Mapping[str, Any]
) -> Dependencies | None:
    signature = bindings.signature_of(function)
    annotations = bindings.annotations_of(function, signature)
    made = Dependencies(
        *(identity, given["depends_on"], signature, annotations, value_digest),
        encode=same_types.encode_arguments,
        check_every=given["check_every"],
    )
    return made or None


def _answer(
    port: Port, function: Function, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Coroutine[Any, Any, Any]:
    return engine.answering.answer(port, function, call, args, kwargs)
