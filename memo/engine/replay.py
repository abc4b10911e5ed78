"""Output: what a computation prints and displays, kept so that it can be shown again.

Rules of this module:

1.  A `Recorder` hears the code of its own context alone: that task or thread, and what it
    starts.  A context variable names the recorder; no stream is redirected.
2.  While anything is recorded, `sys.stdout`, `sys.stderr` and the display publisher of IPython are
    wrapped, and what is written passes through them at once.  Else they are as they were.
3.  What an inner computation shows is heard by those around it as well.  A silent recorder, that of
    a refresh in the background, is part of nothing, and what it hears is not shown.
4.  What is kept is plain data, and bounded: see `KEPT`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from memo.runtime import fork

KEPT = 4 * 1024 * 1024
"""Characters and bytes that are kept of what one computation shows."""
_DISPLAY = "display"
_CUT = "\n[memo: what was shown after this was not kept]\n"
_WIDGET = "application/vnd.jupyter.widget-view+json"
"""A view of a widget shows nothing without its model, which lives in one kernel."""
_PLAIN = (str, bytes, bool, int, float, type(None))

Shown = tuple[tuple[str, Any], ...]
"""(kind, what) in order: `"stdout"` and `"stderr"` with a text, `"display"` with what a display
publisher takes."""


class Wrapped:
    """A result together with something that is stored with it.

    Attributes:
        value: the result.
    """

    __slots__ = ("value",)
    value: Any


class Performed(Wrapped):
    """The result of a function together with what it showed; this is what is stored.

    Attributes:
        value: the result.
        shown: what to show again.
        live: the function ran for this very caller, which has seen it.
    """

    __slots__ = ("live", "shown")

    def __init__(self, value: Any, shown: Shown, *, live: bool = False) -> None:
        self.value = value
        self.shown = shown
        self.live = live

    def __reduce__(self) -> Any:
        return Performed, (self.value, self.shown)

    def __repr__(self) -> str:
        """Without the value."""
        return f"<Performed {type(self.value).__name__}, {len(self.shown)} shown>"


def bare(result: Any) -> Any:
    """A result without what is stored with it."""
    return result.value if isinstance(result, Wrapped) else result


def performed(result: Any) -> Any:
    """The same, and the output is shown to a caller that has not seen it."""
    if type(result) is not Performed:
        return result
    if not result.live:
        replay(result.shown)
    return result.value


class Recorder:
    """Keeps what one computation shows while it is shown.

    Args:
        silent: keep it, and do not show it.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self.over = False
        self._lock = threading.Lock()
        self._shown: list[tuple[str, Any]] = []
        self._room = KEPT
        self._clears = False

    @property
    def shown(self) -> Shown:
        """Everything shown so far."""
        with self._lock:
            return tuple(self._shown)

    def write(self, kind: str, text: str) -> None:
        """Keep a text; texts of one stream in a row are one."""
        with self._lock:
            if self.over or not self._fits(len(text)):
                return
            if self._shown and self._shown[-1][0] == kind:
                text = self._shown.pop()[1] + text
            self._shown.append((kind, text))

    def display(self, bundle: Mapping[str, Any]) -> None:
        """Keep what is displayed; an update of something that is kept takes its place."""
        kept = plain(bundle)
        with self._lock:
            if self.over or not kept.get("data") or not self._fits(_size(kept)):
                return
            if kept.get("update") and self._update(kept):
                return
            self._shown.append((_DISPLAY, kept))

    def clear(self, *, wait: bool) -> None:
        """The output was cleared; with `wait` as soon as something new comes."""
        with self._lock:
            self._clears = wait
            if not wait:
                self._shown.clear()

    def _fits(self, size: int) -> bool:
        """True if a piece of output fits; the first that does not, and all later ones, are cut."""
        if self._clears:
            self._shown.clear()
            self._clears = False
        if self._room <= 0:
            return False
        self._room -= size
        if self._room <= 0:
            self._shown.append(("stderr", _CUT))
        return self._room > 0

    def _update(self, new: dict[str, Any]) -> bool:
        name = new.get("transient", {}).get("display_id")
        for at, (kind, old) in enumerate(self._shown):
            if kind == _DISPLAY and old.get("transient", {}).get("display_id") == name:
                self._shown[at] = (_DISPLAY, {**new, "update": False})
                return True
        return False


def plain(bundle: Mapping[str, Any]) -> dict[str, Any]:
    """The storable part of a display: data of mime types, texts and numbers."""
    data = {kind: what for kind, what in (bundle.get("data") or {}).items() if kind != _WIDGET}
    kept = {"data": {kind: what for kind, what in data.items() if _is_plain(what)}}
    for name in ("metadata", "transient", "update"):
        if bundle.get(name) and _is_plain(bundle[name]):
            kept[name] = bundle[name]
    return kept


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _size(bundle: Mapping[str, Any]) -> int:
    return sum(len(str(what)) if isinstance(what, dict) else len(what) for what in _texts(bundle))


