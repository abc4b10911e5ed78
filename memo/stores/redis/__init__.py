"""The Redis tier: records, payloads and generations that all hosts share.

Imports `stores.protocols` and below.
Start with `redis_tier.py`.
"""
