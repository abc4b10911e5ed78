"""Turning a function into a cached one: `cache`, `invalidate_cache`, and their options.

Imports the engine and everything below it; `jupyter`, `cli` and `inspection` build on it.
Start with `cached_function.py`.
"""
