"""memo: results of expensive functions, kept across calls, kernels, processes and hosts.

::

    from memo import cache

    @cache(ttl="1h")
    async def load(region: str) -> pandas.DataFrame: ...

Where to find what: `decorators` makes a cached function, `engine` answers its calls, `keys` says
which entry a call has, `stores` keeps entries in tiers, `validity` says whether one is still valid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

from memo.decorators.assembly import CacheFallbackFactory, stats_directory
from memo.decorators.cached_function import cache, explain, functions
from memo.decorators.invalidators import aexpire, ainvalidate, expire, invalidate, invalidate_cache
from memo.engine.invalidating import Invalidation
from memo.errors import (
    BundleError,
    DependencyError,
    EventLoopError,
    KeyingError,
    MemoError,
    MissingExtraError,
    NotCachedError,
    NothingMatchedError,
    OptionError,
    ReentryError,
    SecretError,
    SettingError,
)
from memo.errors import public as _public
from memo.inspection.under_way import listen as _listen
from memo.keys.encoding.canonical import register_key
from memo.keys.fingerprint.function_version import stable
from memo.metrics.fault_log import listen as _log_faults
from memo.metrics.recorder import install as _install
from memo.metrics.recorder import stats
from memo.runtime import VERSION
from memo.runtime.events import Event, on_event
from memo.runtime.ports import drain
from memo.settings.configuration import configure
from memo.settings.live_values import live
from memo.settings.modes import mode
from memo.stores.bundle import Bundle
from memo.stores.chain import Chain
from memo.stores.protocols import CacheProtocol
from memo.validity.dependencies import File

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from IPython.core.interactiveshell import InteractiveShell
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from memo.decorators.cached_function import CachedFunction
    from memo.inspection.bundles import Exported, Imported
    from memo.inspection.call_graph import Graph
    from memo.inspection.findings import Health
    from memo.inspection.inventory import Entries
    from memo.metrics.recorder import Span

__version__ = VERSION
__all__ = [
    "Bundle",
    "BundleError",
    "CacheFallbackFactory",
    "CacheProtocol",
    "Chain",
    "DependencyError",
    "Event",
    "EventLoopError",
    "File",
    "Invalidation",
    "KeyingError",
    "MemoError",
    "MissingExtraError",
    "NotCachedError",
    "NothingMatchedError",
    "OptionError",
    "ReentryError",
    "SecretError",
    "SettingError",
    "aexpire",
    "ainvalidate",
    "cache",
    "configure",
    "dashboard",
    "drain",
    "entries",
    "expire",
    "explain",
    "export_bundle",
    "functions",
    "graph",
    "health",
    "import_bundle",
    "instrument",
    "invalidate",
    "invalidate_cache",
    "live",
    "mode",
    "on_event",
    "progress",
    "register_key",
    "report",
    "stable",
    "stats",
]


def __dir__() -> list[str]:
    return sorted(__all__)


@_public
def entries(
    function: CachedFunction[..., Any] | Callable[..., Any] | str | None = None,
    /,
    **arguments: Any,
) -> Entries:
    """List what is stored on this host, as records; no value is loaded.  See `entries`.

    ::

        memo.entries(load, region="EU").to_frame()

    Args:
        function: a cached function, or any name that tables show; None: all of them.
        arguments: only entries with these arguments.

    Raises:
        OptionError: no function, or several, have the name; or it has no such argument.
    """
    from memo.inspection import inventory

    return inventory.entries(function, **arguments)


def export_bundle(
    path: str | os.PathLike[str],
    function: Any = None,
    /,
    *,
    where: Mapping[str, Any] | None = None,
    tag: str | None = None,
    key: str | None = None,
    note: str = "",
) -> Exported:
    """Write valid entries of this host to one file, sealed with a key of its own.

    ::

        made = memo.export_bundle("features.memo", load, where={"region": "EU"})
        made.key  # importing needs it: pass it on by another way than the file

    Args:
        path: of the file; one that is there is replaced.
        function: a cached function, a name that tables show, or several of them; None: all.
        where: argument -> value: only entries with these.
        tag: only entries with this tag.
        key: at least 32 characters; None: the variable `MEMO_BUNDLE_KEY`, else a fresh one.
        note: shown where it is imported.

    Raises:
        OptionError: no function has the name, or there is no valid entry.
        BundleError: the key is too short.
    """
    from memo.inspection import bundles

    return bundles.export_bundle(path, function, where=where, tag=tag, key=key, note=note)


def import_bundle(path: str | os.PathLike[str] | Bundle, /, *, key: str | None = None) -> Imported:
    """Store the entries of a bundle here, under present stamps; their age goes on counting.

    `memo.Bundle(path)` shows where a bundle comes from without its key.

    Args:
        path: of the file, or a `Bundle`.
        key: that it was sealed with; None: the variable `MEMO_BUNDLE_KEY`.

    Returns:
        What became of each entry.

    Raises:
        BundleError: there is no key, it is another one, or the file was changed.
    """
    from memo.inspection import bundles

    return bundles.import_bundle(path, key=key)


def report(file: TextIO | None = None) -> AbstractContextManager[Span]:
    """Print what the cache did in a `with` block, in one line; see `report_line`."""
    from memo.inspection import report_line

    return report_line.report(file)


def progress(*, on: bool = True) -> None:
    """Show computations and waits longer than half a second, or no more; see `progress_view`."""
    from memo.jupyter import progress_view

    progress_view.progress(on=on)


@_public
def health() -> Health:
    """Check this set-up, as `memo doctor` does: settings, directory, Redis, and what works there.

    In Redis it tries a write, a read, a script, a lease and an invalidation, under a name of its
    own that expires within a minute.

    ::

        memo.health().ok
        memo.health().capabilities["lease"]
    """
    from memo.inspection import findings

    return findings.health()


def graph(*, group: bool | None = None) -> Graph:
    """The cached calls of this process and what they were built on; see `call_graph`.

    It is an SVG drawing in a notebook and a tree in a terminal; `.to_svg()` and `.to_dict()` give
    it to others.

    Args:
        group: one node for each function; None: where there are more than 40 calls.
    """
    from memo.inspection import call_graph

    return call_graph.graph(group=group)


@_public
def dashboard() -> Any:
    """A live view of the cache, a widget; see `dashboard_widget`.

    Raises:
        MissingExtraError: the extra `notebook` is not installed.
    """
    from memo.jupyter import dashboard_widget

    return dashboard_widget.dashboard()


@_public
def instrument(
    *, meter_provider: MeterProvider | None = None, tracer_provider: TracerProvider | None = None
) -> Callable[[], None]:
    """Report what the cache does to OpenTelemetry from now on, as metrics and spans.

    ::

        memo.instrument()

    Metrics are hits, stale hits, misses, refreshes and errors by function and tier, the times of
    look-ups and computations, bytes, the time saved, and whether each tier is up.  Each computation
    is a span, linked to the computations of this process whose stored results it took.

    Args:
        meter_provider: where metrics go; None: the global one.
        tracer_provider: where spans go; None: the global one.

    Returns:
        A function that stops it.  Calling `instrument` again replaces what it did before.

    Raises:
        MissingExtraError: the extra `otel` is not installed.
    """
    from memo.metrics import telemetry

    return telemetry.instrument(meter_provider=meter_provider, tracer_provider=tracer_provider)


def _explain() -> None:
    from memo.inspection import report_line

    report_line.explain_counts()


_install(stats_directory, _explain)
_listen(stats_directory)
_log_faults()


def load_ipython_extension(shell: InteractiveShell) -> None:
    """`%load_ext memo`."""
    from memo.jupyter import magics

    magics.load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """`%unload_ext memo`: nothing stays behind."""
    from memo.jupyter import magics

    magics.unload(shell)
