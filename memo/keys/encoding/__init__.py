"""Turn values into canonical bytes: equal values give equal bytes, and different ones differ.

Imports `runtime` and `errors` only.
Start with `canonical.py`; there is one module per family of types.
"""
