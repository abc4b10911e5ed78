"""Values of astropy, numba and scikit-learn, and of numpy's global generator: by their content."""

from __future__ import annotations

import sys
from typing import Any, Final

from memo.keys.encoding import python_types
from memo.keys.encoding.canonical import Encoder, Walk
from memo.keys.encoding.libraries import for_arrays
from memo.keys.encoding.libraries.for_arrays import node


def _table(value: Any, walk: Walk) -> bytes:
    """A table of astropy: the names, kinds, units and values of its columns, and its metadata."""
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


def _compiled(value: Any, walk: Walk) -> bytes:
    """A function that numba compiles: the function, and how it is compiled."""
    options = {name: repr(given) for name, given in value.targetoptions.items()}
    return walk.encode(value.py_func) + walk.encode(options)


def _generator(value: Any, walk: Walk) -> bytes:
    """A generator of numpy: its state; of the global one, which is nobody's input, its name."""
    if value is sys.modules["numpy.random"].mtrand._rand:
        return b"global"
    return python_types.an_object(value, walk)


def _estimator(value: Any, walk: Walk) -> bytes:
    """An estimator of scikit-learn, without the address of its stop words that it keeps."""
    state = {k: v for k, v in vars(value).items() if k != "_stop_words_id"}
    return walk.encode(state)


ADAPTERS: Final[dict[str, Encoder]] = {
    "astropy.Table": node("table", _table),
    "astropy.BaseColumn": node("column", _column),
    "astropy.Quantity": node("quantity", _quantity),
    "astropy.UnitBase": node("unit", _unit),
    "numba.Dispatcher": node("njit", _compiled),
    "numpy.RandomState": node("generator", _generator),
    "sklearn._VectorizerMixin": node("vectorizer", _estimator),
}
"""`package.class` -> encoder, for the values of the class and of its subclasses."""
