"""The attributes in the body of a class, without those that Python and libraries add."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

from memo.keys.fingerprint.held_values import fingerprint_of, innermost, qualified_name

SLOT_TYPES = (types.MemberDescriptorType, types.GetSetDescriptorType)
"""Attributes that only declare a slot of this name."""
_ADDED_BY_PYTHON = frozenset(
    [
        "__doc__",
        "__module__",
        "__qualname__",
        "__name__",
        "__dict__",
        "__weakref__",
        "__firstlineno__",
        "__annotations__",
        "__static_attributes__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__orig_bases__",
        "__parameters__",
        "__abstractmethods__",
        "__signature__",
        "_abc_impl",
    ]
)
_OPTIONS = frozenset({"__pydantic_config__", "__required_keys__"})
"""Options of pydantic's dataclasses, and of a `TypedDict`."""
_GENERATED = ("__dataclass_fields__", "__attrs_attrs__", "__pydantic_fields__")


def head(cls: type) -> str:
    """Return the first line of a class, and its annotations."""
    lines = [f"class {cls.__qualname__}({', '.join(map(qualified_name, cls.__bases__))})"]
    hints = vars(cls).get("__annotations__")
    if isinstance(hints, dict):  # a class created in C may have something else there
        lines += [f"    {name}: {hint(value)}" for name, value in list(hints.items())]
    return "\n".join(lines)


def attributes(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a class body, without those that Python and libraries add."""
    members = dict(vars(cls))
    generated = any(name in members for name in _GENERATED)
    enumerated = getattr(cls, "_member_map_", {})
    for name, value in members.items():
        special = name.startswith("__") and name.endswith("__")
        if name in _ADDED_BY_PYTHON or isinstance(value, SLOT_TYPES) or name in enumerated:
            continue
        if special and not _is_users(value, generated):
            continue
        if enumerated and name.startswith("_") and not callable(innermost(value)):
            continue
        yield name, value


def _is_users(value: Any, generated: bool) -> bool:
    """True if the user wrote a `__special__` attribute."""
    inner = innermost(value)
    if not isinstance(inner, types.FunctionType):
        return isinstance(value, (str, tuple))
    return not (generated and _is_generated(inner.__code__))


def _is_generated(code: types.CodeType) -> bool:
    """True if `dataclasses` or attrs generated a method: a user's has the class in its name.

    The file is not enough to tell, since cells of a terminal and unpickled code have none either.
    """
    name = code.co_qualname
    made = name.startswith("__create_fn__.") or "." not in name
    return made and code.co_filename.startswith("<")


def fields(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield enum members, and declared fields of dataclasses, attrs and pydantic classes."""
    members = vars(cls)
    enumerated = getattr(cls, "_member_map_", {})
    for name, member in enumerated.items():
        yield name, member.value
    if enumerated:
        yield "__members__", (list(enumerated), members.get("_boundary_"))
    for name in _OPTIONS & members.keys():
        yield name, members[name]
    if "__dataclass_params__" in members:
        yield "__dataclass_params__", repr(members["__dataclass_params__"])
    for name, found in members.get("__dataclass_fields__", {}).items():
        flags = (found.init, found.repr, found.hash, found.compare, found.kw_only)
        yield name, (found.default, found.default_factory, flags, dict(found.metadata))
    for found in members.get("__attrs_attrs__", ()):
        default = getattr(found.default, "factory", found.default)
        yield found.name, (default, found.validator, found.converter, found.eq, found.init)
    yield from _struct_fields(cls)
    for name, found in (members.get("__pydantic_fields__") or {}).items():
        slots = [slot for slot in type(found).__slots__ if not slot.startswith("_")]
        given = {one: getattr(found, one, None) for one in slots if one != "annotation"}
        yield name, {one: value for one, value in given.items() if value is not None}


def field_types(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the types of the fields of a class, of which libraries make objects."""
    members = vars(cls)
    names = {
        *members.get("__dataclass_fields__", ()),
        *(found.name for found in members.get("__attrs_attrs__", ())),
        *(members.get("__pydantic_fields__") or ()),
        *(cls.__struct_fields__ if _is_struct(cls) else ()),  # type: ignore[attr-defined]
    }
    hints = members.get("__annotations__")
    for name in sorted(names):
        if isinstance(hints, dict) and name in hints:
            yield name, _resolved(hints[name], cls)


def _resolved(value: Any, cls: type) -> Any:
    """Return an annotation with the names in its strings looked up, if they can be found."""
    holder = types.SimpleNamespace(__annotations__={"of": value})
    module = vars(sys.modules.get(cls.__module__, types))
    try:
        return typing.get_type_hints(holder, module, dict(vars(cls)), include_extras=True)["of"]
    except Exception:  # a name that only type checkers import, or that is local to a function
        return value


def _is_struct(cls: type) -> bool:
    return f"{type(cls).__module__}.{type(cls).__qualname__}" == "msgspec._core.StructMeta"


def _struct_fields(cls: Any) -> Iterator[tuple[str, Any]]:
    """Yield the configuration and fields of a msgspec `Struct`."""
    if not _is_struct(cls):
        return
    config = cls.__struct_config__
    settings = {name: getattr(config, name) for name in dir(config) if not name.startswith("__")}
    yield "__struct_config__", settings
    yield "__struct_encode_fields__", cls.__struct_encode_fields__
    fields, defaults = cls.__struct_fields__, cls.__struct_defaults__
    for name, default in zip(fields[len(fields) - len(defaults) :], defaults, strict=True):
        yield name, getattr(default, "factory", default)


def hint(value: Any) -> str:
    """Return an annotation as text."""
    if isinstance(value, str):
        return value
    return (
        qualified_name(value) if isinstance(value, type) else fingerprint_of(value, quiet=True).text
    )
