"""What stands in the `__all__` of a family can be named in recipes, with the options of its signature."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from prunus import score, solve
from prunus.layers import Layer
from prunus.patterns import NM, Block, Unstructured
from prunus.recipe import ClassifierRecipe, LanguageRecipe, Recipe, given, names, parse
from prunus.recipe.names import (
    FAMILIES,
    Family,
    allocations,
    averages,
    criteria,
    methods,
    optimizers,
    pattern_of,
    retrainings,
    schedules,
)

MEMBERS = [(family, name) for family in FAMILIES for name in family.members()]


@pytest.mark.parametrize(("family", "name"), MEMBERS, ids=lambda value: value if isinstance(value, str) else value.word)
def test_every_member_says_what_it_is_and_what_its_options_are(family: Family, name: str) -> None:
    member = family.members()[name]
    assert (member.__doc__ or "").strip()
    hints = names._hints(member)
    for option in family.options(name).values():
        assert option.name in hints, f"{name}: {option.name} has no type"
    bad = {"no_such_option": 1}
    with pytest.raises(ValueError, match=f"{name} has no option 'no_such_option'; .*it takes"):
        family.check({name: bad})


def test_families_hold_what_their_modules_say() -> None:
    assert {"magnitude", "random", "wanda", "ria", "sparsegpt", "frank_wolfe"} <= set(criteria.members())
    assert {"uniform", "uniform_plus", "global", "lamp", "erk", "owl"} <= set(allocations.members())
    assert {"ft", "lrw", "slr", "clr", "llr", "allr"} <= set(retrainings.members())
    assert len(criteria.members()) == len(score.criteria.__all__) + len(vars(solve)["__all__"])
    assert not set(schedules.members()) & {*retrainings.members(), "original", "scheduler"}
    assert set(averages.members()) == {"uniform", "greedy", "learned", "ties", "dare", "dare_ties", "slerp"}
    assert set(optimizers.members()) == {"adamw", "prox", "sfw", "sgd"}
    assert {"gmp", "str", "rigl", "set"} <= set(methods.members())
    assert not {"cubic", "part", "plan"} & set(methods.members())


def test_options_of_owl_are_keys_of_recipes() -> None:
    scores = {"h.0.fc": torch.ones(10, 10), "h.1.fc": torch.cat([torch.full((1, 10), 7.0), torch.ones(9, 10)])}
    choice = {"owl": {"c": 4, "lam": 0.2}}  # of the second 10 % are above 4 * 1.6
    assert allocations.make(choice)(scores, 0.5) == score.owl(c=4, lam=0.2)(scores, 0.5) == {"h.0.fc": 30, "h.1.fc": 70}
    assert allocations.make("owl")(scores, 0.5) == {"h.0.fc": 50, "h.1.fc": 50}  # none is above 5 * 1.6
    for more in ({}, {"images": "digits"}):
        raw = more | {"prune": {"allocation": choice, "sparsity": 0.5}}
        assert given(parse(raw, Recipe, "here").prune).allocation == choice


def test_choices_are_kept_in_their_shortest_form_and_made_with_their_types() -> None:
    assert criteria.check("Wanda") == criteria.check({"wanda": None}) == criteria.check({"wanda": {}}) == "wanda"
    assert criteria.check({"sparsegpt": {"damping": 0.1}}) == {"sparsegpt": {"damping": 0.1}}
    assert methods.make({"gmp": {"allocation": {"uniform_plus": {"most": 0.7}}}}, 0.9).allocation.name == "uniform_plus"
    nested = {"refit": {"of": {"admm": {"iterations": 30}}}}
    assert parse({"prune": {"criterion": nested}}, Recipe, "r").prune.criterion == nested
    assert criteria.make(nested).name == "admm with refit"
    assert criteria.lean({"refit": {"of": "wanda"}}) == "refit"
    lean = {"frank_wolfe": {"iterations": 30, "swaps": 0, "concave": [0.5, 1.0]}}
    assert parse({"prune": {"criterion": lean}}, LanguageRecipe, "r").prune.criterion == {"frank_wolfe": {"swaps": 0}}
    assert parse({"prune": {"criterion": {"random": {"seed": 0}}}}, LanguageRecipe, "r").prune.criterion != "random"
    layer = Layer("fc", torch.ones(2, 3))
    drawn = [criteria.make(choice, seed=seed)(layer) for choice, seed in (("random", 3), ({"random": {"seed": 3}}, 4))]
    assert torch.equal(drawn[0], drawn[1])  # what the recipe says comes before what the run offers
    assert pattern_of("unstructured", "layer") == Unstructured("layer")
    assert (pattern_of("2:4"), pattern_of({"block": {"rows": 2, "columns": 3}})) == (NM(2, 4), Block(2, 3))


def test_the_first_option_of_a_schedule_needs_no_name() -> None:
    for value in ({"multistep": [3, 5]}, {"multistep": {"milestones": [3, 5]}}):
        assert schedules.check(value) == {"multistep": [3, 5]}
        assert schedules.make(value, 10, warmup=0, epoch=2)(9) == pytest.approx(0.1)
    asked = {"multistep": {"milestones": [3], "gamma": 0.2}}
    assert schedules.check(asked) == asked
    assert schedules.check("cosine") == schedules.check({"cosine": {}}) == "cosine"
    with pytest.raises(ValueError, match="multistep needs the option 'milestones'"):
        schedules.check("multistep")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("wandda", "there is no criterion 'wandda'; did you mean 'wanda'\\? there are .*magnitude, random"),
        (["wanda"], "give one criterion: a name, or"),
        ({"wanda": 1, "ria": 2}, "give one criterion"),
        ({"sparsegpt": 0.1}, "options of sparsegpt are"),
        ({"refit": {"of": "wandda"}}, "there is no criterion 'wandda'; did you mean 'wanda'"),
        ({"sparsegpt": {"dampin": 0.1}}, "no option 'dampin'; did you mean 'damping'\\? it takes damping, blocksize"),
        ({"sparsegpt": {"blocksize": 1.5}}, "sparsegpt.blocksize: Input should be a valid integer.*got 1.5"),
        ({"alps": {"rho": [1.0]}}, r"alps.rho: give 2 values \(got \[1.0\]\)"),
    ],
)
def test_wrong_choices_are_refused_with_those_there_are(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        criteria.check(value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"retrain": {"steps": 1, "schedule": {"llr": {"warmup": 1.5}}}},
            r"retrain\.schedule: .*in \[0, 1\); got 1\.5",
        ),
        ({"retrain": {"steps": 1, "schedule": {"cosine": {"end": 2}}}}, r"retrain\.schedule: .*in \[0, 1\]; got 2\.0"),
        ({"train": {"schedule": {"linear": {"end": -1}}}}, r"train\.schedule: .*in \[0, 1\]; got -1\.0"),
        ({"prune": {"allocation": {"uniform_plus": {"most": 3}}}}, r"prune\.allocation: .*in \[0, 1\]; got 3\.0"),
        ({"soup": {"average": {"learned": {"steps": 0}}}}, "soup: .*at least 1 step; got 0"),
        ({"soup": {"also": [{"learned": {"lr": 0}}]}}, r"soup: .*lr above 0; got 0\.0"),
        ({"during": {"gmp": {"every": 2}}}, r"no pruning fits .* every=2\.0"),
        ({"during": {"dpf": {"stop": 2}}}, r"start < stop <= 1.* stop=2\.0"),
        ({"during": {"str": {"weight_decay": -1}}}, r"STR needs .* weight_decay=-1\.0"),
        ({"during": {"elsa": {"pattern": "2:4"}}}, r"during\.elsa\.pattern: .*set prune\.pattern"),
        ({"during": "gmp", "prune": {"pattern": "2:4"}}, r"prune\.pattern: gmp prunes single entries"),
        ({"during": "gmp", "prune": {"scope": "layer"}}, r"prune\.scope: a method that prunes"),
        *(
            ({"during": {name: {"lr": -1}}}, rf"{name.upper()} needs lr above 0.*lr=-1\.0")
            for name in ("str", "cs", "dst")
        ),
    ],
    ids=str,
)
def test_options_are_refused_before_any_work(asked: dict[str, Any], message: str) -> None:
    raw = {"images": {"source": "digits", "measure_on": "both"}, "prune": {"sparsity": 0.9}, "retrain": {"steps": 1}}
    with pytest.raises(ValueError, match=message):
        parse(raw | asked, Recipe, "here")


def test_an_average_may_look_at_tensors_that_are_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    def fisher(states: Any, held: Any, eps: float = 1e-3) -> Any:
        """Fails where there is no tensor."""
        return next(iter(states[0].values())), held.score({"weight": eps})

    module = importlib.import_module("prunus.soup.averages")
    monkeypatch.setattr(module, "fisher", fisher, raising=False)
    monkeypatch.setattr(module, "__all__", [*module.__all__, "fisher"])
    raw = {"images": {"source": "digits", "measure_on": "both"}, "prune": {}, "retrain": {"steps": 1}}
    assert given(parse(raw | {"soup": {"average": "fisher"}}, Recipe, "here").soup).average == "fisher"


@pytest.mark.parametrize("more", [{}, {"images": "digits"}])
def test_averages_of_one_name_are_told_apart_by_their_options(more: dict[str, Any]) -> None:
    raw = more | {"prune": {"sparsity": 0.5}, "retrain": {"steps": 1}}
    also = ["ties", {"ties": {"density": 0.5}}, {"dare": {"seed": 1}}]
    found = given(parse(raw | {"soup": {"also": also}}, Recipe, "here").soup).further
    assert found == {"ties": "ties", "ties (density=0.5)": also[1], "dare": also[2]}


def relative(layer: Layer) -> torch.Tensor:
    """Wanda's score as a share of its row."""
    found = score.wanda(layer)
    return found / found.sum(1, keepdim=True)


