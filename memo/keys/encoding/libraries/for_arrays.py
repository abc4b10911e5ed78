"""Encode numpy arrays, scipy sparse arrays and torch tensors.

All bytes are hashed in place by BLAKE3, on all cores.  The libraries are never imported: their
values only occur where they are in `sys.modules`.

Rules of this module:

1.  An array is encoded by class, dtype with byte order, shape, and elements in C order.  Strides,
    flags and a file behind it (`memmap`) are layout, not value.
2.  Elements are equal if their bits are: -0.0 differs from 0.0, and NaNs may differ.  For scalars,
    as for Python's floats, all NaNs are equal.
3.  Bytes that no element owns (padding) are not read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from memo.keys.encoding import atoms, canonical
from memo.keys.encoding.canonical import Encoder, Walk, encode_class
from memo.keys.encoding.libraries import array_order

MAX_COPIED_WHOLE_BYTES: Final = 2 << 20
"""A non-contiguous array of at most this many bytes is copied whole."""
COLLECTED_BELOW_BYTES: Final = 64 << 10
"""Smaller pieces are collected before they are hashed."""


def node(kind: str, content: Encoder) -> Encoder:
    """Return the encoder for values with parts: their class, then `content(value, walk)`."""
    prefix = atoms.with_length(kind.encode())

    def whole(value: Any, walk: Walk) -> bytes:
        return encode_class(value, walk) + content(value, walk)

    return lambda value, walk: walk.encode_container(value, whole, b"~", prefix)


# --- bytes in place ------------------------------------------------------------------------------


def encode_bytes(views: Iterable[Any]) -> bytes:
    """Encode bytes in several pieces, as if they were joined.

    Args:
        views: contiguous buffers of unsigned bytes.
    """
    from blake3 import blake3

    pending = bytearray()
    hasher = None
    for view in views:
        little = len(view) < COLLECTED_BELOW_BYTES
        if little:
            pending += view
            if len(pending) < MAX_COPIED_WHOLE_BYTES:
                continue
        hasher = hasher or blake3(max_threads=blake3.AUTO)
        if pending:
            hasher.update(pending)
            pending = bytearray()
        if not little:
            hasher.update(view)
    if hasher is None:
        return _encode_short(pending)
    hasher.update(pending)
    return b"\xfd" + hasher.digest()


def encode_rows(array: Any) -> bytes:
    """Encode the bytes of each row of a 2-D array, one after another.

    Rows that are not contiguous are copied and hashed together, in one pass over the array.
    """
    if (
        len(array) == 1
        or array.strides[1] == array.dtype.itemsize
        or array.nbytes <= MAX_COPIED_WHOLE_BYTES
    ):
        return b"".join(encode_bytes(raw_bytes(line)) for line in array)
    from blake3 import blake3

    hashers = [blake3(max_threads=array_order.threads_per_row(len(array))) for _ in array]
    array_order.feed_rows([hasher.update for hasher in hashers], array)
    return b"".join(b"\xfd" + hasher.digest() for hasher in hashers)


def _encode_short(content: bytearray) -> bytes:
    from blake3 import blake3

    if len(content) <= atoms.MAX_LITERAL_BYTES:
        return atoms.with_length(bytes(content))
    return b"\xfd" + blake3(content).digest()


# --- numpy ---------------------------------------------------------------------------------------


def numpy() -> Any:
    """Return numpy, which is imported if one of its values exists."""
    return sys.modules["numpy"]


def dtype(value: Any, walk: Walk) -> bytes:
    """Encode a numpy dtype: kind, width, byte order, unit, fields with their offsets."""
    kind = type(value if value.kind not in "iu" else numpy().dtype(value.str))  # not `longlong`
    facts = [kind.__name__, value.str]
    if value.subdtype is not None:
        base, shape = value.subdtype
        return walk.encode((*facts, shape)) + dtype(base, walk)
    if value.names is not None:
        fields = [(name, value.fields[name]) for name in value.names]
        places = [(name, field[1], field[2:]) for name, field in fields]
        parts = [dtype(field[0], walk) for _, field in fields]
        return walk.encode((*facts, places, value.itemsize, value.isalignedstruct, parts))
    if value.kind == "T":
        missing = getattr(value, "na_object", canonical.Unkeyable)
        return walk.encode((*facts, repr(value))) + walk.encode(missing)
    return walk.encode(tuple(facts))


def elements(array: Any, walk: Walk, step: Callable[[int], str] | None = None) -> bytes:
    """Encode the elements of a plain `ndarray`, in C order."""
    kind = array.dtype
    if kind.kind in "OT":
        return b"O" + atoms.with_length(
            _objects(array.ravel(), walk, step or _indices(array.shape))
        )
    if kind.names is not None and not _is_packed(kind):
        parts = [elements(array[name], walk) for name in kind.names]
        return b"V" + atoms.with_length(b"".join(parts))
    if kind.char in "gG":
        array = _without_padding(array)
    return encode_bytes(raw_bytes(array))


def _objects(flat: Any, walk: Walk, step: Callable[[int], str]) -> bytes:
    if len(flat) >= atoms.ENCODED_IN_C_FROM_ITEMS:
        starts = range(0, len(flat), atoms.ITEMS_PER_STEP)
        content = atoms.plain_sequence(
            flat[at : at + atoms.ITEMS_PER_STEP].tolist() for at in starts
        )
        if content is not None:
            return content
    return walk.sequence(flat.tolist(), step)


def _indices(shape: tuple[int, ...]) -> Callable[[int], str]:
    if len(shape) == 1:
        return canonical.index_step
    return lambda i: f"[{', '.join(str(int(n)) for n in numpy().unravel_index(i, shape))}]"


def _is_packed(kind: Any) -> bool:
    """True if every byte of an element belongs to exactly one field and is significant."""
    if kind.subdtype is not None:
        return _is_packed(kind.subdtype[0])
    if kind.names is None:
        return kind.kind not in "OT" and kind.char not in "gG"
    at = 0
    for part, offset, *_ in sorted(kind.fields.values(), key=lambda field: field[1]):
        if offset != at or not _is_packed(part):
            return False
        at += part.itemsize
    return bool(at == kind.itemsize)


def _without_padding(array: Any) -> Any:
    """Return the significant bytes of long doubles: 10 of each 16 on x86."""
    np = numpy()
    real = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
    used = 10 if np.finfo(np.longdouble).nmant == 63 else real
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, real)
    if array.dtype.byteorder == ">":
        return flat[:, real - used :]
    return flat[:, :used]


def raw_bytes(array: Any) -> Iterator[Any]:
    """Yield the bytes of an array in C order: in place if contiguous, else copied band by band.

    A band is overwritten by the next one.
    """
    np = numpy()
    if not array.nbytes:
        return
    if array.flags.c_contiguous:
        yield memoryview(array.reshape(-1).view(np.uint8))
        return
    if array.nbytes <= MAX_COPIED_WHOLE_BYTES:
        yield memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return
    yield from array_order.in_c_order(array_order.cut_in_bands(array))


def ndarray(value: Any, walk: Walk) -> bytes:
    """Encode the content of a plain array, without its class."""
    plain = value if type(value) is numpy().ndarray else value.view(numpy().ndarray)
    shape = atoms.text(",".join(map(str, plain.shape)))
    return dtype(plain.dtype, walk) + shape + elements(plain, walk)


def _array(value: Any, walk: Walk) -> bytes:
    """Encode an array, with the attributes of a user's subclass."""
    own = getattr(value, "__dict__", None)
    content = ndarray(value, walk)
    return content + canonical.mapping(own, walk, lambda name: f".{name}") if own else content


