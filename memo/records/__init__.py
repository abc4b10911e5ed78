"""Turn values into sealed records, with big buffers in a separate payload, and back.

Imports `settings` (for the secret), `runtime` and `errors`.
Start with `codec.py` for values and `seal.py` for the format and its authentication.
`stamp_types.py` has the stamps and times of an entry as plain data.
"""
