"""The code version: a digest of a function and of all code and state that it reaches.

Imports `keys.encoding` and below.
Start with `function_version.py`, which keeps the version of a function and notices changes;
`reachable.py` finds everything that the function reaches.
"""
