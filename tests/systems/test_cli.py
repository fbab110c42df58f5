"""The command line: what each command takes, how mistakes end, a full disk and Ctrl-C."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prunus import __version__
from prunus.language.stages import fitted
from prunus.patterns import Unstructured
from prunus.recipe import ClassifierRecipe, LanguageRecipe, Recipe, digest, given, load_recipe, parse, said
from prunus.recipe.plain import yaml_value
from prunus.run import cli
from prunus.vision.dense import dense_key
from tests.processes import start
from tests.systems.test_compress import raw

OPTIONS = {
    "run": "recipe --set --workers --together --ray " + " ".join(f"--{flag.name}" for flag in cli.run_flags()),
    "grid": "recipes --set --device --out --workers --together --ray --minutes",
    "evaluate": "model --data --set --out " + " ".join(f"--{flag.name}" for flag in cli.evaluate_flags()),
    "inspect": "path --all --out",
    "measure": "models --set --device --prompt --tokens --batch-size --seconds --out",
    "unpack": "packed out",
    "write": "model out --data --set " + " ".join(f"--{flag.name}" for flag in cli.write_flags()),
    "report": "folders --out",
    "average": "checkpoints --out --weights --greedy --how --base --set --device",
    "merge": "base adapter out --device",
    "show": "recipe --set --names",
    "schema": "",
    "demo": "what --out --sparsity --device",
}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The command with arguments, in this process -> (exit status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["prunus", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run


@pytest.mark.parametrize(("command", "options"), OPTIONS.items())
def test_help_names_every_option(call: Any, command: str, options: str) -> None:
    status, out, _ = call(command, "--help")
    assert status == 0
    assert [option for option in options.split() if option not in out] == []
    assert {c.callback.__name__ for c in cli.app.registered_commands if c.callback} == set(OPTIONS)


def test_version(call: Any) -> None:
    assert call("--version")[:2] == (0, f"prunus {__version__}\n")


def refused(call: Any, *arguments: object) -> str:
    """The one line with which the command ends."""
    status, _, err = call(*arguments)
    assert status == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.strip() and "it/s" not in line]  # bars of the model's loading
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize("place", ["-", "/dev/fd"])
def test_recipes_are_read_from_standard_input_and_pipes(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    recipe = b"prune: {sparsity: 0.625}"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(recipe)))
    reads, writes = os.pipe()
    os.write(writes, recipe)
    os.close(writes)
    status, out, err = call("show", place if place == "-" else f"{place}/{reads}")
    os.close(reads)
    assert status == 0, err
    assert "sparsity: 0.625" in out


WRITE = ["write", "{tiny}", "out", "--device", "cpu", "--tokens", "128", "--length", "32", "--data"]
MISTAKES = [
    (["run", "nowhere.yaml"], "no recipe 'nowhere.yaml'", "see recipes/"),
    (["run", "{f}/unknown.yaml"], "unknown key 'prune.sparsty'", "did you mean 'sparsity'"),
    (["run", "{f}/torn.yaml"], "torn.yaml is not YAML", "line 1"),
    (["run", "{f}/list.yaml"], "a recipe is a mapping", "list"),
    (["run", "--sparsity", "1.5"], "1.5", "[0, 1)"),
    (["run", "--pattern", "2:4", "--sparsity", "0.7"], "0.7", "0.5"),
    (["run", "--model", "./no-model"], "no file or folder './no-model'", "seen from"),
    (["run", "--model", "{f}"], "has no config that opens", "config.json"),
    (["run", "--model", "{f}/quantised"], "of what lies there (plum.gguf)", "name one file"),
    (["evaluate", "{f}/quantised"], "of what lies there (plum.gguf)", "name one file"),
    (["run", "--set", "prune.sparsity"], "'prune.sparsity'", "key=value"),
    (["run", "--set", "prune={"], "--set prune={", "not YAML"),
    (["run", "--device", "cudda"], "'cudda'", "a device is auto, cpu, cuda"),
    (["run", "--set", "calibrate.length=513"], "calibrate.length: 513 tokens", "set calibrate.length to 512"),
    (["evaluate", "embedded", "--window", "513"], "evaluate.window: 513 tokens", "set evaluate.window to 512"),
    (["evaluate", "{tiny}", "--window", "64", "--data", "{f}/short.txt"], "no window of 64", "more text"),
    (["evaluate", "{tiny}", "--data", "{f}/missing.txt"], "missing.txt", "give an existing path"),
    (["evaluate", "{tiny}", "--data", "owner/name"], "'owner/name'", "pip install 'prunus[datasets]'"),
    (["evaluate", "{tiny}", "--tasks", "{rte: 3}"], "evaluate.tasks.rte", "string"),
    (["evaluate", "{tiny}", "--windows", "64"], "No such option: --windows", "--window"),
    (["inspect", "{f}/nowhere"], "nowhere is not there", "give a local model folder"),
    (["inspect", "{f}"], "holds neither model.safetensors nor", "give a folder"),
    (["inspect", "{f}/pickled/pytorch_model.bin"], "could run code", "model.state_dict()"),
    (["grid", "{f}/nowhere.yaml"], "nowhere.yaml", ""),
    (["grid", "{f}/grid.yaml"], "unknown key 'axis'", "did you mean 'axes'"),
    (["run", "{f}/small.yaml"], "with the key 'axes' this is a grid", "run it with `prunus grid`"),
    (["grid", "{f}/digits.yaml"], "without the key 'axes' this is no grid", "run it with `prunus run`"),
    (["run", "--lrr", "1"], "No such option: --lrr", "--lr"),
    (["run", "--steps", "many"], "retrain.steps", "many"),
    (["run", "--workers", "2"], "workers, together and ray", "this recipe has none"),
    (["grid"], "Missing argument 'recipes'", "--help"),
    (["compress"], "No such command 'compress'", "--help"),
    (["average", "{f}/pickled", "--out", "x", "--weights", "a"], "--weights 'a'", "as in 0.5"),
    (["demo", "--sparsity", "2"], "2.0", "[0, 1)"),
    (["demo", "--sparsity", "[1]"], "[1]", "--sparsity"),
    (["show", "--set", "soup=true"], "soup: give a section, a mapping with keys such as members, vary", "(got True)"),
    (["show", "--set", "evaluate.data=5"], "evaluate.data: give a mapping, {name: value}", "(got 5)"),
    (["show", "--set", "calibrate.data.part=1"], "calibrate.data.part: give a list", "(got 1)"),
    (["show", "--set", "prunes=1"], "unknown key 'prunes'", "did you mean 'prune'"),
    (["show", "--set", "images=digits", "--set", "modle=resnet8"], "unknown key 'modle'", "did you mean 'model'"),
    (["demo", "sound"], "'sound'", "use language or vision"),
    (["demo", "vision", "--sparsity", "1"], "1.0", "[0, 1)"),
    (["run", "{f}/nowhere.yaml"], "no recipe", "see recipes/"),
    (["run", "{f}/digits.yaml", "--set", "train.batch=64"], "unknown key 'train.batch'", "'batch_size'"),
    (["run", "{f}/digits.yaml", "--set", "model=resnet9"], "no model 'resnet9'", "known are"),
    (["run", "{f}/digits.yaml", "--set", "train.batch_size=5000"], "5000", "1438 training images"),
    (["run", "{f}/digits.yaml", "--set", "images.source=owner/name"], "'owner/name'", "prunus[datasets]"),
    (["run", "{f}/pickled", "--sparsity", "0.5"], "no run of a classifier", "run its recipe first"),
    (["grid", "{f}/classifiers.yaml"], "tune", "by: accuracy"),
    (["grid", "{f}/small.yaml", "--together", "2"], "together", "use workers"),
    (["grid", "{f}/small.yaml", "--minutes=-1"], "minutes=-1", "at least 0"),
    (["grid", "{f}/small.yaml", "--minutes=nan"], "minutes=nan", "at least 0"),
    (["grid", "{f}/empty.yaml"], "axes", "at least 1 item"),
    (["grid", "{f}/hollow.yaml"], "axes.a", "at least 1 item"),
    (["grid", "{f}/seeds.yaml"], "seeds: 3 stands twice", "give each once"),
    (["grid", "{f}/skipped.yaml"], "skip leaves no cell", "nothing would be run"),
    (["grid", "{f}/same.yaml"], "'a' and 'b' are one text", "report another"),
    (["grid", "{f}/value.yaml"], "key '1.0' stands twice", "line 1"),
    (["grid", "{f}/number.yaml"], "axes: a: 'inf' would be read as a number", "call it otherwise"),
    (["grid", "{f}/dropped.yaml"], "method: x: 'retrain' leaves out 'retrain.lr', which 'a' of lr", "come first"),
    (["grid", "{f}/dropped.yaml", "--set", "axes.method.x.retrain.lr=1"], "unknown key 'b'", "known keys"),
    (["grid", "{f}/text.yaml"], "axes: 'held-out' is a column", "give the axis another name"),
    (["grid", "{f}/column.yaml"], "axes: 'accuracy' is a column", "give the axis another name"),
    (["grid", "{f}/strange.yaml"], "tune.text: 'c' is not in evaluate.data", "which has a, b"),
    (["run", "--retrain-seed", "100000000000000000000"], "retrain.seed", "less than 9223372036854775808"),
    (["grid", "{f}/small.yaml", "--set", "seeds=[-9223372036854775809]"], "seeds.0", "greater than or equal to"),
    (["run", "--lr", ".inf"], "retrain.lr is inf", "give a finite number"),
    (
        ["run", "--set", "prune.criterion={sparsegpt: {damping: .nan}}"],
        "prune.criterion.sparsegpt.damping is nan",
        "give",
    ),
    (["run", "--device", "mps"], "'mps'", "a device is auto, cpu, cuda"),
    (["run", "--device", "xpu:1"], "'xpu:1'", "a device is auto, cpu, cuda"),
    (["run", "{f}/bomb.yaml"], "bomb.yaml is not YAML: its aliases stand for more", "write out what they are"),
    (["run", "{f}/itself.yaml"], "itself.yaml is not YAML: its aliases stand for more", "write out what they are"),
    (["run", "{f}/twice.yaml"], "key 'sparsity' stands twice", "line 1"),
    (["run", "{f}/latin.yaml"], "latin.yaml is not UTF-8", "save it as UTF-8"),
    (["run", "{f}/deep.yaml"], "deep.yaml is nested too deeply", "a few levels"),
    (["run", "{f}/set.yaml"], "set.yaml is not YAML", "line 1"),
    (["run", "--set", "model=!!binary aGVsbG8="], "is not YAML", "line 1"),
    (["run", "--set", "prune.sparsity=!!float abc"], "--set prune.sparsity=!!float abc is not YAML", "'abc'"),
    (["run", "--set", "save=!!bool maybe"], "--set save=!!bool maybe is not YAML", "maybe"),
    (["report", "{f}/foreign"], "foreign/result.json", "give the folder of one"),
    (["report", "{f}/foreign", "{f}/foreign"], "foreign/result.json", "give the folder of one"),
    (["report", "{f}/strange"], "strange/table.json", "give the folder of one"),
    (["inspect", "{tiny}", "--out", "{f}"], "is a folder", "give a file"),
    (["inspect", "{tiny}", "--out", "{f}/short.txt/numbers.json"], "nothing can be written in", "give another file"),
    (["inspect", "{tiny}", "--out", "{f}/short.txt"], "short.txt is there already", "give another file"),
    (["inspect", "{tiny}", "--out", "/dev/null"], "/dev/null is there already", "give another file"),
    (["inspect", "{tiny}", "--out", "{tiny}/config.json"], "config.json is there already", "give another file"),
    (["evaluate", "{tiny}", "--data", "{f}/short.txt", "--out", "{f}/short.txt"], "is there already", "another file"),
    (["evaluate", "{tiny}", "--out", "{f}/foreign/result.json"], "is there already", "give another file"),
    (["measure", "{tiny}", "--out", "{tiny}/model.safetensors"], "is there already", "give another file"),
    (["report", "{f}/foreign", "--out", "{f}/digits.yaml"], "digits.yaml is there already", "give another file"),
    (["report", "{f}/foreign", "{f}/foreign", "--out", "{f}/page.html"], "page.png", "give another file"),
    (["write", "{tiny}"], "Missing argument 'out'", "--help"),
    (["write", "./no-model", "out"], "no file or folder './no-model'", "give a path that exists"),
    (["write", "{f}", "out"], "has no config that opens", "config.json"),
    (["write", "{tiny}", "out", "--data", "{f}/missing.txt"], "missing.txt", "give an existing path"),
    (["write", "{tiny}", "out", "--set", "data.colum=body"], "unknown key 'data.colum'", "did you mean 'column'"),
    (["write", "{tiny}", "out", "--set", "data.column=body"], "data: give a source", "source"),
    (["write", "{tiny}", "out", "--set", "prune.sparsity=0.5"], "unknown key 'prune'", "known keys: batch_size, data"),
    (["write", "{tiny}", "out", "--set", "data"], "'data'", "key=value"),
    (["write", "{tiny}", "out", "--device", "cudda"], "'cudda'", "a device is auto, cpu, cuda"),
    (["write", "{tiny}", "out", "--dtype", "int8"], "dtype", "'float32', 'bfloat16' or 'float16'"),
    (["write", "{tiny}", "out", "--tokens", "many"], "tokens", "many"),
    (["write", "{tiny}", "out", "--length", "1"], "length", "greater than or equal to 2"),
    (["write", "{tiny}", "{f}/torn.yaml"], "torn.yaml' is a file", "give a folder"),
    (["write", "{tiny}", "{f}/torn.yaml/out"], "torn.yaml' is a file", "give a folder"),
    (["run", "--model", "{tiny}", "--out", "{f}/torn.yaml/out"], "torn.yaml' is a file", "give a folder"),
    (["run", "--model", "{tiny}", "--out", "{f}/link/out"], "link' is a link that leads nowhere", "give another"),
    (["demo", "--out", "{f}/link"], "link' is a link that leads nowhere", "make the folder it names"),
    (["write", "{tiny}", "out", "--temperature", "inf"], "temperature", "finite number"),
    (["run", "--set", "=3"], "--set '=3'", "is not key=value"),
    (["write", "{tiny}", "out", "--length", "65"], "length: 65 tokens", "at most 64; set length to 64"),
    (["write", "{tiny}", "out", "--length", "16"], "prompt 16 leaves nothing of length 16", "give fewer"),
    (["write", "{tiny}", "out", "--prompt", "0"], "prompt", "greater than or equal to 1"),
    (["write", "{tiny}", "out", "--batch-size", "0"], "batch_size", "greater than or equal to 1"),
    (["write", "{tiny}", "out", "--temperature", "0"], "temperature", "greater than 0"),
    (["write", "{tiny}", "out", "--seed", "1.5"], "seed", "integer"),
    ([*WRITE, "{f}/short.txt"], "4 prompts of 16 tokens begin at 4 places, and 7 tokens of text have 0", "more text"),
    ([*WRITE, "{f}/short.txt", "--prompt", "6"], "7 tokens of text have 2", "fewer tokens or a shorter prompt"),
]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of inputs with one mistake each."""
    folder = tmp_path_factory.mktemp("wrong")
    texts = {
        "unknown.yaml": "prune: {sparsty: 0.5}",
        "torn.yaml": "prune: {sparsity: 0.5",
        "list.yaml": "- prune",
        "short.txt": "A plum.",
        "grid.yaml": "base: {}\naxis: {}\naxes: {a: {b: {}}}\n",
        "pickled/pytorch_model.bin": "never opened",
        "quantised/plum.gguf": "never opened",
        "digits.yaml": "images: digits\nmodel: resnet8",
        "small.yaml": "base: {}\naxes: {a: {b: {}}}\n",
        "classifiers.yaml": "base: {images: digits}\naxes: {a: {b: {}}}\ntune: {text: x, axis: a, cells: {}}\n",
    }
    grid = "base: {evaluate: {data: {a: embedded, b: embedded}}}\naxes: {a: {b: {}}}\n"
    texts |= {
        "empty.yaml": "base: {}\naxes: {}\n",
        "hollow.yaml": "base: {}\naxes: {a: {}}\n",
        "seeds.yaml": "base: {}\naxes: {a: {b: {}}}\nseeds: [3, 4]\nmore_seeds: {seeds: [3], where: {a: [b]}}\n",
        "skipped.yaml": "base: {}\naxes: {a: {b: {}}}\nskip: [{a: [b]}]\n",
        "value.yaml": "axes: {a: {1: {}, 1.0: {}}}\nbase: {}\n",
        "number.yaml": "base: {}\naxes: {a: {inf: {}}}\n",
        "dropped.yaml": "base: {b: 1}\naxes: {lr: {a: {retrain.lr: 0.1}}, method: {x: {retrain: {steps: 5}}}}\n",
        "text.yaml": "base: {}\naxes: {held-out: {b: {}}}\n",
        "column.yaml": "base: {images: digits, model: resnet8}\naxes: {accuracy: {b: {}}}\n",
        "same.yaml": grid + "tune: {text: a, axis: a, cells: {}}\n",
        "strange.yaml": grid.replace("b: embedded", "b: {source: embedded, split: test}")
        + "tune: {text: c, axis: a, cells: {}}\n",
        "bomb.yaml": "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
        "itself.yaml": "a: &a [*a]\n",
        "twice.yaml": "prune: {sparsity: 0.5, sparsity: 0.6}\n",
        "deep.yaml": f"prune: {'[' * 2000}{']' * 2000}\n",
        "set.yaml": "prune: !!set {a, b}\n",
        "foreign/result.json": '{"accuracy": 0.5}',
        "strange/table.json": '{"rows": []}',
        "page.png": "someone's picture",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "link").symlink_to("nowhere")
    (folder / "latin.yaml").write_bytes("# prune: für".encode("latin-1"))
    return folder


