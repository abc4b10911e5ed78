"""The decorators `cache` and `invalidate_cache`, cached functions, and their options.

Imports the engine and everything below it; `jupyter`, `cli` and `inspection` build on it.
Start with `cache_decorator.py`, which makes the classes of `cached_function.py`.
"""
