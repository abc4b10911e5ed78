"""Transport: sends commands to Redis and returns its replies, or a fault, within a deadline.

Imports redis-py, `settings` and below; it does not know keys, entries or scripts of memo.
Start with `exchange.py`, then `thread_connections.py` and `loop_connections.py`, which open the
connections, and `breaker.py`, which refuses calls while a server is down.
"""
