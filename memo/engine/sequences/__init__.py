"""Results in parts: by element of a collection (`each`), or item by item from a generator.

Imports `engine` and below.
Start with `elements.py`, or with `streams.py` and `memo.records.spool`.
"""