def thick(first: float = 0.5) -> Any:
    """A criterion with an option: magnitude in the first column times `first`."""

    def thick(layer: Layer) -> torch.Tensor:
        score = layer.weight.abs().float()
        return torch.cat([score[:, :1] * first, score[:, 1:]], 1)

    return thick


def test_a_new_criterion_needs_one_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A function and its name in `__all__`: recipes of both tasks, the command and messages know it."""
    from prunus.language import stages
    from prunus.run.cli import app

    for each in (relative, thick):
        monkeypatch.setattr(score.criteria, each.__name__, each, raising=False)
        monkeypatch.setattr(score.criteria, "__all__", [*score.criteria.__all__, each.__name__])

    def masks_of(criterion: Any) -> Any:
        calibrate = {"samples": 4, "length": 32}
        asked = parse(
            {"prune": {"criterion": criterion, "include": ["layers.0.*"]}, "calibrate": calibrate}, LanguageRecipe, "r"
        )
        return stages.prune(stages.load(asked), asked, torch.device("cpu")).masks

    assert masks_of("relative") == masks_of("wanda")  # compared within rows, as it reads the inputs
    assert masks_of({"thick": {"first": 1.0}}) == masks_of("magnitude") != masks_of("thick")
    classifier = {"images": "digits", "prune": {"criterion": "relative", "allocation": "uniform"}}
    asked = parse(classifier, ClassifierRecipe, "r").prune
    assert asked is not None
    assert asked.how().needs == "norms"
    with pytest.raises(ValueError, match="did you mean 'relative'"):
        parse({"prune": {"criterion": "relativ"}}, Recipe, "r")
    assert "Wanda's score as a share of its row." in {row["what"] for row in names.rows()}
    shown = CliRunner().invoke(app, ["show", "--names"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "relative" in shown.output
    assert "first=0.5" in shown.output


def test_no_other_file_lists_what_can_be_named() -> None:
    """Adding a criterion touches one file: no other one of recipes and runs spells two of them on a line."""
    spelled = [f'"{name}"' for name in criteria.members()]
    package = Path(inspect.getfile(names)).parents[1]
    rooms = ("recipe", "jobs", "language", "vision", "run")
    for path in (each for room in rooms for each in (package / room).rglob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            found = [name for name in spelled if name in line]
            assert len(found) < 2 or "kind filters" in line or "self.criterion not in" in line, f"{path.name}: {line}"
