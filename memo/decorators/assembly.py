"""Build the chain that the settings describe, and everything that goes with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Unpack

from memo import stores
from memo.errors import OptionError, SettingError, lacks_resources, public
from memo.runtime import events, fork
from memo.runtime.port import Port
from memo.settings import configuration, options, secret_keys
from memo.settings.checks import TRACKING, TRUST_DISK
from memo.settings.configuration import Changes, Restore, Settings, home_of
from memo.settings.live_values import Live
from memo.settings.modes import OFF, Mode
from memo.stores.protocols import DISK, MEMORY, REDIS, CacheProtocol, ServerTier, Tier

if TYPE_CHECKING:
    from pathlib import Path

    from memo.keys.fingerprint.source_history import Manifests
    from memo.stores.disk.host_state import Host

_MAX_SHARE, _MAX_COPIED = 8, 2 << 20
"""Limits of the payloads that a memory tier keeps if there is a tier behind it: a
fraction of its budget (an eighth), and bytes.  Mapping a bigger file (70 µs) is faster than copying
it for each hit."""
_lock = threading.RLock()
_chains: dict[Any, stores.Chain] = {}
_hosts: dict[Path, Host] = {}
_manifests: dict[Path, Manifests] = {}
_current: tuple[int, stores.Chain] | None = None


def enabled() -> bool:
    """True if the cache is on (the setting `enabled`)."""
    settings = _settings()
    return settings is not None and settings.enabled


def mode() -> Mode:
    """Return the mode that the settings give all calls of this process."""
    global default_mode_revision
    revision, settings = configuration.revision, _settings()
    found = Mode(settings.mode if settings is not None and settings.enabled else OFF)
    if found.kind is None:
        default_mode_revision = revision
    return found


default_mode_revision = -1
"""Latest revision of the settings known to set no mode: a call at this revision skips `mode`."""


def _settings() -> Settings | None:
    """Return the settings; None, after an event, if the process lacks resources to read them."""
    try:
        return configuration.current()
    except Exception as error:
        if not lacks_resources(error):
            raise
        events.emit(events.Event(events.ERROR, reason="settings", detail=type(error).__name__))
        return None


def default_chain() -> stores.Chain:
    """Return the chain that the current settings describe."""
    global _current
    seen, revision = _current, configuration.revision
    if seen is not None and seen[0] == revision:
        return seen[1]
    settings = configuration.current()
    with _lock:
        key = _chain_key(settings)
        chain = _chains.get(key)
        if chain is None:
            chain = _chains[key] = CacheFallbackFactory.create(settings)
        if seen is not None and seen[1] is not chain:
            events.emit(events.Event(events.RECONFIGURED))
        _current = (revision, chain)
        if seen is not None and seen[1] is not chain:
            release()
    return chain


def release() -> None:
    """Close the chains that the settings no longer use, each when its uploads have ended."""
    with _lock:
        try:
            named = configuration.settings_in_use()
        except SettingError:  # the next call reports it
            return
        wanted = {_chain_key(settings) for settings in named}
        for key in _chains.keys() - wanted:
            if not _chains[key].after_uploads(_release_later):
                _chains.pop(key).close()
        used = {id(chain.host) for chain in _chains.values()}
        for home in _hosts.keys() - {home_of(settings) for settings in named}:
            if id(_hosts[home]) not in used:
                _hosts.pop(home).close()
                _manifests.pop(home, None)


@public
def configure(**settings: Unpack[Changes]) -> Restore:
    """Change settings of this process, at once, also for functions that are already decorated.

    ::

        memo.configure(redis_url="redis://cache:6379/0", memory_limit="1GiB")
        with memo.configure(enabled=False):
            ...

    Args:
        settings: see section "Settings" of the documentation.  None means the default for
            `redis_url`, `directory`, `tiers`, `secret` and `live_file`.

    Returns:
        A context manager that undoes this call at the end of its block; nest them.

    Raises:
        SettingError: an unknown name or a wrong value; nothing has been changed then.
    """
    return configuration.configure(release, **settings)


async def _release_later(_port: Port) -> None:
    release()


def _chain_key(settings: Settings) -> Any:
    """Return the settings that a chain is built from, as a comparable value."""
    return (
        settings.redis_url,
        settings.directory,
        settings.size_limit,
        settings.memory_limit,
        None if settings.tiers is None else tuple(_tier_key(tier) for tier in settings.tiers),
        settings.read_strategy,
        settings.write_strategy,
        settings.self_healing,
        settings.namespace,
        tuple(secret.id for secret in settings.secrets),
        settings.coherence,
        settings.deadline,
        settings.redis_value_limit,
        settings.payload_store,
        _options_key(settings.redis_options),
        settings.on_redis_loss,
        settings.retention,
    )


def _options_key(options: Mapping[str, Any] | None) -> Any:
    """Return Redis options as a comparable value: plain ones by value, others by identity."""
    plain = (str, int, float, bool, type(None))
    pairs = sorted((options or {}).items())
    return tuple((name, one if isinstance(one, plain) else id(one)) for name, one in pairs)


def _tier_key(tier: Any) -> Any:
    return tier if isinstance(tier, str) else id(tier)


class CacheFallbackFactory:
    """Builds the chain that settings describe: memory, Redis if one is configured, disk."""

    @classmethod
    def create(cls, settings: Settings | None = None) -> stores.Chain:
        """Build a new chain for these settings (default: the current ones)."""
        from memo.stores.chain import Chain

        if settings is not None and not isinstance(settings, Settings):
            fix = "must be left out; memo.configure(...) sets how the chain is built."
            raise OptionError("settings", settings, fix)
        settings = settings or configuration.current()
        names = settings.tiers if settings.tiers is not None else cls._default_tiers(settings)
        chain = Chain(
            [cls._tier(name, settings) for name in names],
            read_strategy=settings.read_strategy,  # type: ignore[arg-type]
            write_strategy=settings.write_strategy,  # type: ignore[arg-type]
            self_healing=settings.self_healing,
        )
        trusts_disk = settings.on_redis_loss == TRUST_DISK
        host = host_of(settings)
        return chain.set_up(settings.namespace, settings.secrets, host, trusts_disk=trusts_disk)

    @staticmethod
    def _default_tiers(settings: Settings) -> tuple[str, ...]:
        memory = (MEMORY,) if settings.memory_limit else ()
        redis = (REDIS,) if settings.redis_url else ()
        return (*memory, *redis, DISK)

    @staticmethod
    def _tier(tier: Any, settings: Settings) -> Tier:
        if tier == MEMORY:
            from memo.stores.memory import Memory

            behind = settings.tiers is None or len(settings.tiers) > 1
            limit = settings.memory_limit
            return Memory(
                limit, payload_limit=min(limit // _MAX_SHARE, _MAX_COPIED) if behind else None
            )
        if tier == REDIS:
            return _redis(settings)
        if tier == DISK:
            from memo.stores.disk.disk_tier import Disk

            host = host_of(settings)
            return Disk(home_of(settings), settings.size_limit, host, retention=settings.retention)
        return as_tier(tier)


def _redis(settings: Settings) -> Tier:
    from memo.stores.redis.redis_tier import Redis

    if settings.redis_url is None:
        raise OptionError("tiers", settings.tiers, "names redis, but redis_url is not set.")
    secret_keys.warn_if_not_kept()
    return Redis(
        settings.redis_url,
        namespace=settings.namespace,
        deadline=settings.deadline,
        value_limit=settings.redis_value_limit,
        payload_store=settings.payload_store,
        tracking=settings.coherence == TRACKING,
        options=settings.redis_options,
        retention=settings.retention,
    )


def host_of(settings: Settings) -> Host:
    """Return the state that the processes of this host share for a directory and namespace."""
    from memo.stores.disk.host_state import Host

    with _lock:
        home = home_of(settings)
        if home not in _hosts:
            _hosts[home] = Host(home, root=settings.directory)
        return _hosts[home]


def as_tier(tier: Any) -> Tier:
    """Return a tier as it is; wrap a user's `CacheProtocol` as a tier.

    Raises:
        OptionError: it is neither.
    """
    if hasattr(tier, "lookup") and hasattr(tier, "store"):
        made: Tier = tier
        return made
    from memo.stores.custom import CustomTier

    return CustomTier(tier)


def chain_getter(provider: CacheProtocol | stores.Chain | None) -> Callable[[], stores.Chain]:
    """Return a getter of the chain for a decorator's `provider`.

    Raises:
        OptionError: the provider lacks methods of `CacheProtocol`.
    """
    if provider is None:
        return default_chain
    from memo.stores.chain import Chain

    if isinstance(provider, Chain):
        return lambda: _with_current_settings(provider)
    given: Any = provider
    if given is CacheFallbackFactory or given == CacheFallbackFactory.create:
        raise OptionError("provider", provider, "write CacheFallbackFactory.create().")
    if isinstance(provider, type):
        raise OptionError("provider", provider, "is a class; give an instance of it.")
    own = Chain([as_tier(provider)])
    return lambda: _with_current_settings(own)


def _with_current_settings(chain: stores.Chain) -> stores.Chain:
    """Set up a chain that the user built with the namespace, secrets and host of the settings."""
    settings = configuration.current()
    host = host_of(settings)
    same = chain.host is host and chain.secrets is settings.secrets
    if not same or chain.namespace != settings.namespace:
        chain.set_up(
            settings.namespace,
            settings.secrets,
            host,
            trusts_disk=settings.on_redis_loss == TRUST_DISK,
        )
    return chain


def compression_getter(given: bool | int | str | None) -> Callable[[], int | None]:
    """Return a getter of the size in bytes above which results are compressed.

    Args:
        given: the decorator's `compress`; None: use the setting when a result is stored.

    Raises:
        OptionError: it is not True, False or a size.
    """
    if given is None:
        return lambda: configuration.current().compress
    number = options.compress("compress", given)
    return lambda: number


def manifests() -> Manifests:
    """Return the store of code versions for the current settings."""
    from memo.keys.fingerprint.source_history import Manifests

    settings = configuration.current()
    home = home_of(settings)
    if home not in _manifests:
        _manifests[home] = Manifests(home)
    return _manifests[home]


def record_manifest(digest: str, parts: Callable[[], Mapping[str, str]]) -> bool:
    """Store the parts of a code version for `explain`; True if they are stored."""
    try:
        manifests().save(digest, parts)
    except (OSError, SettingError) as error:
        events.emit(events.Event(events.ERROR, reason="manifest", detail=str(error)))
        return False
    return True


def known_own_changes(function: str) -> Mapping[str, str]:
    """Return the state that a function changes itself, as processes of this host have found."""
    try:
        return manifests().own_changes(function)
    except (OSError, SettingError) as error:
        events.emit(events.Event(events.ERROR, reason="manifest", detail=str(error)))
        return {}


def publish_own_changes(function: str, found: Mapping[str, str]) -> None:
    """Tell other processes of this host which state a function changes itself."""
    try:
        manifests().add_own_changes(function, found)
    except (OSError, SettingError) as error:
        events.emit(events.Event(events.ERROR, reason="manifest", detail=str(error)))


def _redis_in_use() -> ServerTier | None:
    """Return the Redis of the current settings, which holds the shared live configuration."""
    return next((tier for tier in default_chain().tiers if isinstance(tier, ServerTier)), None)


live = Live(_redis_in_use)
"""The live configuration of this process."""

fork.in_child(live.renew_locks)


def chains() -> list[stores.Chain]:
    """Return the default chain, and the other chains built for settings so far."""
    return list({id(chain): chain for chain in (default_chain(), *_chains.values())}.values())


def reset() -> None:
    """Close and forget every chain; the next call builds new ones."""
    global _current
    with _lock:
        for chain in _chains.values():
            chain.close()
        for host in _hosts.values():
            host.close()
        _chains.clear()
        _hosts.clear()
        _manifests.clear()
        _current = None
