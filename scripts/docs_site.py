"""What mkdocs needs besides docs/: the order of its pages, the API, and files of the repository that pages link to.

README.md            ─▶ the front page                docs/index.md   ─▶ contents, and the order of all pages
**/__init__.pyi      ─▶ api/, a page a room           recipes/x.yaml  ─▶ source/, where a page links to it
"""

from __future__ import annotations

import ast
import re
import textwrap
from functools import cache
from pathlib import Path
from posixpath import relpath
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "prunus"
FRONT = {"README.md": "index.md", "docs/index.md": "contents.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[#)])")
FENCE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
Config = Any


def on_config(config: Config) -> Config:
    """The navigation is that of docs/index.md: a section for each heading, a page for each link."""
    index = DOCS / "index.md"
    nav: list[dict[str, Any]] = []
    for part in re.split(r"^## ", index.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        found = re.findall(r"^- \[([^]]+)\]\(([^)]+)\)", part, re.MULTILINE)
        nav.append({part.splitlines()[0]: [{name: placed(index, target)} for name, target in found]})
    nav[-1]["Look up"].append({"All pages": "contents.md"})
    config.nav = [*nav, {"API": [{title: page} for title, page, _ in api()]}]
    return config


def on_files(files: Files, config: Config) -> Files:
    """Add the pages that are made, and those that pages link to."""
    files.remove(files.get_file_from_path("index.md"))
    sources = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
    linked = {target for page in sources for target in targets(page) if not target.is_relative_to(DOCS)}
    for path in {*linked, *sources[:3], DOCS / "index.md"}:
        files.append(File.generated(config, place(path), content=shown(path)))
    for _, page, text in api():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Config, files: Files) -> str:
    """Links as the site has them, on pages that lie in docs/."""
    path = page.file.abs_src_path
    return markdown if path is None else moved(Path(path), markdown)


def moved(path: Path, text: str) -> str:
    """The text of a file of the repository with its links as the site has them, outside code."""
    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(lambda link: placed(path, link[1], place(path)), part) for part in parts[::2]]
    return "".join(parts)


