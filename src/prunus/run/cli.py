"""The command `prunus`: each verb reads its arguments, calls one function, prints a table.

Wrong input ends with one line on stderr and exit status 2, before any work; so does a full disk, and Ctrl-C with 130;
everything else is a bug and shows itself.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from prunus import __version__
from prunus.machine import bound_threads
from prunus.recipe import Unfinished, is_full, yaml_value
from prunus.run.flags import Flag, assignments, flags_of, numbers, overrides, with_flags

app = typer.Typer(
    name="prunus",
    help="Make neural networks sparse and keep them good: prune, retrain a small part, merge, ship.\n\n"
    "$ prunus demo\n$ prunus run recipe.yaml\n$ prunus report runs/run",
    pretty_exceptions_enable=False,
)

RecipeArg = Annotated[Path | None, typer.Argument(help="YAML recipe; without one the embedded model is used.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Any recipe key: --set prune.sparsity=0.6 (repeatable; flags win).")
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda or one GPU such as cuda:1.")]
Workers = Annotated[int, typer.Option(help="Processes that run members, GPUs in turn.")]
Together = Annotated[int, typer.Option(help="Networks trained at once in each process, in threads.")]
Out = Annotated[Path | None, typer.Option(help="Write the numbers as JSON here as well.")]


def _share(text: str) -> float:
    value = yaml_value(text, "--sparsity")
    return float(value if isinstance(value, int | float) else text)


@cache
def run_flags() -> list[Flag]:
    """The flags of `prunus run`: of recipes of both tasks."""
    from prunus.recipe import ClassifierRecipe, LanguageRecipe

    return flags_of([LanguageRecipe, ClassifierRecipe], ["prune", "retrain"])


@cache
def evaluate_flags() -> list[Flag]:
    """The flags of `prunus evaluate`: how it is measured."""
    from prunus.recipe import LanguageRecipe

    measured = ("device", "precision", "dtype")
    return [flag for flag in flags_of([LanguageRecipe], ["evaluate"]) if flag.key in measured or "." in flag.key]


@cache
def write_flags() -> list[Flag]:
    """The flags of `prunus write`."""
    from prunus.recipe import Writing

    return flags_of([Writing], [])


@with_flags(app, run_flags)
def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="YAML recipe; or the folder of a finished classifier run, whose dense network is pruned again. "
            "Without one the embedded model is used."
        ),
    ] = None,
    assign: SetOption = None,
    *,
    workers: Workers = 1,
    together: Together = 1,
    ray: Annotated[
        str | None, typer.Option(help="Train a soup's members as tasks of this Ray cluster; 'local' starts one.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, after all checks; compute and write nothing.")
    ] = False,
    **flags: str | None,
) -> None:
    """Do what a recipe says: train, prune, retrain, average, measure, save. A killed run goes on.

    The recipe decides: with the key `images` it is of an image classifier, with `texts` of an encoder, else of a
    language model. `prunus show` prints the default of every key that is left out.

    $ prunus run recipe.yaml
    $ prunus run recipe.yaml --pattern 2:4 --set retrain.steps=400 --out runs/24
    $ prunus run --sparsity 60% --train mask_lora --steps 60 --lr 1e-3 --dry-run
    """
    from prunus.machine import ranks
    from prunus.run.task import plan_recipe, run_recipe

    if dry_run:
        plan_recipe(recipe, overrides(run_flags(), flags, assign))()
        return
    shown = run_recipe(recipe, overrides(run_flags(), flags, assign), workers=workers, together=together, ray=ray)
    if ranks.is_main():
        shown()
    ranks.leave()


@app.command()
def grid(
    recipes: Annotated[
        list[Path], typer.Argument(help="YAML grids: a base recipe and the axes that vary; or one sweep of rates.")
    ],
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any key of the grids: --set base.retrain.steps=64 (repeatable)."),
    ] = None,
    device: DeviceOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the grid; of several, that of their folders.")] = None,
    *,
    workers: Annotated[
        int,
        typer.Option(
            help="Members run at once, a process each, GPUs in turn; 0 only makes the tables of what is done."
        ),
    ] = 1,
    together: Together = 1,
    ray: Annotated[
        str | None, typer.Option(help="Run members as tasks of this Ray cluster; 'local' starts one here.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no member later than this; then make the tables of what is done.")
    ] = None,
) -> None:
    """Run grids of recipes, side by side; a killed grid goes on and repeats nothing that is finished.

    $ prunus grid grid.yaml --workers 2
    $ prunus grid grid.yaml --set base.retrain.steps=64 --out runs/short
    """
    from prunus.jobs import Workers as Pool
    from prunus.machine import read_json
    from prunus.run.compare import compare_all, load_grids
    from prunus.run.page import write_report
    from prunus.run.task import is_sweep

    _check_single("grid")
    changes = assignments(assign) | _of_device(device, "base.")
    if is_sweep(recipes):
        if changes:
            raise ValueError("--set and --device go with grids; write the key into the sweep")
        from prunus.run.show import show_sweep
        from prunus.vision import load_sweep, sweep

        asked = load_sweep(recipes[0], out)
        show_sweep(sweep(asked, Pool(max(workers, 1), together, ray)), asked.out)
        write_report(asked.out)
        return
    grids = load_grids(recipes, out, changes)
    from prunus.run.show import show_grid  # which takes seconds to import, and a grid that is wrong need not wait

    try:
        found = compare_all(grids, workers=workers, together=together, ray=ray, minutes=minutes)
    except Unfinished:  # an earlier page would stand beside tables of what has finished since
        for each in grids:
            if read_json(Path(each.out) / "table.json"):
                write_report(Path(each.out))
        raise
    for each, rows in zip(grids, found, strict=True):
        show_grid(rows, Path(each.out))
        if rows:
            write_report(Path(each.out))


@with_flags(app, evaluate_flags)
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Language model: name, folder, .gguf file, 'embedded'; or a classifier's run folder.")
    ],
    data: Annotated[
        str | None, typer.Option(help="Text file, parquet, 'embedded', or data set 'owner/name:config'.")
    ] = None,
    assign: SetOption = None,
    out: Out = None,
    **flags: str | None,
) -> None:
    """Measure a model: perplexity and zero-shot tasks, or a classifier's accuracy, also on corrupted images.

    $ prunus evaluate runs/60/model --data test.parquet --window 2048
    $ prunus evaluate runs/digits
    """
    from prunus.machine import write_json
    from prunus.run.evaluate import evaluate_model
    from prunus.run.show import show_evaluation
    from prunus.run.written import check_numbers

    _check_single("evaluate")
    check_numbers(out)
    asked = overrides(evaluate_flags(), flags, assign)
    if data is not None:  # and keys of it, such as --set evaluate.data.column=body
        asked.pop("evaluate.data", None)
        asked = {"evaluate.data": {"source": data}} | asked
    found = evaluate_model(model, asked)
    show_evaluation(model, found)
    if out is not None:
        write_json(out, found)


@app.command()
def measure(
    models: Annotated[list[str], typer.Argument(help="Language models: names, folders, .gguf files, 'embedded'.")],
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any recipe key: --set evaluate.speed.prompt=512 (repeatable)."),
    ] = None,
    device: DeviceOption = None,
    *,
    prompt: Annotated[int | None, typer.Option(help="Tokens that are read at once; 512.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that are decoded after them; 32.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences at once; 1.")] = None,
    seconds: Annotated[float | None, typer.Option(help="How long each phase is repeated; 2.")] = None,
    out: Out = None,
) -> None:
    """Time saved language models: prefill and decode tokens a second, memory, file size, beside the first one's.

    $ prunus measure embedded runs/60/model --device cpu
    """
    from prunus.machine import write_json
    from prunus.run.measure import measure_models
    from prunus.run.show import show_speed
    from prunus.run.written import check_numbers

    _check_single("measure")
    check_numbers(out)
    asked = {"prompt": prompt, "tokens": tokens, "batch_size": batch_size, "seconds": seconds}
    said = {f"evaluate.speed.{key}": value for key, value in asked.items() if value is not None}
    found = measure_models(models, assignments(assign) | _of_device(device) | said)
    show_speed({row["model"]: row for row in found})
    if out is not None:
        write_json(out, found)


@with_flags(app, write_flags)
def write(
    model: Annotated[str, typer.Argument(help="Language model, the dense one: name, folder, .gguf file, 'embedded'.")],
    out: Annotated[Path, typer.Argument(help="Folder of the texts, which recipes then name as data.")],
    data: Annotated[
        str | None, typer.Option(help="Your text, from which prompts are drawn; the embedded one if left out.")
    ] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="Keys of that text: --set data.column=body (repeatable).")
    ] = None,
    **flags: str | None,
) -> None:
    """Let a dense model go on with beginnings of your text: more text of that kind, to retrain its pruned copy on.

    A killed one goes on.

    $ prunus write ./model ./written --data notes.txt --tokens 1000000
    """
    from prunus.language import write as written
    from prunus.recipe import Writing, merge, parse
    from prunus.report import print_table

    _check_single("write")
    asked = {"model": model} | ({} if data is None else {"data": {"source": data}})
    print_table([written(parse(merge(asked, overrides(write_flags(), flags, assign)), Writing, "flags"), out)])


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder, .safetensors or .gguf file of any saved model.")],
    every: Annotated[bool, typer.Option("--all", help="A row for every weight, not for every kind.")] = False,
    out: Out = None,
) -> None:
    """Show sparsity and pattern of the weights of a saved model, read shard by shard.

    $ prunus inspect runs/60/model
    $ prunus inspect model.safetensors --all --out weights.json
    """
    from prunus.machine import write_json
    from prunus.run.inspect import inspect_model
    from prunus.run.show import show_inspection
    from prunus.run.written import check_numbers

    check_numbers(out)
    found = inspect_model(path)
    show_inspection(path, found, every=every)
    if out is not None:
        write_json(out, [vars(row) | {"sparsity": row.sparsity} for row in found])


@app.command()
def unpack(
    packed: Annotated[Path, typer.Argument(help="Folder of a packed model (save: {packed: true}).")],
    out: Annotated[Path, typer.Argument(help="The ordinary folder that is made of it.")],
) -> None:
    """Make the ordinary Hugging Face folder of a packed model, exactly, a tensor at a time.

    $ prunus unpack runs/60/model runs/60/ordinary
    """
    from prunus.save import unpack as unpacked

    made = unpacked(packed, out)
    typer.echo(f"{out}: {made.weight_bytes / 1e6:,.1f} MB of weights")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished runs; or of one grid or sweep.")],
    out: Annotated[Path | None, typer.Option(help="The page; report.html in the folder, or here of several.")] = None,
) -> None:
    """Write a page for the browser: of one folder, or of several runs beside one another.

    $ prunus report runs/60
    $ prunus report runs/60 runs/24 --out both.html
    """
    from prunus.run.page import compare_runs, write_report
    from prunus.run.written import check_page

    if len(folders) == 1:
        if out is not None:
            check_page(out)
        typer.echo(write_report(folders[0], out))
        return
    page = out or Path("report.html")
    check_page(page, page.with_suffix(".png"))
    compare_runs(folders, page)
    typer.echo(page)


@app.command()
def average(
    checkpoints: Annotated[list[Path], typer.Argument(help="Folders or .safetensors files that share one mask.")],
    out: Annotated[Path, typer.Option(help="Folder of the average.")],
    weights: Annotated[str | None, typer.Option(help="Their weights, as in 0.5,0.25,0.25; equal if left out.")] = None,
    greedy: Annotated[
        Path | None,
        typer.Option(help="Recipe that scores on validation data: only members that help are averaged."),
    ] = None,
    *,
    how: Annotated[
        str | None, typer.Option(help="Another average, as recipes name it: ties, '{dare: {density: 0.3}}', slerp.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The model that members were retrained from, for --how.")] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="Any key of that recipe: --set evaluate.window=512 (repeatable).")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Average checkpoints on disk, a tensor at a time; zeros stay zero, and members of other masks are refused.

    $ prunus average runs/a/model runs/b/model --out runs/soup
    $ prunus average runs/a/model runs/b/model runs/c/model --greedy validation.yaml --out runs/greedy
    """
    from prunus.jobs import average_checkpoints, average_greedily
    from prunus.report import print_table
    from prunus.run.evaluate import scorer

    _check_single("average")
    if greedy is not None and weights is not None:
        raise ValueError("--weights and --greedy contradict each other: a greedy soup weighs its members alike")
    if greedy is not None and (how is not None or base is not None):
        raise ValueError("--how and --base contradict --greedy: a greedy soup is a mean of its members")
    changes = assignments(assign) | _of_device(device)
    if changes and greedy is None:
        raise ValueError("--set and --device are of the recipe that --greedy names; leave them out, or name one")
    if greedy is None:
        asked = None if how is None else yaml_value(how, "--how")
        rows = average_checkpoints(checkpoints, out, numbers(weights, "--weights"), how=asked, base=base)
    else:
        by = scorer(greedy, changes)
        rows = average_greedily(checkpoints, out, by.score)
        by.settle_(out)
    print_table(rows, title=str(out))