@pytest.mark.parametrize(
    ("arguments", "value", "mend"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_a_mistake_is_one_line_and_status_2(
    call: Any,
    wrong: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    value: str,
    mend: str,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if the extra were not installed
    monkeypatch.chdir(tmp_path)
    line = refused(call, *(part.replace("{f}", str(wrong)).replace("{tiny}", str(tiny_folder)) for part in arguments))
    assert line.startswith("prunus: ")
    assert value in line
    assert mend in line
    assert list(tmp_path.iterdir()) == []  # refused before any work


def test_a_place_that_is_closed_is_one_line_with_its_mend(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "/closed")

    monkeypatch.setattr("prunus.run.demo.demo", closed)
    line = refused(call, "demo", "--device", "cpu")
    assert "Read-only file system: '/closed'; give a place where this user may read and write" in line


def test_a_model_writes_by_the_command_and_the_same_again(
    call: Any, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "short", "body": text_file.read_text()}))
    asked = [tiny_folder, tmp_path / "out", "--data", tmp_path / "rows.jsonl", "--set", "data.column=body"]
    asked += ["--tokens", 128, "--length", 32, "--batch-size", 3, "--device", "cpu"]
    status, out, err = call("write", *asked)
    assert status == 0, err
    assert [word in out for word in ("rows", "128", "tokens/s")] == [True] * 3
    left = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    status, out, err = call("write", *asked)
    assert (status, "128" in out, "tokens/s" in out) == (0, True, False)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == left


def test_what_the_hub_says_is_put_in_one_line(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect\nto the hub.\n")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    line = refused(call, "run", "--model", "owner/name")
    assert "model: 'owner/name' is neither" in line
    assert "(We couldn't connect to the hub.)" in line


def test_the_text_of_evaluate_takes_further_keys(call: Any, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "short", "body": text_file.read_text()}))
    how = ["--data", tmp_path / "rows.jsonl", "--set", "evaluate.data.column=body", "--window", 32]
    status, out, err = call("evaluate", tiny_folder, *how)
    assert status == 0, err
    assert "rows" in out


