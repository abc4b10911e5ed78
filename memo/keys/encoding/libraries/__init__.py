"""Canonical encodings of library values, with one module for each family of libraries.

numpy, torch and scipy's sparse arrays are in `for_arrays.py`; Arrow and polars in `for_arrow.py`;
astropy, numba and scipy's distributions in `for_science.py`; open files, stores and database
connections in `for_handles.py`.  The others are named after their library.

Imports the rest of `encoding` only, and none of the libraries.
Start with `for_xarray.py`, which is short; `encoding/lookup.py` is the registry.
"""
