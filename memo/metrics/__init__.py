"""Counters hooked on the stream of events, and snapshots of them for people and programs.

Imports `keys`, `records` and below, and never the engine, which imports it.
Start with `recorder.py`; `rendering.py` is the one renderer of tables, as text and as HTML.
"""
