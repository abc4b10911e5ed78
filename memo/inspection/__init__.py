"""Inspection of the cache: stored and running calls, their graph, findings, reports.

Imports `decorators` and below.
Start with `inventory.py`.
"""
