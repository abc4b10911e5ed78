"""Data sets behind URLs, each identified by its current version.

`http` and `https` are queried by `HEAD`; all other schemes go through fsspec, so `s3://`, `gs://`,
`az://`, `sftp://`, … work if the package for that file system is installed.  A version is
identified by its ETag or, without one, by size and modification time.
"""

from __future__ import annotations

import contextvars
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from memo.errors import OptionError
from memo.records.stamp_types import MISSING, FileStamp, is_pattern
from memo.runtime import events, fork
from memo.runtime.blocking import Pool
from memo.runtime.checksums import blake2b, digest_of_file
from memo.runtime.memory_budget import remember
from memo.runtime.reasons import SOURCE_UNREACHABLE

if TYPE_CHECKING:
    import urllib.error

    from memo.runtime.port import Port

QUERY_TIMEOUT_SECONDS = 10.0
"""Seconds that a server may take to answer."""
SLOW_QUERY_SECONDS = 1.0
"""A failed query that took this many seconds or more counts as a wait: the source is then not asked
again for as long as the query took."""
CONCURRENT_QUERIES = 16
"""Maximum number of URLs that are queried concurrently, in the whole process, besides those that
sync callers query one at a time in their own threads."""
MAX_REMEMBERED_URLS = 4096
"""Maximum number of URLs whose latest facts are remembered."""
UrlQuery: TypeAlias = tuple[str, bool]
"""A URL, and True if its content is compared."""
Answered: TypeAlias = Callable[["str | None"], None]
"""Called with the result of `query`."""
_WEB_SCHEMES = ("http", "https")
_known: dict[UrlQuery, tuple[float, str]] = {}
_silent: dict[UrlQuery, tuple[float, str]] = {}
"""Sources that kept a caller waiting: (monotonic time until which they are not asked, error)."""
_waiting: dict[UrlQuery, list[Answered]] = {}
"""The callers that wait for the next query of a URL; a URL without any is being queried."""
_lock = threading.Lock()
_pool = Pool("memo-offload-remote", CONCURRENT_QUERIES)


class UnreachableError(Exception):
    """A source does not answer."""


def check_url(path: str) -> None:
    """Check a URL, which may be a template, and that the packages that it needs are installed.

    Raises:
        OptionError: it is malformed, or a package is missing.
    """
    scheme = _scheme(path)
    if scheme in _WEB_SCHEMES:
        if "{" not in path and (fault := why_malformed(path)):
            raise OptionError("depends_on", display_url(path), fault)
        return
    try:
        import fsspec
    except ImportError:
        fix = "needs fsspec: pip install 'jupyter-memo[data]', and the package of that file system."
        raise OptionError("depends_on", path, fix) from None
    if scheme not in fsspec.available_protocols():
        raise OptionError("depends_on", path, f"fsspec knows no scheme {scheme}://.")


def why_malformed(url: str) -> str:
    """Return the fault of a malformed http or https URL, with the fix; `""` if it is well-formed.

    URLs of other schemes are left to fsspec: brackets are a pattern there.
    """
    if _scheme(url) not in _WEB_SCHEMES:
        return ""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a port that is not a number raises
    except ValueError:  # its text may hold the password
        host = None
    if host:
        return ""
    return "is malformed; write https://host:port/path, with an IPv6 address in brackets."


def unknown_version() -> str:
    """Return a text that equals no version of a source."""
    return f"unknown at {time.time_ns()}"


async def query_all(port: Port, wanted: Iterable[UrlQuery]) -> dict[UrlQuery, str | None]:
    """Like `query`, for several URLs, up to `CONCURRENT_QUERIES` of them at the same time.

    Async code waits without a thread: those for short work are never used to wait for a network.
    Callers of the same URL share queries, so a silent server keeps one thread waiting.
    """
    todo = list(dict.fromkeys(wanted))
    if not todo or (len(todo) == 1 and not port.native):
        return {one: query(*one) for one in todo}
    found: dict[UrlQuery, str | None] = {}
    others = threading.Semaphore(len(todo) - 1)  # the last answer finds it used up
    all_answered = port.waiter()

    def answered(one: UrlQuery, version: str | None) -> None:
        found[one] = version
        if not others.acquire(blocking=False):
            all_answered.set()

    for one in todo:
        _ask(one, partial(answered, one))
    await port.wait(all_answered, None)
    return found


def _ask(one: UrlQuery, answered: Answered) -> None:
    """Query a URL in the pool, by a query that begins after this call.

    Args:
        answered: called with its result.
    """
    with _lock:
        is_queried = one in _waiting
        _waiting.setdefault(one, []).append(answered)
    if not is_queried:
        _submit(one)


def _submit(one: UrlQuery) -> None:
    context = contextvars.copy_context()
    _pool.submit(lambda: context.run(_query_for_waiting, one))


def _query_for_waiting(one: UrlQuery) -> None:
    """Query a URL for the callers that wait now; for later ones, it is queried once more."""
    with _lock:
        now, _waiting[one] = _waiting[one], []
    version = None
    try:
        version = query(*one)
    finally:
        for answered in now:
            answered(version)
        with _lock:
            is_wanted = bool(_waiting[one])
            if not is_wanted:
                del _waiting[one]
        if is_wanted:
            _submit(one)


