"""A function and its arguments become the key of an entry, and the address that invalidates it.

Imports `validity`, `records` and below; it never sees a store.
Start with `call_keys.py`.  `encoding/canonical.py` turns a value into bytes; types of libraries are
in `encoding/libraries/`, a DataFrame for example in `encoding/libraries/for_pandas.py`.
"""
