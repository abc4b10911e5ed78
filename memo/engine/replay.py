"""Record the output of a computation, printed and displayed, to show it again on a hit.

Rules of this module:

1.  A `Recorder` records only the code of its own context: one task or thread, and the tasks and
    threads that it starts.  A context variable names the recorder; no stream is redirected.
2.  While anything is recorded, `sys.stdout`, `sys.stderr` and the display publisher of IPython are
    wrapped; output still passes through immediately.  Otherwise they are untouched.
3.  The output of an inner computation is also recorded by the recorders of the outer ones.  A
    silent recorder (for a refresh in the background) has no outer ones, and shows nothing.
4.  Recorded output is plain data of bounded size: see `MAX_KEPT_OUTPUT`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from memo.keys.encoding.atoms import PLAIN_TYPES
from memo.runtime import fork

MAX_KEPT_OUTPUT = 4 * 1024 * 1024
"""Maximum size, in characters and in bytes, of the output that is kept for one computation."""
_DISPLAY_KIND = "display"
_CUT_MARK = "\n[memo: the output after this was not kept]\n"
_WIDGET_TYPE = "application/vnd.jupyter.widget-view+json"
"""A view of a widget is useless without its model, which lives in one kernel only."""
_PLAIN_BASES = tuple(PLAIN_TYPES)

Output = tuple[tuple[str, Any], ...]
"""Pairs of kind and content in order: `"stdout"` or `"stderr"` and a text, `"display"` and the
arguments of the display publisher."""


class Wrapped:
    """A result together with other data that is stored with it.

    Attributes:
        value: the result.
    """

    __slots__ = ("value",)
    value: Any


class Performed(Wrapped):
    """A function's result together with its output.

    Attributes:
        value: the result.
        output: the output to show again.
        live: the function has just run for this caller, so the output was shown already.
    """

    __slots__ = ("live", "output")

    def __init__(self, value: Any, shown: Output, *, live: bool = False) -> None:
        self.value = value
        self.output = shown
        self.live = live

    def __reduce__(self) -> Any:
        return Performed, (self.value, self.output)

    def __repr__(self) -> str:
        """Omit the value: it may be secret or long."""
        return f"<Performed {type(self.value).__name__}, {len(self.output)} shown>"


def unwrap(result: Any) -> Any:
    """Return a result without the data that is stored with it."""
    return result.value if isinstance(result, Wrapped) else result


def unwrap_and_replay(result: Any) -> Any:
    """Return a result without its output; show the output, unless it was shown already."""
    if type(result) is not Performed:
        return result
    if not result.live:
        replay(result.output)
    return result.value


class Recorder:
    """Records the output of one computation.

    Args:
        silent: record the output without showing it.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self.over = False
        self._lock = threading.Lock()
        self._shown: list[tuple[str, Any]] = []
        self._space_left = MAX_KEPT_OUTPUT
        self._clear_on_next = False

    @property
    def shown(self) -> Output:
        """The output so far."""
        with self._lock:
            return tuple(self._shown)

    def write(self, kind: str, text: str) -> None:
        """Record a text; consecutive texts of one stream are joined."""
        with self._lock:
            if self.over:
                return
            self._clear_if_due()
            if not self._fits(len(text)):
                return
            if self._shown and self._shown[-1][0] == kind:
                text = self._shown.pop()[1] + text
            self._shown.append((kind, text))

    def display(self, bundle: Mapping[str, Any]) -> None:
        """Record a display; an update replaces the display that it refers to."""
        kept = storable_part(bundle)
        with self._lock:
            if self.over or not kept.get("data"):
                return
            self._clear_if_due()
            at = self._replaced_by(kept) if kept.get("update") else None
            freed = 0 if at is None else _size(self._shown[at][1])
            if not self._fits(_size(kept) - freed):
                return
            if at is None:
                self._shown.append((_DISPLAY_KIND, kept))
            else:
                self._shown[at] = (_DISPLAY_KIND, {**kept, "update": False})

    def clear(self, *, wait: bool) -> None:
        """Forget the output, which was cleared; with `wait`, only when new output comes."""
        with self._lock:
            self._clear_on_next = True
            if not wait:
                self._clear_if_due()

    def _clear_if_due(self) -> None:
        if self._clear_on_next:
            self._clear_on_next = False
            self._shown.clear()
            self._space_left = MAX_KEPT_OUTPUT

    def _fits(self, size: int) -> bool:
        """True if some output still fits; the first one that does not fit ends the recording."""
        if self._space_left <= 0:
            return False
        self._space_left -= size
        if self._space_left <= 0:
            self._shown.append(("stderr", _CUT_MARK))
        return self._space_left > 0

    def _replaced_by(self, new: dict[str, Any]) -> int | None:
        """Return the position of the display that an update refers to, or None."""
        name = new.get("transient", {}).get("display_id")
        for at, (kind, old) in enumerate(self._shown):
            if kind == _DISPLAY_KIND and old.get("transient", {}).get("display_id") == name:
                return at
        return None


