"""The command `memo`: stats, ls, clear, doctor and the demo.

Imports `inspection` and below.
Start with `commands.py`.
"""
