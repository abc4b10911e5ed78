"""One module for each family of libraries: the canonical encodings of its values.

Imports the rest of `encoding` only, and none of the libraries.
Start with `for_xarray.py`, which is short; `encoding/lookup.py` is the registry.
"""
