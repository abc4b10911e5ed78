"""The executed notebooks of `notebooks/` are pages of the site, under `gallery/`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.plugins import CombinedEvent, event_priority
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

GALLERY = "gallery/"


def _notebooks(config: MkDocsConfig) -> dict[str, str]:
    """Name of a page -> the notebook that it shows."""
    folder = Path(config.config_file_path).parent / "notebooks"
    return {f"{GALLERY}{path.name}": str(path) for path in sorted(folder.glob("*.ipynb"))}


@event_priority(100)  # before the plugin that turns notebooks into pages
def _add(files: Files, config: MkDocsConfig) -> Files:
    """Add each notebook; leave this file out of the site."""
    for name, path in _notebooks(config).items():
        files.append(File.generated(config, name, abs_src_path=path))
    if (own := files.get_file_from_path("site_hooks.py")) is not None:
        files.remove(own)
    return files


@event_priority(-100)  # after it: the plugin's own kind of file has lost the path
def _locate(files: Files, config: MkDocsConfig) -> Files:
    """Say again where each notebook lies."""
    for name, path in _notebooks(config).items():
        file = files.get_file_from_path(name)
        assert file is not None
        file.abs_src_path = path
    return files


on_files = CombinedEvent(_add, _locate)
