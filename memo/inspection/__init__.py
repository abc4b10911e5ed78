"""Facts about the cache for people: what is stored, what a stretch of time did, how it is shown.

Imports `decorators` and below.
Start with `inventory.py`.
"""
