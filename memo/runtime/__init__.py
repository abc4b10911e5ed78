"""The layer below everything: clock, events, threads and event loops, forks, private files.

Imports `errors` only.
Start with `port.py`, the five verbs through which sync and async code wait.
"""

VERSION = "0.2.0"
"""Of memo: here, so that every folder may tell it."""
FORMAT = 2
"""Of all that is stored: part of each name in Redis and of the folder of a namespace, so that
two versions of memo with different formats share a Redis and a directory."""
