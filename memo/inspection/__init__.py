"""Inspection of the cache: stored and running calls, their graph, checks, reports.

Imports `decorators` and below.
Start with `inventory.py`.
"""
