"""What is refused before work, and what a dry run tells: an empty model and the recipe say both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from prunus.adapt import adapt
from prunus.jobs import outline
from prunus.language import stages
from prunus.language.single import compress, planned
from prunus.layers import find_layers
from prunus.recipe import Recipe, merge, parse
from prunus.run import cli
from prunus.vision import train as classifiers
from tests.conftest import tiny_llama

LATE: list[tuple[dict[str, Any], str]] = [  # what an empty model, the tokenizer and the texts can tell
    ({"prune.include": ["q_prj"]}, "'q_prj' matches none of the 15"),
    ({"prune.exclude": ["*"]}, "leave no layer"),
    ({"prune.pattern": "2:7"}, "2:7 needs columns divisible by 7; 'model.layers.0.self_attn.q_proj' has 32"),
    ({"calibrate.samples": 100000}, "calibrate.data: 100000 calibration windows"),
    ({"retrain.train": ["biases"]}, "retrain.train: Subset 'biases' is empty in LlamaForCausalLM"),
    ({"retrain.rank": 33}, r"retrain.rank: 33 is above min\(out, in\) of every layer; set it to 32 or less"),
    (
        {"prune.include": ["*"], "retrain.train": ["head", "mask_lora"]},
        "retrain.train: 'lm_head' would be trained by 'head' and by its adapter",
    ),
    ({"reconstruct.rank": 64, "reconstruct.train": ["mask_lora"]}, "reconstruct.rank: 64"),
    ({"reconstruct.train": ["head"]}, "reconstruct.train: Subset 'head' is empty in LlamaDecoderLayer"),
    ({"reconstruct.train": ["norms"], "reconstruct.window": "half"}, "'norms' is empty in LlamaAttention"),
    ({"shrink.blocks": 2}, "shrink.blocks: 2 of 2 blocks cannot go; give at most 1"),
    ({"shrink.heads": 0.1}, "shrink.heads: of 2 groups .* a share of 0.1 removes none"),
    ({"shrink.experts": 0.5}, "shrink.experts: LlamaForCausalLM has no stacked experts"),
    ({"shrink.neurons": 0.3, "prune.pattern": "2:4"}, "2:4 needs columns divisible by 4; .*down_proj' has 34"),
    ({"shrink.width": 0.5, "retrain.rank": 17}, r"retrain.rank: 17 is above min\(out, in\) of every layer"),
    ({"shrink.width": 0.3}, "shrink.width: 22 of 32 would be left, .* a share of 0.25 leaves 24"),
    ({"evaluate.speed": True}, "evaluate.speed: prompt 512 and 32 tokens are more than the model's 64"),
    ({"capture": True, "device": "cpu"}, "capture: capture=True records a CUDA graph, and the model is on cpu"),
    ({"precision": "fp16", "device": "cpu"}, "precision: fp16 needs a GPU; use fp32 or bf16 on a CPU"),
    ({"evaluate.tasks": {"t": "task.jsonl"}}, "task.jsonl, line 1: needs query"),
    ({"out": "model/run"}, "lie in each other"),
]


@pytest.fixture
def raw(tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe of a tiny model, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_folder)
    (tmp_path / "task.jsonl").write_text('{"text": "x"}\n')
    return {
        "model": "./model",
        "calibrate": {"data": str(text_file), "samples": 4, "length": 16},
        "retrain": {"data": str(text_file), "steps": 3, "batch_size": 2, "length": 16, "rank": 2},
        "evaluate": {"data": {"text": str(text_file)}, "window": 32, "batch_size": 128},
        "out": "run",
    }


@pytest.mark.parametrize(("changes", "words"), LATE, ids=[words for _, words in LATE])
def test_no_weight_is_read_before_a_refusal(
    raw: dict[str, Any], changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "load", lambda *_: pytest.fail("weights are read"))
    recipe = parse(merge(raw, changes), Recipe, "recipe")
    for does in (compress, planned):
        with pytest.raises(ValueError, match=words):
            does(recipe)
    assert not Path("run").exists()


def test_a_missing_package_is_named_before_work(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("task.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n')
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'prunus\[zeroshot\]'"):
        planned(parse(merge(raw, {"evaluate.tasks": {"t": "task.jsonl"}}), Recipe, "recipe"))


def test_the_plan_of_a_language_model_counts_what_the_run_trains(raw: dict[str, Any]) -> None:
    found = planned(parse(merge(raw, {"retrain.train": ["norms", "mask_lora"]}), Recipe, "recipe"))
    model = tiny_llama()
    trained = adapt(model, ["norms", "mask_lora"], masks=None, views=find_layers(model), rank=2)
    assert found.rows["trained"].startswith(f"norms, mask_lora: {trained.trainable:,} parameters, {trained.share:.3%}")
    assert found.rows["retraining"] == "3 steps, 96 tokens"
    assert found.rows["calibration"] == "4 windows of 16: 64 tokens"
    assert {row["layers"]: row["count"] for row in found.layers}["model.layers.*.mlp.up_proj"] == 2
    assert sum(row["count"] for row in found.layers) == 14
    assert found.files["model/"] == sum(each.nbytes for each in tiny_llama().parameters())


@pytest.mark.parametrize(
    ("criterion", "held"),
    [
        ("magnitude", 0),
        ("wanda", 32 + 48),  # a norm an input; inputs are 32 wide, and 48 those of down_proj
        ("admm", 32**2 + 48**2 + 5 * 48**2 + 8 * 32 * 48),  # Gram matrices, and what a solver holds besides
    ],
)
def test_the_plan_of_pruning_counts_what_a_criterion_holds(raw: dict[str, Any], criterion: str, held: int) -> None:
    found = planned(parse(merge(raw, {"prune.criterion": criterion}), Recipe, "recipe"))
    block = sum(each.nbytes for each in tiny_llama().model.layers[0].parameters())
    assert found.rows["memory, cpu, pruning"].startswith(f"{(block + 4 * held) / 1e6:.3g} MB for a block")


def test_the_plan_of_a_smaller_model_says_what_goes(raw: dict[str, Any]) -> None:
    assert "shrunk" not in planned(parse(raw, Recipe, "recipe")).rows
    shrink = {"shrink.blocks": 1, "shrink.neurons": 0.25, "shrink.vocabulary": raw["calibrate"]["data"]}
    found = planned(parse(merge(raw, shrink), Recipe, "recipe")).rows["shrunk"]
    assert found == "blocks 1, neurons 0.25, vocabulary go first; all counts here are of the model as it is"


def test_the_plan_of_a_method_names_no_criterion(raw: dict[str, Any]) -> None:
    text = raw["retrain"].pop("data")
    changes = {"prune.sparsity": 0.5, "during": "gmp", "train": {"data": text, "steps": 20, "length": 16}}
    found = planned(parse(merge(raw | {"retrain": None}, changes), Recipe, "recipe"))
    assert found.rows["pruned"].endswith("to 50.00% zeros, unstructured, by gmp")
    assert {row["zeros"] for row in found.layers} == {"by gmp"}
    images = {"images": "digits", "model": "resnet8", "train": {"epochs": 2, "warmup": 0}, "out": "run"}
    for asked, way, zeros in (
        ({"during": "gmp", "prune": {"sparsity": 0.5}}, "unstructured, by gmp", "by gmp"),
        ({"during": "maskllm", "prune": {"pattern": "2:4", "exclude": ["stem"]}}, "2:4, by maskllm", "50.0%"),
    ):
        plan = classifiers.planned(parse(images | asked, Recipe, "recipe"))
        assert plan.rows["pruned"].endswith(f"to 50.00% zeros, {way}")
        assert {row["zeros"] for row in plan.layers} == {zeros}


@pytest.mark.parametrize(
    ("during", "why"),
    [
        ({"rigl": {"delta": 100}}, "RigL with delta=100 changes nothing before"),
        ({"set": {"delta": 200}}, "SET changes"),
    ],
)
def test_a_method_that_so_few_steps_leave_nothing_is_refused_before_work(
    raw: dict[str, Any], during: dict[str, Any], why: str
) -> None:
    text = raw["retrain"].pop("data")
    changes = {"prune.sparsity": 0.5, "during": during, "train": {"data": text, "steps": 100, "length": 16}}
    with pytest.raises(ValueError, match=why):
        parse(merge(raw | {"retrain": None}, changes), Recipe, "recipe")
    parse(merge(raw | {"retrain": None}, changes | {"train.steps": 201}), Recipe, "recipe")
    images = {"images": "digits", "model": "resnet8", "prune": {"sparsity": 0.5}, "out": "run", "during": during}
    train = {"warmup": 0, "batch_size": 128}  # 10 steps an epoch
    with pytest.raises(ValueError, match=why):
        classifiers.planned(parse(images | {"train": train | {"epochs": 10}}, Recipe, "recipe"))
    classifiers.planned(parse(images | {"train": train | {"epochs": 30}}, Recipe, "recipe"))


@pytest.mark.parametrize(("options", "decay"), [({}, 1e-4), ({"mu": 1e-3}, 0)])
def test_lc_without_a_penalty_is_refused_before_work(
    raw: dict[str, Any], options: dict[str, Any], decay: float
) -> None:
    text = raw["retrain"].pop("data")
    train = {"data": text, "steps": 20, "length": 16}
    changes = raw | {"prune": {"sparsity": 0.5}, "retrain": None}
    images = {"images": "digits", "model": "resnet8", "prune": {"sparsity": 0.5}, "out": "run"}
    for base, given in ((changes, train), (images, {"warmup": 0})):
        with pytest.raises(ValueError, match=r"during\.lc: .*train\.weight_decay is 0: give it, or during\.lc\.mu"):
            parse(merge(base, {"during": "lc", "train": given | {"weight_decay": 0}}), Recipe, "recipe")
        parse(merge(base, {"during": {"lc": options}, "train": given | {"weight_decay": decay}}), Recipe, "recipe")


def test_a_dry_run_makes_the_empty_model_once(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    empty = stages.empty_model
    monkeypatch.setattr(stages, "empty_model", lambda *args, **more: made.append(args) or empty(*args, **more))
    planned(parse(merge(raw, {"retrain.add_biases": True, "retrain.train": ["biases"]}), Recipe, "recipe"))
    assert len(made) == 1


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    monkeypatch.setenv("COLUMNS", "120")
    Path("language.yaml").write_text(yaml.safe_dump(raw))
    Path("images.yaml").write_text(
        "{images: digits, model: resnet8, train: {batch_size: 64, epochs: 2, warmup: 0}, prune: {phases: 2}, "
        "retrain: {epochs: 1}, soup: {members: 3}, out: run}"
    )
    for name, words in (("language.yaml", "14 layers"), ("images.yaml", "over 2 phases, each of 3 members")):
        monkeypatch.setattr(sys, "argv", ["prunus", "run", name, "--dry-run"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert words in out
        assert "run/model" in out
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune": {"include": ["conw"]}}, "'conw' matches none of the 8"),
        ({"prune": {"pattern": "2:4"}}, "2:4 needs columns divisible by 4; 'stem' has 9"),
        ({"prune": {"criterion": "wanda", "exclude": ["*"]}}, "leave no layer"),
        ({"prune": {"allocation": {"uniform_plus": {"first": "conw"}}}}, "uniform_plus spares 'conw', which is none"),
        ({"prune": {"phases": 3}, "retrain": {"of": "total", "steps": 2}}, "2 steps cannot be split over 3 phases"),
        (
            {
                "prune": {"phases": 3},
                "retrain": {"of": "total", "steps": 3},
                "soup": {"vary": {"steps": [3, 2, 3]}},
            },
            "2 steps cannot be split over 3 phases",
        ),
        ({"retrain": {"steps": 2, "train": ["mask_lora"], "rank": 65}}, "retrain.rank: 65 is above .* to 64 or less"),
        ({"retrain": {"steps": 2, "train": ["head"]}}, "'head' is empty in Sequential"),
        ({"train": {"augment": {"cutout": 9}}}, "train.augment.cutout: 9 pixels leave nothing .* 8 x 8; set it to 8"),
        (
            {"retrain": {"steps": 2}, "soup": {"vary": {"augment": [{}, {"crop": 9}, {"crop": 1}]}}},
            "train.augment.crop: 9 pixels leave nothing",
        ),
    ],
)
def test_a_classifier_is_refused_before_it_is_trained(
    changes: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = {"images": "digits", "model": "resnet8", "train": {"batch_size": 64}, "prune": {}} | changes
    recipe = parse(raw | {"out": str(tmp_path / "run")}, Recipe, "recipe")
    monkeypatch.setattr(classifiers, "finish", lambda *_, **__: pytest.fail("it is trained"))
    with pytest.raises(ValueError, match=words):
        classifiers.train_run(recipe)


def test_what_removes_filters_is_asked_for_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    asked = parse({"images": "digits", "prune": {"kind": "filters"}}, Recipe, "recipe").prune
    with pytest.raises(ImportError, match=r"prunus\[shrink\]"):
        outline.check_pruning(nn.Linear(2, 2), asked)
