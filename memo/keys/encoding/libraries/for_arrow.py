"""Encode Arrow and polars data, the same for any chunks, slices and offsets.

A column is encoded by type, length, positions of missing values, and the other values; bytes under
a missing value do not count.  Fixed-width values and the text of strings are hashed in place.
"""

from __future__ import annotations

import array
import ctypes
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from memo.keys.encoding import atoms
from memo.keys.encoding.canonical import Encoder, Walk
from memo.keys.encoding.libraries.for_arrays import encode_bytes, node

OFFSETS_PER_STEP: Final = 1 << 17
"""Offsets that are shifted at a time."""

# --- pyarrow -------------------------------------------------------------------------------------


def chunks(parts: Sequence[Any], kind: Any, walk: Walk) -> bytes:
    """Encode the content of an Arrow column in several arrays, without its class.

    Args:
        parts: arrays of one type, with any number and any offsets.
        kind: their type.
    """
    types = sys.modules["pyarrow"].types
    if isinstance(kind, sys.modules["pyarrow"].BaseExtensionType):
        return atoms.text(str(kind)) + chunks([p.storage for p in parts], kind.storage_type, walk)
    if _is(types, "string_view", kind) or _is(types, "binary_view", kind):
        return atoms.text(str(kind)) + _as_large(parts, kind, walk)
    head = atoms.text(str(kind)) + atoms.integer(sum(map(len, parts)))
    reader = _reader(types, kind)
    if reader is None:
        values = itertools.chain.from_iterable(part.to_pylist() for part in parts)
        return head + b"L" + atoms.with_length(walk.sequence(list(values)))
    if any(part.null_count for part in parts):
        head += encode_bytes(_bytes_of(part.is_valid()) for part in parts)
        parts = [part.drop_null() if part.null_count else part for part in parts]
    return head + b"A" + atoms.with_length(reader(parts, kind, walk))


def _is(types: Any, name: str, kind: Any) -> bool:
    test = getattr(types, f"is_{name}", None)  # older versions have no test for newer types
    return test is not None and bool(test(kind))


def _as_large(parts: Sequence[Any], kind: Any, walk: Walk) -> bytes:
    pa = sys.modules["pyarrow"]
    wide = pa.large_string() if _is(pa.types, "string_view", kind) else pa.large_binary()
    return chunks([part.cast(wide) for part in parts], wide, walk)


Reader = Callable[[Sequence[Any], Any, Walk], bytes]


def _reader(types: Any, kind: Any) -> Reader | None:
    """Return the reader for the values of a type; None: they are read one by one."""
    for name, reader in _READER_BY_TYPE:
        if _is(types, name, kind):
            return reader
    try:
        return _fixed if kind.bit_width % 8 == 0 else None
    except ValueError:  # not of a fixed width
        return None


def _nothing(_parts: Sequence[Any], _kind: Any, _walk: Walk) -> bytes:
    return b""


def _booleans(parts: Sequence[Any], _kind: Any, _walk: Walk) -> bytes:
    return encode_bytes(map(_bytes_of, parts))


def _bytes_of(part: Any) -> memoryview:
    """Return one byte for each value of a boolean array."""
    narrow = part.cast(sys.modules["pyarrow"].uint8())
    return _slice(narrow, 1)


