"""A function and all the code and state that it reaches become its code version.

Imports `keys.encoding` and below.
Start with `function_version.py`.
"""
