"""Facts about the cache for people: what is stored, what a stretch of time did, what rests on what.

Imports `decorators` and below.
Start with `inventory.py`.
"""
