"""The dashboard: the live view as a widget in a notebook.

While the widget is visible the kernel sends its state once a second, also while a cell runs; the
page sends back button presses. The page's code is in `inspection/static`. In a notebook that runs
unattended, the same facts are shown as HTML and SVG without a script.
"""

from __future__ import annotations

from typing import Any

from memo.errors import MissingExtraError, public
from memo.inspection import live_view
from memo.inspection.live_view import Model
from memo.runtime.blocking import DISPLAYS
from memo.runtime.port import Handle, Port

WIDGET_UPDATE_SECONDS = 1.0
"""Seconds between two updates."""


@public
def dashboard() -> Any:
    """Show a live view of the cache: the graph, running computations, functions, entries and tiers.

    Returns:
        A widget for JupyterLab, Notebook 7 and VS Code; `close()` ends it.

    Raises:
        MissingExtraError: the extra `notebook` is not installed.
    """
    try:
        return _widget_class()()
    except ImportError:
        raise MissingExtraError(
            "memo.dashboard() needs anywidget: pip install 'jupyter-memo[notebook]'"
        ) from None


def _with_static(made: Any, model: Model) -> Any:
    """Return the display data of a widget, with a static form for front ends without widgets."""
    data, more = made if isinstance(made, tuple) else (made or {}, {})
    return {**data, **live_view.static_mimebundle(model)}, more


def _widget_class() -> Any:
    """Return the class of the widget; it exists only once anywidget is imported."""
    import anywidget
    import traitlets

    class Dashboard(anywidget.AnyWidget):
        """The widget."""

        _esm = live_view.page_file("view.js")
        _css = live_view.page_file("view.css")
        state = traitlets.Dict().tag(sync=True)

        def __init__(self) -> None:
            self.model = Model()
            self._views = 0
            self._ticker: Handle | None = None
            super().__init__(state=self.model.state())
            self.on_msg(self._handle)

        def _handle(self, _: Any, message: Any, __: Any) -> None:
            change = {"open": 1, "shut": -1}.get(message.get("do"))
            if change:
                self._poll_while_viewed(self._views + change)
                return
            self.model.press(message)
            self.state = self.model.state()

        def _poll_while_viewed(self, views: int) -> None:
            """Poll while the page is visible."""
            self._views = max(0, views)
            if self._views and self._ticker is None:
                self._ticker = DISPLAYS.every(WIDGET_UPDATE_SECONDS, self._update_state)
            elif not self._views and self._ticker is not None:
                self._ticker.cancel()
                self._ticker = None

        async def _update_state(self, _: Port) -> None:
            self.state = self.model.state()

        def _repr_mimebundle_(self, **options: Any) -> Any:
            return _with_static(super()._repr_mimebundle_(**options), self.model)

        def close(self) -> None:
            self._poll_while_viewed(0)
            super().close()

    return Dashboard
