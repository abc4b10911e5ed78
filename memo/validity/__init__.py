"""Is an entry still true: generations, dependencies, and lifetimes.

Imports `records` and below.
Start with `check.py`, the one question that every path asks; `lifetimes.py` judges the ttl, and
`generations.py` has the one rule of what an invalidation turns.
"""
