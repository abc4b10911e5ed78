"""Is an entry still true: generations, dependencies, and lifetimes.

Imports `records` and below.
Start with `stamps.py`; `lifetimes.py` judges the ttl.
"""
