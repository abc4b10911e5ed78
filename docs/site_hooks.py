"""The executed notebooks of `notebooks/` are pages of the site, under `gallery/`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each notebook; leave this file out of the site."""
    folder = Path(config.config_file_path).parent / "notebooks"
    for path in sorted(folder.glob("*.ipynb")):
        files.append(File.generated(config, f"gallery/{path.name}", abs_src_path=str(path)))
    if (own := files.get_file_from_path("site_hooks.py")) is not None:
        files.remove(own)
    return files
