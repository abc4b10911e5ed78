"""Settings: where they come from, what each must look like, and values that change while running.

Imports `validity`, `records` and below.
Start with `configuration.py`.
"""
