"""Magics, cell cache, progress and the live view in IPython and notebooks.

Imports `inspection` and below.
Start with `magics.py`; `metrics/rendering.py` draws the tables of `%cache_stats` and `%cache_ls`.
"""
