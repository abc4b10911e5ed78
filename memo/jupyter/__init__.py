"""Magics, cell cache, progress and the live view in IPython and notebooks.

Imports `inspection` and below.
Start with `magics.py`.  The tables of `%cache_stats` and `%cache_ls` are drawn by
`metrics/rendering.py`.
"""
