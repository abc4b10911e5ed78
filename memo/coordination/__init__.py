"""One computation per key: flights within a process, leases across processes and hosts.

Imports `stores` and below.
Start with `flights.py`; `leases.py` acquires, renews and releases the leases of `use_lock=True`.
"""
