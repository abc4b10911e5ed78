"""Facts about the cache: stored entries, calls under way, the graph of calls, findings, reports.

Imports `decorators` and below.
Start with `inventory.py`.
"""
