"""Turn values into canonical bytes: equal values give equal bytes, and different ones differ.

Imports `keys.origin`, `records` and below.
Start with `canonical.py`; there is one module per family of types.
"""
