"""Results in parts: per element of a collection (`each`), and item by item of a generator.

Imports `engine` and below.
Start with `elements.py`, or with `streams.py` and `memo.records.spool`.
"""
