"""The names of `import prunus`: each documented and exemplified, imported when used, and `import prunus` is cheap."""

import ast
import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import prunus
from prunus.data.texts import ASSETS

ROOT = Path(__file__).parents[2]
SHAPE = re.compile(r"\((\.\.\., |[\w*]+, ?)[\w ]*\)")  # (out, in), (N,), (..., in)


def run(code):
    """What a fresh interpreter prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def executed_names():
    """Names that the executed Python of the documentation and the examples uses."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    texts = [body for page in pages for body in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)]
    texts += [path.read_text() for path in ROOT.glob("examples/*.py")]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


USED = executed_names()


@pytest.mark.parametrize("name", prunus.__all__)
def test_every_public_name_is_documented_with_an_example(name):
    value = getattr(prunus, name)
    text = value.__doc__ or ""
    assert text.strip(), f"prunus.{name} has no docstring"
    assert not text.startswith(f"{name}("), f"prunus.{name} has only the docstring that dataclass makes"
    assert ">>>" in text or SHAPE.search(text) or name in USED, f"prunus.{name} has neither example nor shapes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the docstrings' examples run."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def names(folder):
    """What the examples may take for granted: torch, public names, a tiny model, saved in out/model, a tokenizer."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 8}
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    model = OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), **sizes))
    prunus.save_model(model, tokenizer, folder / "out" / "model", masks=None, info={}, source=ASSETS)
    return {name: getattr(prunus, name) for name in prunus.__all__} | {
        "torch": torch,
        "nn": nn,
        "Path": Path,
        "tokenizer": tokenizer,
        "model": model,
        "batches": lambda step: torch.zeros(2, 8, dtype=torch.long),
    }


class Shown(doctest.OutputChecker):
    """Compares output where the example shows some."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", [name for name in prunus.__all__ if ">>>" in (getattr(prunus, name).__doc__ or "")])
def test_docstring_examples_run(name, names, folder, monkeypatch):
    monkeypatch.chdir(folder)
    heard = []
    example = doctest.DocTestParser().get_doctest(getattr(prunus, name).__doc__, dict(names), name, None, 0)
    doctest.DocTestRunner(Shown(), verbose=False).run(example, out=heard.append)
    assert not heard, "".join(heard)


def test_import_is_cheap():
    loaded = run("import prunus, sys, json; print(json.dumps(sorted(sys.modules)))")
    heavy = {"torch", "transformers", "accelerate", "matplotlib", "pydantic", "numpy", "rich"}
    assert not heavy & set(loaded)


def test_saying_no_is_cheap(tmp_path):
    """The version needs no torch, the refusal of a recipe none of the libraries that are slow to import."""
    for name, text in {"language": "prune: {sparsty: 1}", "images": "images: digits\nmodel: resnet9"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    code = f"""
import contextlib, io, json, sys
from prunus.run.cli import main
found = []
for arguments in (["--version"], ["run", "language.yaml"], ["run", "images.yaml"], ["run", "--sparsity", "2"]):
    sys.argv = ["prunus", *(f"{tmp_path}/{{each}}" if ".yaml" in each else each for each in arguments)]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(out):
            main()
    found.append([out.getvalue(), sorted(sys.modules)])
print(json.dumps(found))
"""
    (version, at_once), *refused = run(code)
    heavy = {"transformers", "accelerate", "torch._dynamo", "triton", "scipy", "matplotlib", "datasets", "PIL"}
    assert version == f"prunus {prunus.__version__}\n"
    assert not (heavy | {"torch"}) & set(at_once)
    for (line, loaded), word in zip(refused, ("sparsty", "resnet9", "[0, 1)"), strict=True):
        assert word in line
        assert not heavy & set(loaded)


def test_functions_win_over_rooms_of_their_name_in_any_order():
    code = """
import json, prunus.stream, prunus.train.lr
from prunus import adapt, score, stream
print(json.dumps([callable(f) for f in (prunus.stream, prunus.train, prunus.prune, adapt, stream)] + [score.__name__]))
"""
    assert run(code) == [True, True, True, True, True, "prunus.score"]


def test_names_are_lazy_and_complete():
    assert set(prunus.__all__) <= set(dir(prunus))
    stub = (ROOT / "src" / "prunus" / "__init__.pyi").read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(stub)) if isinstance(node, ast.ImportFrom)]
    named = [alias.name for node in nodes for alias in node.names]
    assert sorted(named) == sorted(prunus.__all__)
    for node in nodes:  # the rooms themselves say that these names are public
        room = __import__(f"prunus.{node.module}", fromlist=["x"])
        assert {alias.name for alias in node.names} <= set(room.__all__), node.module


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'strem'.*stream"):
        prunus.strem  # noqa: B018


def test_shapes_are_recognised():
    assert all(SHAPE.search(text) for text in ("score: (out, in) float32", "tokens (N,)", "x (..., in)"))
    assert not any(SHAPE.search(text) for text in ("a (parenthesis)", "(so, that this is)."[:4]))
