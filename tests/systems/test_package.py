"""What is built of a checkout: an archive with everything, and an index page whose links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

ROOT = Path(__file__).parents[2]
HOME = "https://example.org/us/prunus"


def _page() -> ProjectMetadata:
    return ProjectMetadata(str(ROOT), PluginManager())


def _targets(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def test_a_release_links_to_where_the_code_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNUS_REPOSITORY", f"{HOME}/")
    core = _page().core
    files = [target.removeprefix(f"{HOME}/") for target in _targets(core.readme) if target.startswith(HOME)]
    assert all(target.startswith("https://") for target in _targets(core.readme))
    assert all((ROOT / re.sub(r"^(blob|raw)/main/|#.*", "", file)).exists() for file in files)
    pictures = [file for file in files if file.endswith(".png")]
    assert pictures
    assert all(file.startswith("raw/") for file in pictures)
    assert len(files) == sum(":" not in target for target in _targets((ROOT / "README.md").read_text()))
    assert core.urls["Repository"] == HOME


def test_without_an_address_nothing_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNUS_REPOSITORY", raising=False)
    core = _page().core
    assert all(target.startswith("https://") for target in _targets(core.readme))
    assert not core.urls
    assert core.requires_python == ">=3.11"


def test_the_archive_has_tests_docs_recipes_and_examples() -> None:
    held = {file.distribution_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    for folder in ("tests", "docs", "recipes", "examples", "benchmarks", "scripts"):
        there = {
            path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"{folder}/**/*.[pmy]*") if "__" not in path.name
        }
        assert there
        assert there <= held
    assert {"README.md", "CONTRIBUTING.md", "demo.sh", "test.sh", "constraints.txt"} <= held
    installed = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {"prunus/py.typed", "prunus/report/page.html", "prunus/__init__.pyi"} <= installed
    assert all(path.startswith("prunus/") for path in installed)