def _texts(bundle: Mapping[str, Any]) -> Iterable[Any]:
    return (what for what in bundle["data"].values() if isinstance(what, (str, bytes, dict)))


# --- recorders ------------------------------------------------------------------------------------

_recorders: ContextVar[tuple[Recorder, ...]] = ContextVar("memo_recorders", default=())
"""The recorders of the computations that the running code is part of, outermost first."""


def current() -> tuple[Recorder, ...]:
    """The recorders that hear the running code, outermost first."""
    return _recorders.get()


@contextmanager
def heard_by(recorders: tuple[Recorder, ...]) -> Iterator[None]:
    """Let these recorders hear the running code, which belongs to another thread."""
    token = _recorders.set(recorders)
    try:
        yield
    finally:
        _recorders.reset(token)


@contextmanager
def recording(*, silent: bool = False) -> Iterator[Recorder]:
    """Record what the code of this context shows, until the end of the `with` block."""
    recorder = Recorder(silent=silent)
    token = _recorders.set((recorder,) if silent else (*_recorders.get(), recorder))
    _WRAPPING.begin()
    try:
        yield recorder
    finally:
        recorder.over = True
        _WRAPPING.end()
        _recorders.reset(token)


def _hearing() -> tuple[list[Recorder], bool]:
    """Recorders of the running code, and whether its output is hidden."""
    recorders = [recorder for recorder in _recorders.get() if not recorder.over]
    return recorders, any(recorder.silent for recorder in recorders)


# --- what is wrapped ------------------------------------------------------------------------------


class Stream:
    """A text stream that also tells the recorders what is written to it."""

    def __init__(self, stream: Any, name: str) -> None:
        self._memo_stream, self._memo_name = stream, name

    def write(self, text: str) -> Any:
        recorders, silent = _hearing()
        for recorder in recorders:
            recorder.write(self._memo_name, text)
        return len(text) if silent else self._memo_stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memo_stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._memo_stream)


class _Wrapping:
    """Wraps the streams and the publisher while at least one recorder records."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._publisher: Any = None

    def begin(self) -> None:
        with self._lock:
            self._depth += 1
            for name in ("stdout", "stderr"):  # another one may have been put there since
                stream = getattr(sys, name)
                if stream is not None and type(stream) is not Stream:
                    setattr(sys, name, Stream(stream, name))
            if self._publisher is None:
                self._publisher = _wrapped(_publisher())

    def end(self) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth:
                return
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if type(stream) is Stream:
                    setattr(sys, name, stream._memo_stream)
            publisher, self._publisher = self._publisher, None
            if publisher is not None:
                del publisher.publish, publisher.clear_output


def _publisher() -> Any:
    """IPython's display publisher of this process; None outside of IPython."""
    module = sys.modules.get("IPython.core.interactiveshell")
    if module is None or not module.InteractiveShell.initialized():
        return None
    return module.InteractiveShell.instance().display_pub


def _wrapped(publisher: Any) -> Any:
    if publisher is None:
        return None
    publish, clear = publisher.publish, publisher.clear_output

    def published(data: Any, metadata: Any = None, **more: Any) -> Any:
        recorders, silent = _hearing()
        for recorder in recorders:
            recorder.display({"data": data, "metadata": metadata, **more})
        if silent:
            return None
        with heard_by(()):  # a terminal prints it, which is recorded already
            return publish(data, metadata, **more)

    def cleared(wait: bool = False) -> Any:
        recorders, silent = _hearing()
        for recorder in recorders:
            recorder.clear(wait=wait)
        return None if silent else clear(wait)

    publisher.publish, publisher.clear_output = published, cleared
    return publisher


_WRAPPING = _Wrapping()


# --- showing it again -----------------------------------------------------------------------------


def replay(shown: Shown) -> None:
    """Show the output again; a closed stream is skipped."""
    publisher = _publisher()
    for kind, what in shown:
        if kind == _DISPLAY:
            if publisher is not None:
                publisher.publish(**what)
            continue
        stream = getattr(sys, kind)
        if stream is not None:
            _write(stream, what)


def _write(stream: Any, text: str) -> None:
    try:
        stream.write(text)
    except (OSError, ValueError):  # closed, or a pipe without a reader: the result still counts
        return


def _after_fork() -> None:
    """The child has its own locks: another thread may have held one of them."""
    _WRAPPING._lock = threading.Lock()
    for recorder in _recorders.get():
        recorder._lock = threading.Lock()


fork.in_child(_after_fork)
