"""Turn values into sealed records, with big buffers in a separate payload, and back.

Imports `settings` (for the secret), `runtime` and `errors`.
Start with `codec.py` for values and `seal.py` for the format and its authentication.
"""
