"""A call and its answer: look up, judge, load or compute, store; written once for sync and async.

Imports `keys`, `stores`, `validity`, `records` and below; it never sees a particular store.
Start with `answering.py`, then `computing.py`.  `coordination/flights.py` lets callers share a
computation, and `coordination/leases.py` takes and renews the leases of `use_lock`.
"""