def test_bugs_show_themselves(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunus.language.fitted", None)
    with pytest.raises(TypeError, match="NoneType"):
        call("evaluate", "embedded")


def test_numbers_in_yaml_are_read_as_people_mean_them() -> None:
    text = "{pattern: 2:4, lr: 1e-3, steps: 10, share: .5, day: 2024-01-01, no: -3, far: 2.5E+1, all: .inf, name: 08}"
    assert yaml_value(text, "") == {
        "pattern": "2:4", "lr": 0.001, "steps": 10, "share": 0.5, "day": "2024-01-01", "no": -3, "far": 25.0,
        "all": float("inf"), "name": "08",
    }  # fmt: skip


def test_flags_win_over_set_and_set_over_the_recipe(
    call: Any, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = raw(tiny_folder, text_file, tmp_path / "out")
    del asked["retrain"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked))
    arguments = ["--sparsity", 0.25, "--set", "prune={criterion: magnitude, sparsity: 0.7}", "--train", "norms"]
    arguments += ["--steps", 2, "--set", f"retrain.data={text_file}", "--set", "retrain.length=32"]
    status, out, err = call("run", tmp_path / "recipe.yaml", *arguments)
    assert status == 0, err
    assert "norms: " in out
    used = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert (used.prune.criterion, used.prune.sparsity, used.calibrate.samples) == ("magnitude", 0.25, 8)
    assert used.retrain is not None
    assert (used.retrain.train, used.retrain.steps) == (("norms",), 2)
    info = json.loads((tmp_path / "out" / "model" / "prunus.json").read_text())
    assert info["pattern"] == "unstructured"
    assert info["metrics"] == {"perplexity": json.loads((tmp_path / "out" / "result.json").read_text())["perplexity"]}
    assert info["versions"]["prunus"] == __version__

    base = {key: value for key, value in asked.items() if key != "out"}
    grid = {"base": base, "axes": {"share": {"two fifths": {"prune.sparsity": 0.4}}}, "out": str(tmp_path / "grid")}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    changes = ["--set", "axes.share.two fifths.prune.criterion=magnitude", "--set", "base.calibrate.samples=4"]
    status, out, err = call("grid", tmp_path / "grid.yaml", *changes)
    assert status == 0, err
    (member,) = (tmp_path / "grid" / "members").glob("*.json")
    used = json.loads(member.read_text())["recipe"]
    assert (used["prune"]["criterion"], used["calibrate"]["samples"]) == ("magnitude", 4)
    assert used["prune"]["sparsity"] == 0.4  # what the label says beside it
    status, out, err = call("grid", tmp_path / "grid.yaml", "--set", "base.prune.sparsety=0.5")
    assert (status, "did you mean 'sparsity'?" in err) == (2, True)

    rows = tmp_path / "rows.json"
    assert call("inspect", tmp_path / "out" / "model", "--out", rows)[0] == 0
    found = {row["name"]: row["sparsity"] for row in json.loads(rows.read_text())}
    assert found["model.layers.0.mlp.up_proj.weight"] == 0.25
    assert found["model.embed_tokens.weight"] == 0.0
    assert call("evaluate", tmp_path / "out" / "model", "--data", text_file, "--window", 32, "--out", rows)[0] == 0
    assert list(json.loads(rows.read_text())["perplexity"].values()) == [
        pytest.approx(info["metrics"]["perplexity"]["merged"]["text"], rel=1e-6)
    ]


def test_a_hash_is_of_what_a_recipe_says_beside_its_defaults() -> None:
    """So that a new key changes none, and results of before it are found."""

    def keys(*raws: dict[str, Any]) -> set[str]:
        return {digest(parse(raw, Recipe, "")) for raw in raws}

    assert said(LanguageRecipe()) == {}
    digits: dict[str, Any] = {"images": "digits", "model": "resnet8"}
    whole = parse(digits, Recipe, "").model_dump(mode="json")
    assert len(keys(digits, whole, digits | {"corruptions": None})) == 1
    asked = digits | {"corruptions": {"folder": "c", "severities": [1, 2, 3, 4, 5]}}
    assert len(keys(digits, digits | {"corruptions": {"folder": "c"}}, asked)) == 2
    assert dense_key(parse(asked, ClassifierRecipe, "")) == dense_key(parse(digits, ClassifierRecipe, ""))
    retrained = [{"retrain": {}}, {"retrain": {"lr": None}, "compile": False}, {"retrain": {}, "soup": None}]
    assert len(keys(*retrained)) == 1
    assert len(keys({}, {"retrain": {}}, {"retrain": {"lr": 2e-4}}, {"retrain": {}, "soup": {}})) == 4


def test_show_prints_a_recipe_that_reads_back(call: Any, tmp_path: Path) -> None:
    status, out, _ = call("show", "--set", "prune.pattern=2:4", "--set", "retrain.lr=1e-3")
    assert status == 0
    (tmp_path / "recipe.yaml").write_text(out)
    shown = load_recipe(tmp_path / "recipe.yaml")
    assert (shown.prune.pattern, shown.prune.sparsity) == ("2:4", 0.5)
    assert shown.retrain is not None
    assert shown.retrain.lr == 1e-3


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"images": "digits", "prune": {}, "retrain": {"epochs": 1, "checkpointing": True}},
            "'retrain.checkpointing'; that is a key of language",
        ),
        ({"images": "digits", "dtype": "float32"}, "'dtype'; that is a key of language models"),
        ({"prune": {"kind": "filters"}}, "'prune.kind'; that is a key of classifiers"),
        ({"retrain": {"rewind": 3}}, "'retrain.rewind'; that is a key of classifiers"),
        ({"prune": {"phases": 9, "allocation": "owl"}, "retrain": {}}, "owl(lam=0.08) spreads sparsities over 0.07412"),
        ({"prune": {"phases": 3}, "retrain": {"steps": 2, "of": "total"}}, "2 steps cannot be split over 3 phases"),
        ({"images": "digits", "prune": {"kind": "filters", "criterion": "wanda"}}, "wanda needs what layers receive"),
        ({"images": "digits", "prune": {"kind": "filters", "criterion": "sparsegpt"}}, "sparsegpt has none: take"),
        ({"images": "digits", "prune": {"scope": "model", "allocation": "erk"}}, "scope 'model' is an allocation"),
        ({"images": "digits", "precision": "fp16"}, "leave out fp16"),
        (
            {"images": "digits", "prune": {"kind": "filters"}, "retrain": {"epochs": 1}, "soup": {}},
            "leave out prune.kind",
        ),
    ],
)
def test_what_a_task_cannot_do_is_refused_by_name(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(raw, Recipe, "recipe.yaml")
    assert message in str(caught.value)


def test_shared_sections_have_the_defaults_of_their_task() -> None:
    language, digits = (parse({"prune": {}} | more, Recipe, "") for more in ({}, {"images": "digits"}))
    sections = [given(each.prune) for each in (language, digits)]
    found = [(each.criterion, each.sparsity, each.allocation) for each in sections]
    assert found == [("admm", 0.5, "uniform"), ("magnitude", 0.9, "global")]
    rows = given(parse({"images": "digits", "prune": {"scope": "row"}}, ClassifierRecipe, "").prune)
    assert (rows.allocation, rows.where()) == ("uniform", Unstructured("row"))


def test_without_arguments_the_embedded_model_is_compressed(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    plain = fitted(LanguageRecipe(), torch.device("cpu"))
    assert (plain.model, plain.calibrate.length, plain.dtype) == ("embedded", 512, "float32")
    assert fitted(LanguageRecipe(), torch.device("cuda")).dtype == "auto"
    monkeypatch.chdir(tmp_path)
    few = ["--set", "calibrate.samples=2", "--set", f"evaluate.data={text_file}"]  # for the sake of time
    status, out, err = call("run", *few)
    assert status == 0, err
    assert "embedded" in out
    assert (tmp_path / "runs" / "run" / "model" / "model.safetensors").exists()


def test_a_classifier_is_trained_pruned_and_compared(call: Any, tmp_path: Path) -> None:
    base: dict[str, Any] = {"images": "digits", "model": "resnet8", "device": "cpu"}
    base["train"] = {"epochs": 1, "batch_size": 256, "warmup": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(base))
    out = ["--out", tmp_path / "run"]
    status, shown, err = call("run", tmp_path / "recipe.yaml", *out)
    assert status == 0, err
    assert "dense" in shown
    status, shown, err = call("run", tmp_path / "run", "--sparsity", 0.5, "--epochs", 1, "--schedule", "slr")
    assert status == 0, err
    assert all(word in shown for word in ("dense", "recalibrated", "retrained", "50.0", "pruned/report.png"))
    numbers = tmp_path / "numbers.json"
    status, shown, err = call("evaluate", tmp_path / "run" / "pruned", "--out", numbers)
    assert status == 0, err
    result = json.loads((tmp_path / "run" / "pruned" / "result.json").read_text())
    found = json.loads(numbers.read_text())["accuracy"]
    assert (found["top1"], found["loss"]) == (result["accuracy"], result["loss"])
    assert f"{100 * result['accuracy']:.2f} %" in shown
    labels = {"dense": {}, "pruned": {"prune.sparsity": 0.5}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"base": base, "axes": {"method": labels}}))
    status, shown, err = call("grid", tmp_path / "grid.yaml", "--out", tmp_path / "grid")
    assert status == 0, err
    assert all(word in shown for word in ("accuracy", "dense", "pruned", "table.md"))
    status, shown, _ = call("show", tmp_path / "recipe.yaml", "--set", "prune.sparsity=0.9")
    assert yaml_value(shown, "")["prune"]["allocation"] == "global"


