"""Decide whether an entry may be used: its generations, dependencies and age.

Imports `records` and below.
Start with `check.py`, which every path asks about stamps and age (`judge` compares the ttl);
`generations.py` has the one rule of what an invalidation turns.
"""
