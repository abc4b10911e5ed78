"""Counters hooked on the stream of events, and snapshots of them for people and programs.

Imports `runtime` and `errors` only.
Start with `recorder.py`.
"""
