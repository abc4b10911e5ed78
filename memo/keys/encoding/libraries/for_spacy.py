"""Encode pipelines and documents of spaCy by their serialized form.

A pipeline remembers each word that it has met, and writes sets in any order; neither affects its
results.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from memo.keys.encoding.canonical import Encoder, Walk, encode_class
from memo.keys.encoding.libraries.for_arrays import node

_SETS: Final = ("strings", "punct_chars")
"""Parts that spaCy writes as a list in the order of a set."""


def _serialize(value: Any, walk: Walk) -> bytes:
    """Encode a part of a pipeline by its serialized form, or as a plain object if it has none."""
    if not hasattr(value, "to_bytes"):
        return walk.encode(value)
    facts = sys.modules["srsly"].msgpack_loads(value.to_bytes(exclude=["vocab"]))
    for name in _SETS:
        if isinstance(facts, dict) and name in facts:
            facts[name] = sorted(facts[name])
    return encode_class(value, walk) + walk.encode(facts)


def _pipeline(value: Any, walk: Walk) -> bytes:
    """Encode a pipeline: its configuration, components, tokenizer and vectors."""
    vocab = value.vocab
    vectors = vocab.vectors
    words = (vectors.mode, vectors.data, sorted(vectors.key2row.items()), vocab.lookups.to_bytes())
    facts = (value.config.to_str(interpolate=False), value.lang, value.disabled)
    content = walk.encode(facts) + walk.encode(words) + _serialize(value.tokenizer, walk)
    for name, part in value.components:
        content += walk.encode(name) + _serialize(part, walk)
    return content


def _span(value: Any, walk: Walk) -> bytes:
    place = (value.start, value.end, value.label_, value.kb_id_)
    return walk.encode(place) + walk.encode(value.doc)


def _token(value: Any, walk: Walk) -> bytes:
    return walk.encode(value.i) + walk.encode(value.doc)


ADAPTERS: Final[dict[str, Encoder]] = {
    "spacy.Language": node("pipeline", _pipeline),
    "spacy.Doc": node("document", _serialize),
    "spacy.Span": node("span", _span),
    "spacy.Token": node("token", _token),
}
"""`package.class` -> encoder, for values of the class and its subclasses."""