def query(url: str, by_content: bool) -> str | None:
    """Return the version at a URL; None, with an event, if its source does not answer."""
    begun = time.monotonic()
    try:
        found = _facts(url, by_content)
    except Exception as error:  # it may run in a thread of the pool, which must go on
        why = str(error) if isinstance(error, UnreachableError) else type(error).__name__
        _pause_source(url, by_content, time.monotonic() - begun, why)
        detail = f"{display_url(url)}: {why}"
        events.emit(events.Event(events.ERROR, reason=SOURCE_UNREACHABLE, detail=detail))
        return None
    with _lock:
        remember(_known, (url, by_content), (time.monotonic(), found), MAX_REMEMBERED_URLS)
    return found


def _pause_source(url: str, by_content: bool, waited: float, why: str) -> None:
    """Pause queries to a slow source, since one call may check it for several tiers."""
    if waited < SLOW_QUERY_SECONDS:
        return
    with _lock:
        until = time.monotonic() + waited
        remember(_silent, (url, by_content), (until, why), MAX_REMEMBERED_URLS)


def recent_facts(stamp: FileStamp) -> str | None:
    """Return the last known version of a source if it is not older than `check_every`."""
    known = _known.get((stamp.path, stamp.by_content)) if stamp.every else None
    if known is None or time.monotonic() - known[0] >= stamp.every:
        return None
    return known[1]


def display_url(url: str) -> str:
    """Return a URL, malformed or not, for display, without user, password and query."""
    scheme, separator, rest = re.split("[?#]", url, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def _scheme(url: str) -> str:
    return re.split("://|::", url, maxsplit=1)[0].lower()


def _facts(url: str, by_content: bool) -> str:
    until, why = _silent.get((url, by_content), (0.0, ""))
    if time.monotonic() < until:
        raise UnreachableError(why)
    if _scheme(url) in _WEB_SCHEMES:
        return _page_version(url, by_content)
    return _files_version(url, by_content)


# --- http ---------------------------------------------------------------------------------------


def _page_version(url: str, by_content: bool) -> str:
    if not by_content:
        version = _version_in_headers(url)
        if version:
            return version
    return _content_of_page(url)


def _version_in_headers(url: str) -> str:
    """Return the version by ETag, else by Last-Modified and length; `""` if there is neither."""
    import urllib.error  # imports ssl, which only a dependency on a URL needs
    from http.client import HTTPException

    try:
        with _open(url, "HEAD") as reply:
            tag, at = reply.headers.get("ETag"), reply.headers.get("Last-Modified")
            size = reply.headers.get("Content-Length", "")
    except urllib.error.HTTPError as error:
        if error.code in (405, 501):  # the server does not support HEAD
            return ""
        return _missing_or_raise(error)
    except (OSError, HTTPException, ValueError) as error:
        raise UnreachableError(type(error).__name__) from None
    return f"etag:{tag}" if tag else f"modified:{at}:{size}" if at else ""


def _content_of_page(url: str) -> str:
    import urllib.error  # imports ssl, which only a dependency on a URL needs
    from http.client import HTTPException

    try:
        with _open(url, "GET") as reply:
            return f"content:{digest_of_file(reply)}"
    except urllib.error.HTTPError as error:
        return _missing_or_raise(error)
    except (OSError, HTTPException, ValueError) as error:
        raise UnreachableError(type(error).__name__) from None


def _open(url: str, method: str) -> Any:
    """Open a URL; `_facts` has checked that its scheme is http or https."""
    import urllib.request

    request = urllib.request.Request(url, method=method, headers={"User-Agent": "memo"})  # noqa: S310
    return urllib.request.urlopen(request, timeout=QUERY_TIMEOUT_SECONDS)  # noqa: S310


def _missing_or_raise(error: urllib.error.HTTPError) -> str:
    with error:
        if error.code in (404, 410):
            return MISSING
    raise UnreachableError(f"HTTP {error.code}")


# --- fsspec -------------------------------------------------------------------------------------


def _files_version(url: str, by_content: bool) -> str:
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
        files.invalidate_cache()
        found = _find_files(files, path)
        if by_content:
            return _combine(sorted(found), lambda one: _content(files, one))
        return _combine(sorted(found), lambda one: _version(found[one]))
    except FileNotFoundError:
        return MISSING
    except Exception as error:  # each file system has errors of its own
        raise UnreachableError(type(error).__name__) from None


def _find_files(files: Any, path: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the files of a path, a directory or a pattern, with the facts of each."""
    if is_pattern(path):
        found: dict[str, Any] = files.glob(path, detail=True)
        return {name: info for name, info in found.items() if info.get("type") != "directory"}
    info = files.info(path)
    if info.get("type") == "directory":
        inside: dict[str, Any] = files.find(path, detail=True)
        return inside
    return {path: info}


def _version(info: Mapping[str, Any]) -> str:
    """Return the version by ETag, else by size and modification time."""
    for name in ("ETag", "etag", "md5Hash", "content_md5"):
        if info.get(name):
            return f"etag:{info[name]}"
    times = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
    at = next((info[name] for name in times if info.get(name)), "")
    return f"modified:{at}:{info.get('size')}"


def _content(files: Any, path: str) -> str:
    with files.open(path, "rb") as file:
        return f"content:{digest_of_file(file)}"


def _combine(names: Iterable[str], version: Any) -> str:
    lines = [f"{name}\0{version(name)}\n" for name in names]
    if len(lines) <= 1:
        return lines[0].rstrip("\n").partition("\0")[2] if lines else MISSING
    return blake2b("".join(lines).encode(), digest_size=20).hexdigest()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _waiting.clear()
    _pool.reset()


fork.in_child(_after_fork)
