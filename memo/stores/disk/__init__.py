"""The disk tier and what the processes of one host share: index, payload files, locks, generations.

Imports `stores.protocols` and below.
Start with `disk_tier.py`; `host_state.py` keeps the generations of this host.
"""
