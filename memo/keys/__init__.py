"""A function and its arguments become the key of an entry, and the address that invalidates it.

Imports `validity`, `records` and below; it never sees a store.
Start with `call_keys.py`.
"""
