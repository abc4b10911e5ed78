"""Decide whether an entry may be used: its generations, its dependencies, and its age (ttl).

Imports `records` and below.
Start with `check.py`: every path to an answer checks stamps and age there.  `generations.py` has
the one rule for what an invalidation writes; `dependencies.py` takes and checks the stamps of
`depends_on`.
"""
