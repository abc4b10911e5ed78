"""The Redis tier: records, payloads and generations that all hosts share.

Imports `stores.protocols` and below.
Start with `redis_tier.py`; `client.py` runs its commands and scripts, over `transport/`.
"""
