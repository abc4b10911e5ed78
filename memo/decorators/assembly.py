"""Assembly: build the chain that the settings describe."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from memo import runtime, stores
from memo.errors import OptionError, SettingError, lacks_resources
from memo.runtime import events
from memo.runtime.port import Port
from memo.settings import configuration, options, secret_keys
from memo.settings.checks import TRACKING, TRUST_DISK
from memo.settings.configuration import Settings
from memo.settings.live_values import live
from memo.settings.modes import OFF, Mode
from memo.stores.protocols import DISK, MEMORY, REDIS, CacheProtocol, ServerTier, Tier

if TYPE_CHECKING:
    from pathlib import Path

    from memo.keys.fingerprint.source_history import Manifests
    from memo.stores.disk.host_state import Host

_SHARE, _COPIED = 8, 2 << 20
"""Largest payload that a memory tier keeps if there is a tier behind it, as a fraction of its
budget and in bytes.  Above it, mapping a file (70 µs here) is faster than the copy that each hit
gets."""
_lock = threading.RLock()
_chains: dict[Any, stores.Chain] = {}
_hosts: dict[Path, Host] = {}
_manifests: dict[Path, Manifests] = {}
_current: tuple[int, stores.Chain] | None = None


def enabled() -> bool:
    """True if anything is cached at all (the setting `enabled`)."""
    settings = _settings()
    return settings is not None and settings.enabled


def mode() -> Mode:
    """Return the mode that the settings give to every call of this process."""
    global default_mode_revision
    revision, settings = configuration.revision, _settings()
    found = Mode(settings.mode if settings is not None and settings.enabled else OFF)
    if found.kind is None:
        default_mode_revision = revision
    return found


default_mode_revision = -1
"""Last revision of the settings that set no mode; calls compare it before they call `mode`."""


def _settings() -> Settings | None:
    """Return the settings; None, with an event, if the process lacks the resources to read them."""
    try:
        return configuration.current()
    except Exception as error:
        if not lacks_resources(error):
            raise
        events.emit(events.Event(events.ERROR, reason="settings", detail=type(error).__name__))
        return None


def default_chain() -> stores.Chain:
    """Return the chain that the present settings describe."""
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
        if seen is None or seen[1] is not chain:
            _share_live(chain)
        _current = (revision, chain)
        if seen is not None and seen[1] is not chain:
            release()
    return chain


def release() -> None:
    """Close the chains that the settings no longer use; one that is still uploading, afterwards."""
    with _lock:
        try:
            named = configuration.named()
        except SettingError:  # the next call reports it
            return
        wanted = {_chain_key(settings) for settings in named}
        for key in _chains.keys() - wanted:
            if not _chains[key].after_uploads(_release_later):
                _close(_chains.pop(key))
        used = {id(chain.host) for chain in _chains.values()}
        for home in _hosts.keys() - {home_of(settings) for settings in named}:
            if id(_hosts[home]) not in used:
                _hosts.pop(home).close()
                _manifests.pop(home, None)


async def _release_later(_port: Port) -> None:
    release()


def _close(chain: stores.Chain) -> None:
    global _unshare
    if _current is not None and _current[1] is chain:
        _unshare()
        _unshare = live.attach(None, _publish)
    chain.close()


def _chain_key(settings: Settings) -> Any:
    """Return the settings that a chain is built from."""
    return (
        settings.redis_url,
        settings.directory,
        settings.size_limit,
        settings.memory_limit,
        None if settings.tiers is None else tuple(_key(tier) for tier in settings.tiers),
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
    """Return Redis options in a comparable form: texts and numbers by value."""
    plain = (str, int, float, bool, type(None))
    pairs = sorted((options or {}).items())
    return tuple((name, one if isinstance(one, plain) else id(one)) for name, one in pairs)


def _key(tier: Any) -> Any:
    return tier if isinstance(tier, str) else id(tier)


class CacheFallbackFactory:
    """Builds the chain that settings describe: memory, Redis if one is configured, disk."""

    @classmethod
    def create(cls, settings: Settings | None = None) -> stores.Chain:
        """Build a new chain for these settings (default: those in force)."""
        from memo.stores.chain import Chain

        if settings is not None and not isinstance(settings, Settings):
            fix = "must be left out; memo.configure(...) sets what the chain is made from."
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
            return Memory(limit, payload_limit=min(limit // _SHARE, _COPIED) if behind else None)
        if tier == REDIS:
            return _redis(settings)
        if tier == DISK:
            from memo.stores.disk.disk_tier import Disk

            host = host_of(settings)
            return Disk(home_of(settings), settings.size_limit, host, retention=settings.retention)
        return adapt(tier)


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


def home_of(settings: Settings) -> Path:
    """Return the directory of a namespace, with its own host state and disk budget."""
    return settings.directory / f"{settings.namespace}.{runtime.FORMAT}"


def host_of(settings: Settings) -> Host:
    """Return the state that processes of this host share for one directory and namespace."""
    from memo.stores.disk.host_state import Host

    with _lock:
        home = home_of(settings)
        if home not in _hosts:
            _hosts[home] = Host(home, root=settings.directory)
        return _hosts[home]


def adapt(tier: Any) -> Tier:
    """Return a tier as it is, or wrap a user's `CacheProtocol` as a tier.

    Raises:
        OptionError: it is neither.
    """
    if hasattr(tier, "lookup") and hasattr(tier, "store"):
        made: Tier = tier
        return made
    from memo.stores.custom import CustomTier

    return CustomTier(tier)


def chain_of(provider: CacheProtocol | stores.Chain | None) -> Callable[[], stores.Chain]:
    """Return a function that returns the chain for a decorator's `provider`.

    Raises:
        OptionError: the provider lacks methods of `CacheProtocol`.
    """
    if provider is None:
        return default_chain
    from memo.stores.chain import Chain

    if isinstance(provider, Chain):
        return lambda: _with_present_settings(provider)
    given: Any = provider
    if given is CacheFallbackFactory or given == CacheFallbackFactory.create:
        raise OptionError("provider", provider, "write CacheFallbackFactory.create().")
    if isinstance(provider, type):
        raise OptionError("provider", provider, "is a class; give an instance of it.")
    own = Chain([adapt(provider)])
    return lambda: _with_present_settings(own)


def _with_present_settings(chain: stores.Chain) -> stores.Chain:
    """Give a chain that the user built the namespace, the secrets and the host of the settings."""
    settings = configuration.current()
    host = host_of(settings)
    settled = chain.host is host and chain.secrets is settings.secrets
    if not settled or chain.namespace != settings.namespace:
        chain.set_up(
            settings.namespace,
            settings.secrets,
            host,
            trusts_disk=settings.on_redis_loss == TRUST_DISK,
        )
    return chain


def live_ttl(key: str | None) -> Callable[[], float | None]:
    """Return a getter of the live ttl for a `ttl_key`, in seconds; inf: no expiry."""
    if key is None:
        return lambda: None

    def ttl() -> float | None:
        default_chain()  # so that the shared values are those of the settings in force
        seconds: float | None = live.get(key)
        return seconds

    return ttl


def compress(given: bool | int | str | None) -> Callable[[], int | None]:
    """Return a function that returns the size in bytes above which results are compressed.

    Args:
        given: the decorator's `compress`; None: the setting at the time when a result is stored.

    Raises:
        OptionError: it is neither True nor False nor a size.
    """
    if given is None:
        return lambda: configuration.current().compress
    number = options.compress("compress", given)
    return lambda: number


def manifests() -> Manifests:
    """Return the store of code versions for the present settings."""
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


def learned_changes(function: str) -> Mapping[str, str]:
    """Return state that a function changes itself, as learned by processes of this host."""
    try:
        return manifests().changed(function)
    except (OSError, SettingError) as error:
        events.emit(events.Event(events.ERROR, reason="manifest", detail=str(error)))
        return {}


def publish_own_changes(function: str, found: Mapping[str, str]) -> None:
    """Record for other processes of this host which state a function changes itself."""
    try:
        manifests().add_changed(function, found)
    except (OSError, SettingError) as error:
        events.emit(events.Event(events.ERROR, reason="manifest", detail=str(error)))


def _shared(chain: stores.Chain) -> ServerTier | None:
    """Return the tier in which a chain has the shared live configuration: Redis."""
    return next((tier for tier in chain.tiers if isinstance(tier, ServerTier)), None)


def _share_live(chain: stores.Chain) -> None:
    """Let the live configuration use this chain's Redis, if it has one."""
    global _unshare
    _unshare()
    tier = _shared(chain)
    _unshare = live.attach(None if tier is None else tier.live, _publish)


def _publish(key: str, text: str | None) -> None:
    """Set a key of the shared live configuration, in the Redis of the present settings.

    Raises:
        OptionError: there is none.
        TierError: it could not be written.
    """
    tier = _shared(default_chain())
    if tier is None:
        raise OptionError("shared", True, "needs a Redis; set redis_url first.")
    tier.publish(key, text)


_unshare: Callable[[], None] = live.attach(None, _publish)
configuration.ended = release


def chains() -> list[stores.Chain]:
    """Return the default chain, and every other chain that the settings have needed so far."""
    return list({id(chain): chain for chain in (default_chain(), *_chains.values())}.values())


def reset() -> None:
    """Close and forget every chain; the next call builds new ones."""
    global _current, _unshare
    with _lock:
        for chain in _chains.values():
            chain.close()
        for host in _hosts.values():
            host.close()
        _chains.clear()
        _hosts.clear()
        _manifests.clear()
        _current = None
        _unshare()
        _unshare = live.attach(None, _publish)


def stats_directory() -> Path | None:
    """Return the directory in which the processes of this host share their counters."""
    return home_of(configuration.current())
