"""Canonical encodings of library values, with one module for each family of libraries.

Imports the rest of `encoding` only, and none of the libraries.
Start with `for_xarray.py`, which is short; `encoding/lookup.py` is the registry.
"""
