"""The key of a method's call that comes again is the one that it had, whatever its state is."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

import memo

ALIKE = st.sampled_from([0, 0.0, -0.0, False, 1, 1.0, True, None, "", b"", "a", "1", 1j, (1,)])


class Thing:
    def __init__(self, a: Any) -> None:
        self.a = a

    @memo.cache(name="repeated:get")
    def get(self, x: Any) -> Any:
        return self.a, x


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(ALIKE, ALIKE), max_size=30))
def test_methods_that_come_again_have_the_keys_they_had(calls: list[tuple[Any, Any]]) -> None:
    """Numbers that equal each other are told apart, in the state as in the arguments."""
    seen: dict[str, str] = {}
    for a, x in calls * 3:
        told = repr((type(a), a, type(x), x))
        key = Thing(a).get.key(x)
        assert seen.setdefault(told, key) == key
    assert len(set(seen.values())) == len(seen)


def test_a_key_that_comes_again_sees_what_has_changed() -> None:
    """An attribute, a class attribute and the class are looked at each time."""
    one = Thing(1)
    keys = [one.get.key(1) for _ in range(4)]
    assert len(set(keys)) == 1
    one.a = 2
    assert one.get.key(1) not in keys
    one.a = 1
    assert one.get.key(1) in keys
    del one.a
    assert one.get.key(1) not in keys