def storable_part(bundle: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a display that can be stored: its data by mime type, texts and numbers."""
    data = {kind: what for kind, what in (bundle.get("data") or {}).items() if kind != _WIDGET_TYPE}
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
    return isinstance(value, _PLAIN_BASES)


def _size(bundle: Mapping[str, Any]) -> int:
    return sum(len(str(what)) if isinstance(what, dict) else len(what) for what in _texts(bundle))


def _texts(bundle: Mapping[str, Any]) -> Iterable[Any]:
    return (what for what in bundle["data"].values() if isinstance(what, (str, bytes, dict)))


# --- recorders ------------------------------------------------------------------------------------

_recorders: ContextVar[tuple[Recorder, ...]] = ContextVar("memo_recorders", default=())
"""The recorders of the computations that the running code is part of, outermost first."""


def current_recorders() -> tuple[Recorder, ...]:
    """Return the recorders that record the running code, outermost first."""
    return _recorders.get()


@contextmanager
def recorded_by(recorders: tuple[Recorder, ...]) -> Iterator[None]:
    """Let these recorders record the code of this block, which runs in another thread."""
    token = _recorders.set(recorders)
    try:
        yield
    finally:
        _recorders.reset(token)


@contextmanager
def recording(*, silent: bool = False) -> Iterator[Recorder]:
    """Record the output of the `with` block, in its own context."""
    recorder = Recorder(silent=silent)
    token = _recorders.set((recorder,) if silent else (*_recorders.get(), recorder))
    _WRAPPING.begin()
    try:
        yield recorder
    finally:
        recorder.over = True
        _WRAPPING.end()
        _recorders.reset(token)


def _active_recorders() -> tuple[list[Recorder], bool]:
    """Return the recorders of the running code, and True if its output is not shown."""
    recorders = [recorder for recorder in _recorders.get() if not recorder.over]
    return recorders, any(recorder.silent for recorder in recorders)


# --- wrapping streams and the publisher ----------------------------------------------------------


class Stream:
    """A text stream that passes each text to the recorders as well."""

    def __init__(self, stream: Any, name: str) -> None:
        self._memo_stream, self._memo_name = stream, name

    def write(self, text: str) -> Any:
        recorders, silent = _active_recorders()
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
    """Wraps the streams and the display publisher while at least one recorder is active."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._publisher: Any = None

    def begin(self) -> None:
        with self._lock:
            self._depth += 1
            for name in ("stdout", "stderr"):  # user code may have replaced the stream since
                stream = getattr(sys, name)
                if stream is not None and type(stream) is not Stream:
                    setattr(sys, name, Stream(stream, name))
            if self._publisher is None:
                self._publisher = _wrap_publisher(_publisher())

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
    """Return IPython's display publisher of this process; None outside of IPython."""
    module = sys.modules.get("IPython.core.interactiveshell")
    if module is None or not module.InteractiveShell.initialized():
        return None
    return module.InteractiveShell.instance().display_pub


def _wrap_publisher(publisher: Any) -> Any:
    if publisher is None:
        return None
    publish, clear = publisher.publish, publisher.clear_output

    def published(data: Any, metadata: Any = None, **more: Any) -> Any:
        recorders, silent = _active_recorders()
        for recorder in recorders:
            recorder.display({"data": data, "metadata": metadata, **more})
        if silent:
            return None
        with recorded_by(()):  # in a terminal it prints the display, which is recorded already
            return publish(data, metadata, **more)

    def cleared(wait: bool = False) -> Any:
        recorders, silent = _active_recorders()
        for recorder in recorders:
            recorder.clear(wait=wait)
        return None if silent else clear(wait)

    publisher.publish, publisher.clear_output = published, cleared
    return publisher


_WRAPPING = _Wrapping()


# --- showing it again -----------------------------------------------------------------------------


def replay(shown: Output) -> None:
    """Show recorded output; skip closed streams."""
    publisher = _publisher()
    for kind, what in shown:
        if kind == _DISPLAY_KIND:
            if publisher is not None:
                publisher.publish(**what)
            continue
        stream = getattr(sys, kind)
        if stream is not None:
            _write(stream, what)


def _write(stream: Any, text: str) -> None:
    try:
        stream.write(text)
    except (OSError, ValueError):  # closed, or a pipe without a reader: the result matters more
        return


def _after_fork() -> None:
    """Replace the locks in the child process, since another thread may have held one."""
    _WRAPPING._lock = threading.Lock()
    for recorder in _recorders.get():
        recorder._lock = threading.Lock()


fork.in_child(_after_fork)
