"""Events reach every hook, and no hook can harm a call or another hook."""

from __future__ import annotations

import pytest

from memo.errors import OptionError
from memo.runtime import events
from memo.runtime.events import Event, emit, on_event


def test_every_hook_gets_the_event_in_the_order_of_registration() -> None:
    """A hook that raises does not stop the ones after it."""
    seen: list[str] = []

    def broken(event: Event) -> None:
        seen.append("broken")
        raise ValueError(event.kind)

    removes = [on_event(broken), on_event(lambda _: seen.append("second"))]
    emit(Event(events.HIT))
    for remove in removes:
        remove()
        remove()  # a second time does nothing
    emit(Event(events.HIT))
    assert seen == ["broken", "second"]


def test_a_hook_does_not_get_the_events_of_its_own_calls() -> None:
    """They go to the other hooks only, so no hook runs forever."""
    seen: list[str] = []

    def asks(event: Event) -> None:
        seen.append(f"asks {event.kind}")
        emit(Event(events.MISS))

    removes = [on_event(asks), on_event(lambda event: seen.append(event.kind))]
    emit(Event(events.HIT))
    for remove in removes:
        remove()
    assert seen == ["asks hit", "miss", "hit"]


def test_a_hook_that_could_not_be_called_is_refused() -> None:
    """An async hook would never be awaited, and a value is no hook."""

    async def hook(event: Event) -> None: ...

    for wrong in (hook, 3):
        with pytest.raises(OptionError, match="hook="):
            on_event(wrong)  # type: ignore[arg-type]
