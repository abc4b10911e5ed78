"""One computation per key: flights within a process, leases across processes and hosts.

Imports `stores` and below.
Start with `flights.py`; `leases.py` implements `use_lock=True`.
"""
