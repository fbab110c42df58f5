"""What a package index shows of Prunus: the README with links that work there, and where the code is.

PRUNUS_REPOSITORY=https://host/owner/prunus   when a release is built: files and pictures are those of its branch main
left out                                      links to files are plain words, pictures are left out
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURE = re.compile(r"!\[[^]]*\]\((?!\w+:)([^)]+)\)")
LINK = re.compile(r"(?<!!)\[([^]]+)\]\((?!\w+:)([^)]+)\)")
PAGES = {"Documentation": "blob/main/docs/index.md", "Changelog": "blob/main/CHANGELOG.md", "Issues": "issues"}


class Metadata(MetadataHookInterface):
    """hatchling asks it for `readme` and `urls`, which pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add them."""
        home = os.environ.get("PRUNUS_REPOSITORY", "").rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": shown(text, home)}
        metadata["urls"] = (
            {"Repository": home} | {name: f"{home}/{page}" for name, page in PAGES.items()} if home else {}
        )


def shown(text: str, home: str) -> str:
    """The README as an index shows it."""
    if not home:
        return LINK.sub(r"\1", PICTURE.sub("", text))
    pictured = PICTURE.sub(lambda found: found[0].replace(found[1], f"{home}/raw/main/{found[1]}"), text)
    return LINK.sub(rf"[\1]({home}/blob/main/\2)", pictured)
