"""memo: results of expensive functions, kept across calls, kernels, processes and hosts.

::

    from memo import cache

    @cache(ttl="1h")
    async def load(region: str) -> pandas.DataFrame: ...

The folders: `decorators` creates cached functions, `engine` answers their calls, `keys` determines
the entry of a call, `stores` keeps entries in tiers, `validity` checks that an entry is still
valid.  This file imports from all of them; only `cli` imports it.  Start with
`decorators/cached_function.py`, where a call begins; `docs/architecture.md` has the whole picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memo.decorators.assembly import CacheFallbackFactory, configure, live
from memo.decorators.cache_decorator import cache
from memo.decorators.cached_function import explain, functions
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
from memo.inspection.gathered_stats import stats
from memo.keys.encoding.canonical import register_key
from memo.keys.fingerprint.function_version import stable
from memo.metrics import fault_log as _fault_log
from memo.metrics import recorder as _recorder
from memo.metrics import running_computations as _running_computations
from memo.runtime import VERSION
from memo.runtime import lazy_attributes as _later
from memo.runtime.events import Event, on_event
from memo.runtime.native import drain
from memo.settings.modes import mode
from memo.stores.protocols import CacheProtocol
from memo.validity.dependencies import File

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from memo.decorators.invalidators import (
        aexpire,
        ainvalidate,
        expire,
        invalidate,
        invalidate_cache,
    )
    from memo.engine.invalidating import Invalidation
    from memo.inspection.bundles import export_bundle, import_bundle
    from memo.inspection.call_graph import graph
    from memo.inspection.doctor import health
    from memo.inspection.inventory import entries
    from memo.inspection.report_line import report
    from memo.jupyter.dashboard_widget import dashboard
    from memo.jupyter.progress_view import progress
    from memo.metrics.telemetry import instrument
    from memo.stores.bundle_file import Bundle
    from memo.stores.chain import Chain

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


_LATER = {
    "Bundle": "memo.stores.bundle_file",
    "Chain": "memo.stores.chain",
    "Invalidation": "memo.engine.invalidating",
    "aexpire": "memo.decorators.invalidators",
    "ainvalidate": "memo.decorators.invalidators",
    "dashboard": "memo.jupyter.dashboard_widget",
    "entries": "memo.inspection.inventory",
    "expire": "memo.decorators.invalidators",
    "export_bundle": "memo.inspection.bundles",
    "graph": "memo.inspection.call_graph",
    "health": "memo.inspection.doctor",
    "import_bundle": "memo.inspection.bundles",
    "instrument": "memo.metrics.telemetry",
    "invalidate": "memo.decorators.invalidators",
    "invalidate_cache": "memo.decorators.invalidators",
    "progress": "memo.jupyter.progress_view",
    "report": "memo.inspection.report_line",
}
"""Public names that few programs use -> modules that are imported at their first use."""


if not TYPE_CHECKING:  # so that type checkers refuse a misspelled name
    __getattr__ = _later(__name__, _LATER)


_recorder.listen()
_running_computations.listen()
_fault_log.listen()


def load_ipython_extension(shell: InteractiveShell) -> None:
    """`%load_ext memo`."""
    from memo.jupyter import magics

    magics.load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """`%unload_ext memo`: removes everything that loading added."""
    from memo.jupyter import magics

    magics.unload(shell)
