"""What the documentation shows is true: Python blocks and examples run, YAML blocks and recipes/ are recipes, commands
parse, tables of keys and flags are complete, links lead somewhere."""

import json
import re
import runpy
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pretrain import read_recipe  # pyright: ignore[reportMissingImports] - a script, on pytest's path
from pydantic import BaseModel

from tests.pages import MARKED

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(  # blocks that are neither Python nor a recipe, with what stands above each
    r"^(?:<!-- ((?:not )?run\b[^\n]*) -->\n)?```(?:console|bash|sh)?\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
COMMAND = re.compile(r"^(\$ |\./\w|\. |pip |python|prunus |from |import |optimum-cli |\w+ = prunus)", re.MULTILINE)


def blocks(text: str, language: str):
    return [body for found, body in FENCE.findall(text) if found == language]


def anchors(text: str):
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str):
    """Targets of the links to files, outside code."""
    plain = re.sub(r"`[^`]*`", "", FENCE.sub("", text))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", plain) if "://" not in target]


def named(pages: Any):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def with_block(language: str):
    return named([page for page in PAGES if blocks(page.read_text(encoding="utf-8"), language)])


@with_block("python")
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All blocks of a page in order, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__docs__"}
    apart = MARKED.sub("", page.read_text(encoding="utf-8"))  # which `tests.pages` runs
    for number, body in enumerate(blocks(apart, "python"), 1):
        exec(compile(body, f"{page.name}, block {number}", "exec"), names)


