"""The code version: a digest of a function and of all code and state that it reaches.

Imports `keys.encoding` and below.
Start with `function_version.py`.
"""
