"""Decide whether an entry may be used: its generations, dependencies and age.

Imports `records` and below.
Start with `check.py`, which every path uses for stamps and age; `generations.py` has the one rule
for the fields that an invalidation turns.
"""