def _memmap(value: Any, walk: Walk) -> bytes:
    return _ARRAY(value.view(numpy().ndarray), walk)


def _masked(value: Any, walk: Walk) -> bytes:
    """Encode a masked array, with the data under the mask, since `.data` can be read."""
    if value is numpy().ma.masked:
        return b"masked"
    mask = numpy().ma.getmaskarray(value)
    rest = walk.encode((value.fill_value, bool(value.hardmask)))
    return ndarray(value.data, walk) + ndarray(mask, walk) + rest


def _scalar(value: Any, walk: Walk) -> bytes:
    np = numpy()
    kind = dtype(value.dtype, walk)
    if isinstance(value, np.complexfloating):
        return kind + walk.encode(value.real) + walk.encode(value.imag)
    if isinstance(value, np.floating) and value != value:  # noqa: PLR0124
        return kind + b"nan"
    return kind + elements(np.asarray(value), walk)


# --- scipy and torch -----------------------------------------------------------------------------


def _sparse(value: Any, walk: Walk) -> bytes:
    """Encode a sparse array: its format, and its stored elements by position.

    Duplicates are summed.
    """
    head = walk.encode((value.format, tuple(value.shape), getattr(value, "blocksize", None)))
    if value.ndim != 2:
        return head + _coordinates(value, walk)
    encode_rows = value.T.tocsr() if value.format == "csc" else value.tocsr()
    if not encode_rows.has_canonical_format:
        encode_rows = encode_rows.copy()
        encode_rows.sum_duplicates()
    return head + b"".join(
        [
            ndarray(_narrow(encode_rows.indptr), walk),
            ndarray(_narrow(encode_rows.indices), walk),
            ndarray(encode_rows.data, walk),
        ]
    )