def _fixed(parts: Sequence[Any], kind: Any, _walk: Walk) -> bytes:
    return encode_bytes(_slice(part, kind.bit_width // 8) for part in parts)


def _slice(part: Any, width: int, values: int = 1) -> memoryview:
    """Return the bytes of a fixed-width array, or of another buffer of an array."""
    buffer = part.buffers()[values]
    if buffer is None or not len(part):
        return memoryview(b"")
    return memoryview(buffer).cast("B")[part.offset * width : (part.offset + len(part)) * width]


def _strings(wide: bool, parts: Sequence[Any], _kind: Any, _walk: Walk) -> bytes:
    """Encode strings: the end offset of each text, and the texts joined."""
    ends: list[memoryview] = []
    data: list[memoryview] = []
    before = 0
    for part in parts:
        _, offsets, values = part.buffers()
        if offsets is None or not len(part):
            continue
        width = 8 if wide else 4
        at = memoryview(offsets).cast("B")[part.offset * width :][: (len(part) + 1) * width]
        places = at.cast("q" if wide else "i")
        ends += _shifted(places[1:], before - places[0])
        before += places[-1] - places[0]
        if values is not None:
            data.append(memoryview(values).cast("B")[places[0] : places[-1]])
    return atoms.with_length(encode_bytes(ends)) + encode_bytes(data)


def _shifted(places: memoryview, by: int) -> Iterator[memoryview]:
    """Yield the bytes of offsets with a number added; in place if it is 0."""
    if by == 0:
        yield places.cast("B")
        return
    np = sys.modules.get("numpy")
    wide = places.format == "q"
    for start in range(0, len(places), OFFSETS_PER_STEP):
        piece = places[start : start + OFFSETS_PER_STEP]
        if np is not None:
            numbers = np.asarray(piece) + np.array(by).astype(np.int64 if wide else np.int32)
            yield memoryview(numbers.view(np.uint8))
        else:
            span = 1 << (64 if wide else 32)
            wrapped = array.array("Q" if wide else "I", ((n + by) % span for n in piece))
            yield memoryview(wrapped).cast("B")


def _lists(parts: Sequence[Any], kind: Any, walk: Walk) -> bytes:
    lengths = [part.value_lengths() for part in parts]
    width = 8 if "large" in str(kind) else 4
    inner = chunks([part.flatten() for part in parts], kind.value_type, walk)
    return atoms.with_length(encode_bytes(_slice(part, width) for part in lengths)) + inner


def _fixed_lists(parts: Sequence[Any], kind: Any, walk: Walk) -> bytes:
    return chunks([part.flatten() for part in parts], kind.value_type, walk)


def _structs(parts: Sequence[Any], kind: Any, walk: Walk) -> bytes:
    columns = [part.flatten() for part in parts]
    fields = [kind.field(i) for i in range(kind.num_fields)]
    return b"".join(
        atoms.with_length(chunks([column[i] for column in columns], field.type, walk))
        for i, field in enumerate(fields)
    )


def _dictionaries(parts: Sequence[Any], kind: Any, walk: Walk) -> bytes:
    """Encode a dictionary array: the categories in order, and the index of each value."""
    pa = sys.modules["pyarrow"]
    whole = pa.chunked_array(parts, type=kind).unify_dictionaries()
    categories = [part.dictionary for part in whole.chunks[:1]]
    indices = chunks([part.indices for part in whole.chunks], kind.index_type, walk)
    return atoms.with_length(chunks(categories, kind.value_type, walk)) + indices


_NARROW: Final = functools.partial(_strings, False)
_WIDE: Final = functools.partial(_strings, True)
_READER_BY_TYPE: Final[tuple[tuple[str, Reader], ...]] = (
    ("null", _nothing),
    ("boolean", _booleans),
    ("string", _NARROW),
    ("binary", _NARROW),
    ("large_string", _WIDE),
    ("large_binary", _WIDE),
    ("dictionary", _dictionaries),
    ("list", _lists),
    ("large_list", _lists),
    ("fixed_size_list", _fixed_lists),
    ("struct", _structs),
)


def _arrow_array(value: Any, walk: Walk) -> bytes:
    return chunks([value], value.type, walk)


def _chunked(value: Any, walk: Walk) -> bytes:
    return chunks(value.chunks, value.type, walk)


def _table(value: Any, walk: Walk) -> bytes:
    """Encode a table or record batch: names, types, nullability, metadata, and the columns."""
    fields = [(f.name, str(f.type), f.nullable, f.metadata) for f in value.schema]
    content = walk.encode((value.num_rows, fields, value.schema.metadata))
    for column in value.columns:
        parts = column.chunks if hasattr(column, "chunks") else [column]
        content += atoms.with_length(chunks(parts, column.type, walk))
    return content


def _arrow_scalar(value: Any, walk: Walk) -> bytes:
    return walk.encode((str(value.type), value.as_py()))


def _arrow_buffer(value: Any, _walk: Walk) -> bytes:
    return encode_bytes([memoryview(value).cast("B")])


# --- polars --------------------------------------------------------------------------------------


class _ArrowArray(ctypes.Structure):
    """`struct ArrowArray` of the Arrow C data interface."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.c_void_p),
    ("dictionary", ctypes.c_void_p),
    ("release", ctypes.CFUNCTYPE(None, ctypes.POINTER(_ArrowArray))),
    ("private_data", ctypes.c_void_p),
]


class _ArrowStream(ctypes.Structure):
    """`struct ArrowArrayStream` of the Arrow C data interface."""


_GET: Final = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_ArrowStream), ctypes.POINTER(_ArrowArray)
)
_ArrowStream._fields_ = [
    ("get_schema", ctypes.c_void_p),
    ("get_next", _GET),
    ("get_last_error", ctypes.c_void_p),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]


def _bytes_in_place(series: Any, width: int) -> Iterator[memoryview]:
    """Yield the bytes of a fixed-width polars series without nulls, in place."""
    capsule = series.__arrow_c_stream__()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    stream = ctypes.cast(pointer(capsule, b"arrow_array_stream"), ctypes.POINTER(_ArrowStream))
    while True:
        part = _ArrowArray()
        if stream.contents.get_next(stream, ctypes.byref(part)) or not part.release:
            return
        try:
            if part.length:
                start = part.buffers[1] + part.offset * width
                yield memoryview((ctypes.c_ubyte * (part.length * width)).from_address(start)).cast(
                    "B"
                )
        finally:
            part.release(ctypes.byref(part))


def _series(value: Any, walk: Walk) -> bytes:
    return walk.encode(value.name) + _polars(value, walk)


def _polars(series: Any, walk: Walk) -> bytes:
    """Encode the content of a polars column, without its name."""
    kind = str(series.dtype)
    head = atoms.text(kind) + atoms.integer(len(series))
    if kind == "Object":
        return head + walk.sequence(series.to_list())
    if series.null_count():
        head += _numbers(series.is_null())
        series = series.drop_nulls()
    reader = _POLARS.get(kind.partition("(")[0])
    return head + b"A" + atoms.with_length(reader(series, walk) if reader else _plain(series, walk))


def _numbers(series: Any) -> bytes:
    """Encode values of a fixed width, in their own or in their physical type."""
    physical = series.to_physical()
    if str(physical.dtype) == "Boolean":
        physical = physical.cast(sys.modules["polars"].UInt8)
    digits = "".join(filter(str.isdigit, str(physical.dtype)))
    return encode_bytes(_bytes_in_place(physical, int(digits) // 8))


def _plain(series: Any, walk: Walk) -> bytes:
    try:
        return _numbers(series)
    except (ValueError, AttributeError):  # stored in a form that is unknown here
        return b"L" + walk.sequence(series.to_list())


def _texts(series: Any, _walk: Walk) -> bytes:
    text = series.str.join("").item() if len(series) else ""
    return atoms.with_length(_numbers(series.str.len_bytes())) + encode_bytes(
        [memoryview(text.encode())]
    )


def _binaries(series: Any, _walk: Walk) -> bytes:
    data = b"".join(series.to_list())
    return atoms.with_length(_numbers(series.bin.size())) + encode_bytes([memoryview(data)])


def _categories(series: Any, walk: Walk) -> bytes:
    return _texts(series.cast(sys.modules["polars"].String), walk)


def _polars_lists(series: Any, walk: Walk) -> bytes:
    lengths = series.list.len()
    inner = series.filter(lengths > 0).explode()
    return atoms.with_length(_numbers(lengths)) + _polars(inner, walk)


def _polars_arrays(series: Any, walk: Walk) -> bytes:
    if not len(series) or not series.dtype.shape[0]:
        return b""
    return _polars(series.explode(), walk)


def _polars_structs(series: Any, walk: Walk) -> bytes:
    return b"".join(atoms.with_length(_series(column, walk)) for column in series.struct.unnest())


_POLARS: Final[dict[str, Callable[[Any, Walk], bytes]]] = {
    "String": _texts,
    "Binary": _binaries,
    "Categorical": _categories,
    "List": _polars_lists,
    "Array": _polars_arrays,
    "Struct": _polars_structs,
    "Null": lambda series, walk: b"",
}


def _polars_frame(value: Any, walk: Walk) -> bytes:
    head = walk.encode((value.height, value.columns))
    return head + b"".join(atoms.with_length(_polars(column, walk)) for column in value)


def _lazy(value: Any, walk: Walk) -> bytes:
    raise walk.refuse(value, "it is a query plan, not data; pass value.collect().")


ADAPTERS: Final[dict[str, Encoder]] = {
    "pyarrow.Array": node("arrow", _arrow_array),
    "pyarrow.ChunkedArray": node("arrow", _chunked),
    "pyarrow.Table": node("arrow", _table),
    "pyarrow.RecordBatch": node("arrow", _table),
    "pyarrow.Scalar": node("arrow", _arrow_scalar),
    "pyarrow.Buffer": node("arrow", _arrow_buffer),
    "polars.Series": node("polars", _series),
    "polars.DataFrame": node("polars", _polars_frame),
    "polars.LazyFrame": _lazy,
}
"""`package.class` -> encoder, for values of the class and its subclasses."""
