"""memo with one rule of its keys taken out, on purpose: a test that watches the rule must fail."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from memo.decorators.cached_function import CachedFunction
from memo.keys import call_keys, instances, offloading
from memo.keys.bindings import NOT_GIVEN
from memo.keys.encoding import atoms, canonical, lookup
from memo.keys.fingerprint import held_values, normalized_code, own_changes, reachable

Patch = pytest.MonkeyPatch


def untyped(patch: Patch) -> None:
    """The type of a number does not count."""

    def as_text(value: Any) -> bytes:
        return atoms.text(str(value))

    for table in (atoms.SIMPLE, offloading.LIGHT_ENCODERS):
        patch.setitem(table, int, as_text)


def keywords_sorted(patch: Patch) -> None:
    """The order of `**kwargs` does not count."""
    counting = call_keys.Keyer._counted_keywords

    def in_order(self: Any, extra: Any) -> Any:
        return dict(sorted(counting(self, extra).items()))

    patch.setattr(call_keys.Keyer, "_counted_keywords", in_order)


def values_left_out(patch: Patch) -> None:
    """Globals, closures and defaults do not count."""
    add_fingerprint = reachable.GraphBuilder.add_fingerprint

    def without(self: Any, node: Any, *rest: Any) -> None:
        before = set(node.facts)
        add_fingerprint(self, node, *rest)
        node.facts = before

    patch.setattr(reachable.GraphBuilder, "add_fingerprint", without)


def code_left_out(patch: Patch) -> None:
    """The code that a function reaches does not count."""
    read = normalized_code.read
    patch.setattr(normalized_code, "read", lambda *given: read(*given)._replace(text=""))


def attributes_left_out(patch: Patch) -> None:
    """The attributes of `self` do not count."""
    patch.setattr(instances, "attributes_of", lambda *_, **__: instances.NO_ATTRIBUTES)


def escape_forgotten(patch: Patch) -> None:
    """Methods that pass `self` on do not count all of it."""
    state = reachable.GraphBuilder.state
    patch.setattr(
        reachable.GraphBuilder, "state", lambda self: state(self)._replace(whole=False, names=())
    )


def state_left_out(patch: Patch) -> None:
    """Attributes do not count, be they of `self` or of a global."""
    values_left_out(patch)
    attributes_left_out(patch)


def by_address(patch: Patch) -> None:
    """State without a sound key counts by its address."""
    one, callables = instances.encode_attribute, held_values.FingerprintWalk.callables

    def addressed(name: str, value: Any, lost: Any, *rest: Any) -> bytes:
        return one(name, value, lost, *rest) + (atoms.integer(id(value)) if lost else b"")

    patch.setattr(instances, "encode_attribute", addressed)
    patch.setattr(
        held_values.FingerprintWalk,
        "callables",
        lambda self, value, path: f"{id(value)} {callables(self, value, path)}",
    )


def of_all_objects(patch: Patch) -> None:
    """An invalidation through an object is for all objects."""
    dropped = CachedFunction._checked_invalidation

    def all_of_them(self: Any, port: Any, own: Any, *rest: Any, **more: Any) -> Any:
        return dropped(self, port, NOT_GIVEN, *rest, **more)

    patch.setattr(CachedFunction, "_checked_invalidation", all_of_them)


def as_it_is_now(patch: Patch) -> None:
    """State counts as it is, not as it was before computations changed it."""
    patch.setattr(own_changes.Registry, "base", lambda self, value, *_: value.fingerprint)


def left_out_for_good(patch: Patch) -> None:
    """State that a computation has changed once never counts again."""
    patch.setattr(own_changes, "same_fingerprint", lambda one, other: True)


def handles_have_keys(patch: Patch) -> None:
    """A handle counts by what pickle saves of it."""
    patch.setattr(lookup, "find", lambda kind: None)
    patch.setattr(canonical, "_found", weakref.WeakKeyDictionary())
