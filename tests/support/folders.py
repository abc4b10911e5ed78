"""The folder in which the tests find the cache that they have just filled."""

from memo.runtime import FORMAT

FOLDER = f"memo.{FORMAT}"
"""Of the default namespace, below the cache directory."""
