"""Magics, cell cache, progress and the live view in IPython and notebooks.

Imports `inspection` and below.
Start with `magics.py`.
"""
