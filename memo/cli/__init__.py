"""The command line: `memo stats`, `ls`, `clear`, `doctor`, `demo`, `ui` and others.

Imports `inspection` and below.
Start with `commands.py`.
"""