@app.command()
def merge(
    base: Annotated[
        str, typer.Argument(help="The pruned model: name or folder; the dense one if pruning only zeroed.")
    ],
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, of Prunus or a LoRA of peft.")],
    out: Annotated[Path, typer.Argument(help="Folder of the merged model.")],
    device: DeviceOption = None,
) -> None:
    """Merge a kept adapter into the model that it was trained on; zeros stay zero, and another model is refused.

    $ prunus merge facebook/opt-125m runs/opt/adapter runs/merged
    """
    from prunus.report import print_table
    from prunus.run.merge import merge_adapter

    _check_single("merge")
    print_table([merge_adapter(base, adapter, out, device=device or "auto")], title=str(out))


@app.command()
def show(
    recipe: RecipeArg = None,
    names: Annotated[bool, typer.Option("--names", help="Print what recipes may name instead, with options.")] = False,
    assign: SetOption = None,
) -> None:
    """Print a recipe with every default filled in, after checking it; or all that recipes may name.

    $ prunus show recipe.yaml --set prune.pattern=2:4
    $ prunus show --names
    """
    import yaml

    if names:
        from prunus.run.show import show_names

        show_names()
        return
    from prunus.run.task import load

    typer.echo(yaml.safe_dump(load(recipe, assignments(assign)).model_dump(mode="json"), sort_keys=False), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, by which editors complete and check keys.

    $ prunus schema > recipes.schema.json
    """
    import json

    from prunus.recipe import schema_of_recipes

    typer.echo(json.dumps(schema_of_recipes(), indent=1))


@app.command()
def demo(
    what: Annotated[str, typer.Argument(help="language or vision.")] = "language",
    out: Annotated[Path | None, typer.Option(help="Run folder.")] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(parser=_share, metavar="FLOAT", help="Share of zeros, in [0, 1); 0.6, and 0.95 for vision."),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Show what Prunus does, offline, in a minute: on a small language model, or on handwritten digits.

    $ prunus demo
    $ prunus demo vision --sparsity 90%
    """
    _check_single("demo")
    if what == "vision":
        from prunus.run.digits import demo as run_vision

        run_vision(out or Path("runs/demo-vision"), 0.95 if sparsity is None else sparsity, device or "auto")
        return
    if what != "language":
        raise ValueError(f"demo: there is none of {what!r}; use language or vision")
    from prunus.run.demo import demo as run_language

    run_language(out or Path("runs/demo"), 0.6 if sparsity is None else sparsity, device or "auto")


def _of_device(device: str | None, section: str = "") -> dict[str, Any]:
    return {} if device is None else {f"{section}device": device}


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"prunus {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens; show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if int(os.environ.get("RANK", "0")) > 0:  # only the main process of several draws bars
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


def _check_single(command: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ValueError(f"{command} runs in one process, not in {processes}; launch `prunus run` on several GPUs")


_USAGE: Any = typer.BadParameter.__base__  # wrong arguments, whichever click this typer stands on


def main() -> None:
    """Entry point: wrong input is one line and exit status 2."""
    bound_threads()
    try:
        status = _command()(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except _USAGE as error:
        status = _refused(error.format_message(), "; see `prunus --help`")
    except Unfinished as error:
        status = _refused(str(error), status=1)
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        if logging.getLogger().isEnabledFor(logging.INFO):
            raise
        status = _refused(_of_system(error) if isinstance(error, OSError) else str(error))
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        status = _refused(f"{str(error).partition('. GPU')[0]}: {_SMALLER}")
    if status == 130:
        _refused(_STOPPED.get(next(iter(sys.argv[1:]), ""), "stopped; nothing was written"))
    sys.exit(status or 0)


@cache
def _command() -> Any:
    """All commands with what they take, which are read off their functions once."""
    return typer.main.get_command(app)


_KEPT = "stopped; what is finished is kept in its folder, checkpoints too, and the same command goes on from there"
_SMALLER = (
    "make batch_size smaller (of calibrate, retrain, evaluate or train), or set retrain.checkpointing: true or "
    "streaming: true; what is finished is kept"
)
_STOPPED = {"run": _KEPT, "grid": _KEPT, "write": _KEPT}


def _of_system(error: OSError) -> str:
    said = " ".join(str(error).split())
    if is_full(error):
        return f"{said}; make room, and give the same command again"
    closed = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    return f"{said}; give a place where this user may read and write" if closed else said


def _refused(text: str, hint: str = "", status: int = 2) -> int:
    sys.stderr.write(f"prunus: {text.rstrip('.') if hint else text}{hint}\n")
    return status


if __name__ == "__main__":
    main()
