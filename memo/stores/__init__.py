"""Storage of entries: the chain of tiers, memory, disk, Redis, and a user's own store.

Imports `validity`, `records` and below; it never imports the engine.
Start with `protocols.py` for what a tier is, then `chain.py`.
"""