EXAMPLES = sorted(ROOT.glob("examples/*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out, f"{path.name} shows nothing"


def touch_files_named_in(text: str):
    """Recipes refuse files that are not there."""
    for file in re.findall(r"(?<![\w/.-])[\w./-]+\.(?:txt|parquet|jsonl|gz|gguf)\b|\./[\w./-]+", text):
        if not file.startswith("/"):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).touch()


def make_encoder(raw: dict[str, Any]):
    """A recipe of an encoder refuses a model that is no folder of one."""
    base = raw.get("base", raw)
    if "texts" in base:
        from transformers import BertConfig, BertModel

        small = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
        Path(base["model"]).unlink()
        BertModel(BertConfig(vocab_size=2, **small)).save_pretrained(base["model"])


def check_recipe(text: str):
    """The text is a recipe of one of our kinds."""
    from prunus.run.grid import load_grid
    from prunus.run.task import load
    from prunus.vision.sweeps import SweepFile

    touch_files_named_in(text)
    path, raw = Path("checked.yaml"), yaml.safe_load(text)
    make_encoder(raw)
    path.write_text(text)
    if "sweep" in raw:
        assert SweepFile.model_validate(raw).sweep.rates
    elif "axes" in raw:
        grid = load_grid(path, None)
        assert sum(len(grid.cell_seeds(cell)) for cell in grid.cells()) > 1
    elif "held_out" in raw:
        assert read_recipe(path).held_out.test
    else:
        assert load(path, {}).out == raw.get("out", "runs/run")


@with_block("yaml")
def test_yaml_blocks_are_recipes(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for body in blocks(page.read_text(encoding="utf-8"), "yaml"):
        check_recipe(body)


@named(sorted(ROOT.glob("recipes/**/*.yaml")))
def test_recipes_are_recipes(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# "), f"{page} does not begin with what it is and what came of it"
    check_recipe(text)


def test_a_wrong_recipe_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"unknown key 'prune\.sparsty'"):
        check_recipe("prune: {sparsty: 0.5}")


def checked(path: Path | None, overrides: Any, **how: Any):
    """In place of a run: what would be run. Of the folder of a run no recipe is there."""
    from prunus.run.task import load

    recipe = load(path, overrides) if path is None or path.suffix else None
    return lambda: recipe


def commands_of(text: str):
    """The commands of a page; recipe.yaml is the recipe above each."""
    Path("recipe.yaml").touch()
    for language, body in FENCE.findall(text):
        if language == "yaml" and not {"axes", "sweep"} & set(yaml.safe_load(body)):
            touch_files_named_in(body)
            make_encoder(yaml.safe_load(body))
            Path("recipe.yaml").write_text(body)
        elif language == "console":
            yield from re.findall(r"^\$ (.+)$", body, re.MULTILINE)


@with_block("console")
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    check_commands(commands_of(page.read_text(encoding="utf-8")), monkeypatch)


def unmarked(text: str) -> list[str]:
    """The blocks of commands that are neither run nor say why not."""
    return [
        body
        for mark, body in COMMANDS.findall(re.sub(r"^```(python|yaml|json)\n.*?^```$", "", text, flags=re.M | re.S))
        if COMMAND.search(body) and not re.match(r"run$|run: with \S|not run: \S", mark)
    ]


@named(PAGES)
def test_commands_run_or_say_why_not(page: Path):
    left = unmarked(page.read_text(encoding="utf-8"))
    assert not left, f"{page.name}: put <!-- run --> or <!-- not run: WHY --> above\n{left[0]}"


def test_every_help_has_examples_and_they_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from typer.main import get_command

    from prunus.run.cli import app

    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").touch()
    commands = vars(get_command(app))["commands"]
    examples = {
        name: re.findall(r"^ *\$ (prunus .+)$", command.help, re.MULTILINE) for name, command in commands.items()
    }
    assert all(shlex.split(line)[1] == name for name, lines in examples.items() for line in lines)
    assert all(examples.values())
    check_commands([line for lines in examples.values() for line in lines], monkeypatch)


def check_commands(lines: Iterable[str], monkeypatch: pytest.MonkeyPatch):
    """`prunus show` runs; `run` runs up to its checked recipe; of the others the arguments are read."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from prunus.run.cli import app

    monkeypatch.setattr("prunus.run.task.run_recipe", checked)
    monkeypatch.setattr("prunus.run.task.plan_recipe", checked)
    for line in lines:
        words = shlex.split(line.partition(" > ")[0])
        start = next((i for i, word in enumerate(words) if word in ("prunus", "prunus.run.cli")), None)
        if start is None:
            continue
        touch_files_named_in(line)
        name, *arguments = words[start + 1 :]
        if name in ("show", "run"):
            done = CliRunner().invoke(app, [name, *arguments])
            assert done.exit_code == 0, f"{line}: {done.exception} {done.output}"
        else:
            vars(get_command(app))["commands"][name].make_context(name, arguments)


@named(sorted(ROOT.glob("docs/results/**/members.jsonl")))
def test_results_are_kept_under_the_hash_of_their_recipe(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So that tables can be made of them again, and their grids go on."""
    from prunus.recipe import Recipe, digest, parse, said

    monkeypatch.chdir(tmp_path)
    lines = page.read_text(encoding="utf-8").splitlines()
    for line in lines[:: max(1, len(lines) // 8)]:
        touch_files_named_in(line)
        row = json.loads(line)
        recipe = parse(row["recipe"], Recipe, row["key"])
        assert digest(said(recipe, but={"out", "save"}))[:24] == row["key"]


REFERENCE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def table_under(heading: str):
    """The rows of the first table under a heading, as lists of cells."""
    section = re.split(r"^#+ ", REFERENCE.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [re.split(r" \| ", line.strip("| ")) for line in section.splitlines() if line.startswith("| `")]
    assert rows, f"no table under {heading!r}"
    return rows


def words_of(annotation: Any):
    """The words that a field's type allows."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {word for inner in get_args(annotation) for word in words_of(inner)}


SHARED = {"Every recipe": "Recipe", "`prune`": "Prune", "`retrain`": "Retrain", "`soup`": "Soup"}
OWN = {
    "The language recipe": "LanguageRecipe",
    "Language `retrain`": "LanguageRetrain",
    "The classifier recipe": "ClassifierRecipe",
    "Classifier `prune`": "ClassifierPrune",
    "Classifier `retrain`": "ClassifierRetrain",
}
WHOLE = {
    "`soup.vary`": "Vary",
    "`calibrate`": "Calibrate",
    "`shrink`": "Shrink",
    "`reconstruct`": "Reconstruct",
    "`retrain.dense`": "DenseRates",
    "`evaluate`": "Evaluate",
    "`evaluate.speed`": "Pace",
    "Texts": "Data",
    "Classifier `images`": "ImageSource",
    "Encoder `texts`": "LabelledTexts",
    "Classifier `train`": "Training",
    "Classifier `optimizer`": "Sfw",
    "Classifier `augment`": "Augmentation",
    "Classifier `corruptions`": "Corruptions",
    "Grids": "Grid",
}


def default_of(field: Any):
    default = field.get_default(call_default_factory=True)
    default = default.model_dump(exclude_none=True) if isinstance(default, BaseModel) else default
    return list(default) if isinstance(default, tuple) else default


@pytest.mark.parametrize(("heading", "section"), [*SHARED.items(), *OWN.items(), *WHOLE.items()])
def test_the_reference_of_keys_is_complete_and_true(heading: str, section: str):
    """A shared section has the defaults of language models, and in brackets those of classifiers that are others."""
    from prunus import recipe
    from prunus.recipe import optimizers
    from prunus.run import grid

    named = [getattr(module, section) for module in (recipe, optimizers, grid) if hasattr(module, section)]
    fields = named[0].model_fields
    shared = next((name for name in SHARED.values() if section in OWN.values() and section.endswith(name)), None)
    inherited = getattr(recipe, shared).model_fields if shared else {}
    others = getattr(recipe, f"Classifier{section}").model_fields if section in SHARED.values() else fields
    usual = recipe.LanguageRecipe.model_fields if section == "Recipe" else fields
    rows = table_under(heading)
    assert [row[0].strip("`") for row in rows] == [key for key in fields if key not in inherited]
    for key, cell, meaning in rows:
        key = key.strip("`")
        field = usual[key]
        words = {word for word in words_of(field.annotation) if f"`{word}`" not in f"{cell} {meaning}"}
        assert not words, f"{heading}, {key}: the values {words} are not named"
        if cell in ("section", "text"):
            assert not field.is_required()
        elif cell == "required":
            assert field.is_required()
        else:
            shown = [yaml.safe_load(each) for each in re.findall(r"`([^`]*)`", cell)]
            found = [default_of(each) for each in (field, others[key])]
            expected = found[:1] if found[0] == found[1] else found
            assert [None if each == "none" else each for each in shown] == expected, f"{heading}, {key}"


def test_the_table_of_flags_is_complete():
    from typer.main import get_command

    from prunus.run.cli import app, run_flags

    command = vars(get_command(app))["commands"]["run"].make_context("run", []).command
    flags = {option for param in command.params if param.name != "recipe" for option in param.opts}
    rows = [[cell.strip("`") for cell in row] for row in table_under("Flags")]
    assert {row[0] for row in rows} == flags
    assert {row[0]: row[1] for row in rows if row[0][2:] in {flag.name for flag in run_flags()}} == {
        f"--{flag.name}": flag.key for flag in run_flags()
    }


@named(PAGES)
def test_no_page_keeps_the_marks_of_a_merge(page: Path):
    assert not re.search(r"^(<{7}|>{7}) ", page.read_text(encoding="utf-8"), re.MULTILINE)


@named(PAGES)
def test_links_lead_somewhere(page: Path):
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
    fence = "```console\n$ prunus demo\n```\n"
    assert len(unmarked(f"{fence}<!-- not run: -->\n{fence}```\nx = 1\n```\n<!-- run -->\n\n{fence}")) == 3
    assert not unmarked(
        f"<!-- run -->\n{fence}<!-- not run: a server -->\n{fence}```python\n{fence[:-4]}import x\n```\n"
    )
    text = "# A b, C\n[x](y.md#z) `[no](code.md)`\n```python\na = 1\n```\n```\n[no](fence.md)\n```\n[w](https://x.y)\n"
    assert blocks(text, "python") == ["a = 1\n"]
    assert links(text) == ["y.md#z"]
    assert anchors(text) == {"a-b-c"}
