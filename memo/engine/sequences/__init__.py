"""Results in parts: per element of a collection (`each`).

Imports `engine` and below.
Start with `elements.py`.
"""
