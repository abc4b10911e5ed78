"""Inspection of the cache: stored and running calls, their graph, checks, reports.

Imports `decorators` and below.
Start with `inventory.py`, which lists entries with their states.  `doctor.py` checks a set-up;
`live_view.py` has the data of `memo.dashboard()` and `memo ui`.
"""
