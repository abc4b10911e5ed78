"""The layer below everything: clock, events, threads and event loops, forks, private files.

Imports `errors` only.
Start with `port.py`, the five verbs through which sync and async code wait.
"""

VERSION = "0.2.0"
"""The version of memo, in the lowest folder so that all others can import it."""
FORMAT = 2
"""The version of all that is stored.  It is part of each name in Redis and of a namespace's folder,
so that two versions of memo with different formats can share a Redis and a directory."""