def test_only_run_takes_several_processes(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    merge = ["merge", "x", "y", "z"]
    for command in (["demo"], ["grid", "x"], ["average", "x", "--out", "y"], merge, ["evaluate", "x"]):
        assert f"{command[0]} runs in one process, not in 2" in refused(call, *command)
    assert "a classifier is trained in one process" in refused(call, "run", "--set", "images=digits")


@pytest.mark.parametrize("command", ["run", "show"])
def test_ctrl_c_is_one_line_and_status_130(call: Any, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prunus.run.task.load", stop)
    monkeypatch.setattr("prunus.run.task.run_recipe", stop)
    status, out, err = call(command)
    assert (status, out) == (130, "")
    kept = "stopped; what is finished is kept in its folder, checkpoints too, and the same command goes on from there"
    assert err == f"prunus: {kept if command == 'run' else 'stopped; nothing was written'}\n"


def test_a_full_gpu_is_one_line_and_other_errors_are_not_hidden(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("prunus.run.task.load", fail)
    error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB left")
    status, out, err = call("run")
    assert (status, out) == (2, "")
    assert err.startswith("prunus: CUDA out of memory. Tried to allocate 2.00 GiB: make batch_size smaller")
    assert err.count("\n") == 1
    error = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        call("run")


def limited(bytes_: int, out: str, *arguments: str) -> None:
    """The command where no file may be larger, as on a full disk; what it says on stderr goes to a file."""
    import resource

    sys.argv = ["prunus", *arguments]
    with open(out, "w") as file:
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))
    cli.main()


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
@pytest.mark.parametrize("limit", [600, 30_000, 45_000, 60_000, 90_000])
def test_a_full_disk_is_one_line(tiny_folder: Path, text_file: Path, tmp_path: Path, limit: int) -> None:
    """The recipe, a result, a block, a checkpoint, the model."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw(tiny_folder, text_file, tmp_path / "run")))
    process = start(limited, limit, str(tmp_path / "err"), "run", str(tmp_path / "recipe.yaml"))
    process.join()
    noise = ("it/s", "the text that is trained on")
    lines = [line for line in (tmp_path / "err").read_text().splitlines() if line.strip()]
    lines = [line for line in lines if not any(each in line for each in noise)]
    assert process.exitcode == 2, lines
    assert len(lines) == 1
    assert lines[0].startswith("prunus: ")
    assert "ile too large" in lines[0] or "is the disk full?" in lines[0]
