"""Encode values of astropy, numba, SciPy and scikit-learn, and numpy's generators, by content."""

from __future__ import annotations

import sys
from typing import Any, Final

from memo.keys.encoding import python_types
from memo.keys.encoding.canonical import Encoder, Walk
from memo.keys.encoding.libraries import for_arrays
from memo.keys.encoding.libraries.for_arrays import node


def _table(value: Any, walk: Walk) -> bytes:
    """Encode a table of astropy.

    The names, kinds, units and values of its columns, and its metadata.
    """
    content = walk.encode((list(value.colnames), dict(value.meta)))
    for name in value.colnames:
        content += walk.encode(value[name], f"[{name!r}]")
    return content


def _column(value: Any, walk: Walk) -> bytes:
    facts = (value.name, str(value.unit), str(value.format), value.description, dict(value.meta))
    mask = walk.encode(value.mask) if hasattr(value, "mask") else b""
    return walk.encode(facts) + for_arrays.ndarray(value, walk) + mask


def _quantity(value: Any, walk: Walk) -> bytes:
    return walk.encode(value.unit.to_string()) + for_arrays.ndarray(value, walk)


def _unit(value: Any, walk: Walk) -> bytes:
    return walk.encode(value.to_string())


def _time(value: Any, walk: Walk) -> bytes:
    """Encode times of astropy: the moments and their format, without derived values."""
    inner = value._time
    written = (value.format, value.scale, inner.precision, inner.in_subfmt, inner.out_subfmt)
    facts = walk.encode(written) + walk.encode(inner.jd1) + walk.encode(inner.jd2)
    given = ("location", "_delta_ut1_utc", "_delta_tdb_tt")
    return facts + walk.encode([getattr(value, name, None) for name in given])


def _fits(value: Any, walk: Walk) -> bytes:
    """Encode a FITS header: its cards."""
    return walk.encode([(card.keyword, card.value, card.comment) for card in value.cards])


def _distribution(value: Any, walk: Walk) -> bytes:
    """Encode a distribution of SciPy, without the generator that it draws from."""
    return walk.encode({**value._updated_ctor_param(), "seed": None})


def _frozen(value: Any, walk: Walk) -> bytes:
    return walk.encode(value.dist) + walk.encode((value.args, value.kwds))


def _universal(value: Any, walk: Walk) -> bytes:
    """Encode a `vectorize`d function of numba: the function, its options, and its types.

    One without given types is compiled for the types of each call.
    """
    types = value.types if value._frozen else None
    layout = getattr(value, "gufunc_builder", None)
    shape = None if layout is None else layout.signature
    return _compiled(value._dispatcher, walk) + walk.encode((value.identity, types, shape))


def _compiled(value: Any, walk: Walk) -> bytes:
    """Encode a function compiled by numba: the function, and its options."""
    options = {name: repr(given) for name, given in value.targetoptions.items()}
    return walk.encode(value.py_func) + walk.encode(options)


def _generator(value: Any, walk: Walk) -> bytes:
    """Encode a generator of numpy by its state; the global one, which is not an input, by name."""
    if value is sys.modules["numpy.random"].mtrand._rand:
        return _GLOBAL_GENERATOR(value, walk)
    return python_types.plain_object(value, walk)


_GLOBAL_GENERATOR: Final = node("generator", lambda value, walk: b"global")


def _estimator(value: Any, walk: Walk) -> bytes:
    """Encode an estimator of scikit-learn, without the id of its stop words."""
    state = {k: v for k, v in vars(value).items() if k != "_stop_words_id"}
    return walk.encode(state)


ADAPTERS: Final[dict[str, Encoder]] = {
    "astropy.Table": node("table", _table),
    "astropy.BaseColumn": node("column", _column),
    "astropy.Quantity": node("quantity", _quantity),
    "astropy.UnitBase": node("unit", _unit),
    "astropy.TimeBase": node("time", _time),
    "astropy.Header": node("header", _fits),
    "numba.DUFunc": node("vectorize", _universal),
    "numba.GUFunc": node("guvectorize", _universal),
    "numba.Dispatcher": node("njit", _compiled),
    "numpy.RandomState": _generator,
    "scipy.rv_generic": node("distribution", _distribution),
    "scipy.rv_frozen": node("frozen", _frozen),
    "sklearn._VectorizerMixin": node("vectorizer", _estimator),
}
"""`package.class` -> encoder, for values of the class and its subclasses."""