def targets(path: Path) -> list[Path]:
    """The files that a page links to."""
    return [(path.parent / link).resolve() for link in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8")))]


def place(path: Path) -> str:
    """Where a file of the repository stands in the site."""
    name = path.relative_to(ROOT).as_posix()
    if name in FRONT:
        return FRONT[name]
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"source/{name}/index.md" if path.is_dir() else f"source/{name.removesuffix('.md')}.md"


def placed(path: Path, link: str, page: str = "") -> str:
    """A link of a file of the repository, from the page of the site (its root if not said)."""
    return relpath(place((path.parent / link).resolve()), str(Path(page).parent))


def shown(path: Path) -> str:
    """A file of the repository as a page: Markdown as it is, another text as code, a folder as a list of its files."""
    name = path.relative_to(ROOT)
    if path.is_dir():
        inside = sorted(path.rglob("*.yaml"))
        lines = [f"- `{file.relative_to(ROOT)}`: {first(file)}" for file in inside]
        return f"# {name}\n\n" + "\n".join(lines) + "\n"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return moved(path, text)
    language = {".py": "python", ".yaml": "yaml"}.get(path.suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n```{language}\n{text}```\n"


def first(recipe: Path) -> str:
    """What a recipe says that it is."""
    return recipe.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def api() -> list[tuple[str, str, str]]:
    """A page for each room that has public names: title, place, text. Names of `prunus` itself come first."""
    own = names_of(PACKAGE)
    table = re.findall(r"^\| `(\w+)(?:/|\.py)` \| (.+) \|$", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    pages = [("prunus", "api/index.md", overview(own))]
    for room, holds in table:
        names = names_of(PACKAGE / room) if (PACKAGE / room).is_dir() else listed(PACKAGE / f"{room}.py")
        first = {name: path for name, path in own.items() if path.startswith(f"prunus.{room}.")}
        entries = [entry(path, f"prunus.{name}") for name, path in first.items()]
        entries += [entry(path, f"prunus.{room}.{name}") for name, path in names.items() if name not in first]
        if entries:
            head = f"# prunus.{room}\n\n{holds[0].upper()}{holds[1:]}.\n\n"
            modules = dict.fromkeys(path.rpartition(".")[0] for path in [*first.values(), *names.values()])
            pages.append((room, f"api/{room}.md", head + "\n".join([*entries, *map(about, modules)])))
    return pages


def overview(own: dict[str, str]) -> str:
    """The page of the package: every name that `import prunus` gives, by room."""
    rooms: dict[str, list[str]] = {}
    for name, path in own.items():
        rooms.setdefault(path.split(".")[1], []).append(f"[`{name}`]({path.split('.')[1]}.md#{path})")
    rows = [f"| [{room}]({room}.md) | {', '.join(names)} |" for room, names in rooms.items()]
    head = "What `import prunus` gives, by room. Everything else is reached by its room: `prunus.train`.\n\n"
    return f"# prunus\n\n{head}| room | names |\n|---|---|\n" + "\n".join(rows) + "\n"


@cache
def names_of(folder: Path) -> dict[str, str]:
    """Public name -> where it is defined, as the folder's stub says; of a module there, the names in it; each once."""
    stub, inside, found = folder / "__init__.pyi", ".".join(folder.relative_to(PACKAGE.parent).parts), dict[str, str]()
    tree = ast.parse(stub.read_text(encoding="utf-8") if stub.exists() else "")
    for node in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
        for name in (alias.name for alias in node.names):
            if node.module is None:
                within = names_of(folder / name) if (folder / name).is_dir() else listed(folder / f"{name}.py")
                found |= {f"{name}.{each}": path for each, path in within.items()}
            else:
                found[name] = defined(f"{inside}.{node.module}", name)
    nearest = sorted((name for name in found if found[name]), key=lambda name: name.count("."))
    once = {found[name]: name for name in reversed(nearest)}
    return {name: path for name, path in found.items() if once.get(path) == name}


@cache
def package() -> Any:
    return griffe.load("prunus", search_paths=[PACKAGE.parent], allow_inspection=False, submodules=True)


def defined(module: str, name: str) -> str:
    """`prunus.score.criteria.wanda` for `wanda` of `prunus.score`, where modules pass it on."""
    folder = PACKAGE.parent / module.replace(".", "/")
    if (folder / "__init__.pyi").exists():  # where a function and its file have one name
        return names_of(folder)[name]
    try:
        return package()[f"{module}.{name}".removeprefix("prunus.")].canonical_path
    except KeyError:  # one of several constants that are assigned at once
        return ""


def listed(file: Path) -> dict[str, str]:
    """Public name -> where it is defined, as the `__all__` of a file says."""
    names = re.search(r"^__all__ = (\[[^]]+\])", file.read_text(encoding="utf-8"), re.MULTILINE)
    module = ".".join(file.with_suffix("").relative_to(PACKAGE.parent).parts)
    return {name: f"{module}.{name}" for name in (ast.literal_eval(names[1]) if names else [])}


def entry(path: str, title: str) -> str:
    return f'::: {path}\n    options:\n      heading: "{title}"\n      toc_label: "{title.rpartition(".")[2]}"\n'


def about(module: str) -> str:
    """What a module says of itself, where formulas stand."""
    docstring = package()[module.removeprefix("prunus.")].docstring
    return f"## `{module}`\n\n{as_markdown(docstring.value, set())}\n" if docstring else ""


class Prose(griffe.Extension):
    """Docstrings as Markdown: examples and formulas are code, each parameter is a paragraph, signs stay signs."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            names = {p.name for p in getattr(obj, "parameters", [])} | set(obj.members)
            obj.docstring.value = as_markdown(obj.docstring.value, names)


def as_markdown(text: str, names: set[str]) -> str:
    """Paragraphs that begin with >>> or are indented are code; so is what is indented below a colon."""
    apart = re.sub(r"(?<=:)\n(?=    )", "\n\n", text.strip("\n"))
    return "\n\n".join(_paragraph(block, names) for block in re.split(r"\n\s*\n", apart))


def _paragraph(block: str, names: set[str]) -> str:
    if block.startswith((">>>", "    ")):
        language = "pycon" if ">>>" in block else "text"
        return f"```{language}\n{textwrap.dedent(block)}\n```"

    def head(found: re.Match[str]) -> str:
        return f"\n\n`{found[1]}`: " if set(found[1].split(", ")) <= names else found[0]

    text = " ".join(line.strip() for line in block.splitlines())
    parts = re.split(r"(`[^`]*`)", re.sub(r"(?:^|(?<=[.;)] ))(\w+(?:, \w+)*): ", head, text))
    parts[::2] = [re.sub(r"([*_\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts).strip()
