"""Turn a function and its arguments into the key of an entry, and the address that invalidates it.

Imports `validity`, `records` and below; it never sees a store.
Start with `call_keys.py`.  `encoding/canonical.py` turns a value into bytes; library types are in
`encoding/libraries/`, for example a DataFrame in `encoding/libraries/for_pandas.py`.
"""
