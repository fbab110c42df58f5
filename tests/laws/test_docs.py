"""What the documentation shows is true: Python blocks run, YAML blocks are recipes, links lead somewhere."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text, language):
    return [body for found, body in FENCE.findall(text) if found == language]


def anchors(text):
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text):
    """Targets of the links to files, outside code."""
    plain = re.sub(r"`[^`]*`", "", FENCE.sub("", text))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", plain) if "://" not in target]


def named(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def with_block(language):
    return named([page for page in PAGES if blocks(page.read_text(encoding="utf-8"), language)])


@with_block("python")
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """All blocks of a page in order, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__docs__"}
    for number, body in enumerate(blocks(page.read_text(encoding="utf-8"), "python"), 1):
        exec(compile(body, f"{page.name}, block {number}", "exec"), names)


@with_block("yaml")
def test_yaml_blocks_are_recipes(page, tmp_path, monkeypatch):
    from prunus.run.recipe import load_recipe

    monkeypatch.chdir(tmp_path)
    for body in blocks(page.read_text(encoding="utf-8"), "yaml"):
        for file in re.findall(r"[\w.-]+\.(?:txt|parquet|jsonl)", body):
            Path(file).touch()  # recipes refuse files that are not there
        Path("recipe.yaml").write_text(body)
        assert load_recipe(Path("recipe.yaml"), {}).out == yaml.safe_load(body)["out"]


@named(PAGES)
def test_links_lead_somewhere(page):
    for target in links(page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), f"{page.name}: no heading {target}"


def test_every_page_is_reachable_from_the_index():
    seen, todo = set(), [ROOT / "docs" / "index.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        targets = links(page.read_text(encoding="utf-8"))
        todo += [(page.parent / target.split("#")[0]).resolve() for target in targets if target.split("#")[0]]
    assert not set(PAGES) - seen


def test_the_reader_of_pages_reads():
    text = "# A b, C\n[x](y.md#z) `[no](code.md)`\n```python\na = 1\n```\n```\n[no](fence.md)\n```\n[w](https://x.y)\n"
    assert blocks(text, "python") == ["a = 1\n"]
    assert links(text) == ["y.md#z"]
    assert anchors(text) == {"a-b-c"}
