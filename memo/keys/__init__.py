"""A function and its arguments become the key of an entry, and the address that invalidates it.

Imports `validity` and below.
Start with `call_keys.py`.
"""