def _coordinates(value: Any, walk: Walk) -> bytes:
    np = numpy()
    listed = value.tocoo(copy=True)
    listed.sum_duplicates()
    order = np.lexsort(listed.coords[::-1])
    places = [ndarray(_narrow(axis[order]), walk) for axis in listed.coords]
    return b"".join(places) + ndarray(listed.data[order], walk)


def _narrow(indices: Any) -> Any:
    """Return indices in the narrower of two types that holds them, as scipy itself chooses."""
    np = numpy()
    small = not indices.size or int(indices.max()) <= np.iinfo(np.int32).max
    return indices.astype(np.int32 if small else np.int64, copy=False)


def _tensor(value: Any, walk: Walk) -> bytes:
    """Encode a tensor: dtype, shape, device, `requires_grad`, and its elements."""
    torch = sys.modules["torch"]
    facts = (str(value.dtype), tuple(value.shape), str(value.device), bool(value.requires_grad))
    plain = value.detach()
    if plain.is_quantized or plain.device.type == "meta":
        raise walk.refuse(value, "pass it dequantized and with its data.")
    if plain.layout != torch.strided:
        plain = plain.to_sparse_coo().coalesce()
        parts = [plain.indices(), plain.values()]
        return walk.encode((*facts, str(value.layout))) + b"".join(walk.encode(p) for p in parts)
    return walk.encode(facts) + encode_bytes(_tensor_bytes(torch, plain))


def _tensor_bytes(torch: Any, plain: Any) -> Iterator[Any]:
    plain = plain.resolve_conj().resolve_neg().cpu().contiguous()
    if plain.numel():
        yield memoryview(plain.reshape(-1).view(torch.uint8).numpy())


_ARRAY: Final = node("array", _array)
ADAPTERS: Final[dict[str, Encoder]] = {
    "numpy.ndarray": _ARRAY,
    "numpy.memmap": _memmap,
    "numpy.MaskedArray": node("masked", _masked),
    "numpy.generic": node("scalar", _scalar),
    "numpy.dtype": node("dtype", dtype),
    "scipy._spbase": node("sparse", _sparse),
    "scipy.spmatrix": node("sparse", _sparse),
    "torch.Tensor": node("tensor", _tensor),
}
"""`package.class` -> encoder, for values of the class and its subclasses."""
