"""A value becomes a sealed record, with its big buffers in a payload beside it, and back.

Imports `settings` (for the secret), `runtime` and `errors`.
Start with `codec.py` for values and `seal.py` for the format and its authentication.
"""
