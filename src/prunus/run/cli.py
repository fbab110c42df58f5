"""The command `prunus`: each subcommand reads its arguments, calls one function, prints a table.

Wrong input ends with one line on stderr and exit status 2, before any work; everything else is a bug and shows itself.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from prunus import __version__
from prunus.machine import write_json
from prunus.run.flags import assignments, numbers, pairs

app = typer.Typer(
    name="prunus",
    help="Make neural networks sparse and keep them good: prune, retrain a sliver, merge, ship.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeArg = Annotated[Path | None, typer.Argument(help="YAML recipe; without one the embedded model is used.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Any recipe key: --set prune.sparsity=0.6 (repeatable; flags win).")
]


@app.command()
def compress(
    recipe: RecipeArg = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face name or folder, .gguf file, or 'embedded'.")] = None,
    criterion: Annotated[str | None, typer.Option(help="Which weights go; `prunus show --names` lists them.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="'unstructured' or N:M, at most N nonzeros of M, such as 2:4.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros, in [0, 1).")] = None,
    train: Annotated[str | None, typer.Option(help="Retrained parameters: 'biases,norms', 'mask_lora', ...")] = None,
    steps: Annotated[int | None, typer.Option(help="Retraining steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Retraining peak learning rate.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1.")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder.")] = None,
    assign: SetOption = None,
) -> None:
    """Prune a language model, retrain a sliver of it, merge, measure, save."""
    from prunus.machine import ranks
    from prunus.run.compress import compress as run
    from prunus.run.recipe import load_recipe
    from prunus.run.show import show_result

    flags = {
        "model": model,
        "prune.criterion": criterion,
        "prune.pattern": pattern,
        "prune.sparsity": sparsity,
        "retrain.train": train,
        "retrain.steps": steps,
        "retrain.lr": lr,
        "device": device,
        "out": out,
    }
    overrides = assignments(assign) | {key: value for key, value in flags.items() if value is not None}
    checked = load_recipe(recipe, overrides)
    result = run(checked)
    if ranks.is_main():
        show_result(result, Path(checked.out))
    ranks.leave()


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Hugging Face name or folder, .gguf file, or 'embedded'.")],
    data: Annotated[
        str, typer.Option(help="Text file, parquet, 'embedded', or data set 'owner/name:config'.")
    ] = "embedded",
    split: Annotated[str | None, typer.Option(help="Split of a hub data set.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens a window; the model's own length (at most 2048) if left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    task: Annotated[
        list[str] | None, typer.Option(help="Zero-shot task name=file (needs the extra 'zeroshot').")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON here as well.")] = None,
) -> None:
    """Perplexity of a model on a text: joined, windows without overlap, mean loss over predicted tokens."""
    from prunus.run import stages
    from prunus.run.fitted import fitted
    from prunus.run.recipe import Recipe, parse
    from prunus.run.show import show_evaluation

    _alone("evaluate")
    tasks = pairs(task or [], "--task", "name=file")
    asked = {
        "data": {data: {"source": data, "split": split}},
        "window": window,
        "batch_size": batch_size,
        "tasks": tasks,
    }
    checked = parse({"model": model, "device": device, "evaluate": asked}, Recipe, "flags")
    place = stages.device_of(checked)
    checked = fitted(checked, place)
    loaded = stages.load(checked)
    numbers: dict[str, Any] = {"perplexity": stages.evaluate(loaded, checked, place)}
    if tasks:
        numbers["zero_shot"] = stages.zero_shot(loaded.model, loaded.tokenizer, checked, place)
    show_evaluation(model, numbers)
    if out is not None:
        write_json(out, numbers)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder or .safetensors file of any saved model.")],
    out: Annotated[Path | None, typer.Option(help="Write the rows as JSON here as well.")] = None,
) -> None:
    """Sparsity and pattern of every weight of a saved model, read shard by shard."""
    from prunus.run.inspect import inspect_model
    from prunus.run.show import show_inspection

    found = inspect_model(path)
    show_inspection(path, found)
    if out is not None:
        write_json(out, [vars(row) | {"sparsity": row.sparsity} for row in found])


@app.command()
def demo(
    what: Annotated[str, typer.Argument(help="language or vision.")] = "language",
    out: Annotated[Path | None, typer.Option(help="Run folder.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros, in [0, 1); 0.6, and 0.95 for vision.")] = None,
) -> None:
    """Show what Prunus does, offline: on a small language model (two minutes), or on handwritten digits (one)."""
    _alone("demo")
    if what == "vision":
        from prunus.run.vision.demo import demo as run_vision

        run_vision(out or Path("runs/demo-vision"), 0.95 if sparsity is None else sparsity)
        return
    if what != "language":
        raise ValueError(f"demo: there is none of {what!r}; use language or vision")
    from prunus.run.demo import demo as run

    run(out or Path("runs/demo"), 0.6 if sparsity is None else sparsity)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with the key `images`.")],
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1.")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder.")] = None,
    assign: SetOption = None,
) -> None:
    """Train an image classifier; prune and retrain it if the recipe says so. A killed run goes on."""
    from prunus.run.show import show_run
    from prunus.run.vision.recipe import load_classifier
    from prunus.run.vision.train import train_run

    _alone("train")
    flags = {"device": device, "out": out}
    checked = load_classifier(recipe, assignments(assign) | {k: v for k, v in flags.items() if v is not None})
    show_run(train_run(checked), Path(checked.out))


@app.command()
def prune(
    run: Annotated[Path, typer.Argument(help="Run folder that `prunus train` left.")],
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros, in [0, 1).")] = None,
    schedule: Annotated[str | None, typer.Option(help="Of retraining: ft, lrw, slr, clr, llr, allr.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs of retraining; without it there is none.")] = None,
    phases: Annotated[int | None, typer.Option(help="Prune and retrain that many times.")] = None,
    pattern: Annotated[str | None, typer.Option(help="unstructured, N:M, 'block RxC' or filters.")] = None,
    kind: Annotated[str | None, typer.Option(help="zeros, or a smaller network: filters, low_rank.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; RUN/pruned if left out.")] = None,
    assign: SetOption = None,
) -> None:
    """Prune and retrain the dense classifier of a finished run."""
    from prunus.run.show import show_run
    from prunus.run.vision.train import prune_run, pruning_of

    _alone("prune")
    flags = {
        "prune.sparsity": sparsity,
        "retrain.schedule": schedule,
        "retrain.epochs": epochs,
        "prune.phases": phases,
        "prune.pattern": pattern,
        "prune.kind": kind,
    }
    checked = pruning_of(run, assignments(assign) | {k: v for k, v in flags.items() if v is not None}, out)
    show_run(prune_run(checked, run), Path(checked.out))


@app.command()
def sweep(
    source: Annotated[Path, typer.Argument(help="Run folder that `prunus train` left, or a file with a state dict.")],
    recipe: Annotated[Path | None, typer.Option(help="Of a state dict: the YAML recipe of its network.")] = None,
    kinds: Annotated[str, typer.Option(help="What becomes of the network, with commas; all if left out.")] = "all",
    rates: Annotated[str | None, typer.Option(help="Shares that go, as in 0.5,0.9; 0 to 0.99 if left out.")] = None,
    schedule: Annotated[str, typer.Option(help="Of retraining: ft, lrw, slr, clr, llr, allr.")] = "allr",
    epochs: Annotated[float | None, typer.Option(help="Epochs of retraining; without it there is none.")] = None,
    images: Annotated[int, typer.Option(help="Images in the batch whose forward pass is timed.")] = 128,
    workers: Annotated[int, typer.Option(help="Processes that measure points, GPUs in turn.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Measure points as tasks of this Ray cluster, or 'local'.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep; RUN/sweep if left out.")] = None,
    assign: SetOption = None,
) -> None:
    """Compress one dense classifier at many rates, in several ways, without retraining. A killed sweep goes on."""
    from prunus.run.pool import Workers
    from prunus.run.show import show_sweep
    from prunus.run.vision.sweep import KINDS, RATES, sweep_of
    from prunus.run.vision.sweep import sweep as run

    _alone("sweep")
    asked = sweep_of(
        source,
        recipe=recipe,
        kinds=KINDS if kinds == "all" else kinds.split(","),
        rates=numbers(rates, "--rates") or RATES,
        retrain=None if epochs is None else {"schedule": schedule, "epochs": epochs},
        overrides=assignments(assign),
        out=out,
        timed=images,
    )
    show_sweep(run(asked, Workers(workers, ray=ray)), asked.out)


@app.command()
def compare(
    recipes: Annotated[list[Path], typer.Argument(help="YAML grids: a base recipe and the axes that vary.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the grid; of several, that of their folders.")] = None,
    workers: Annotated[
        int,
        typer.Option(
            help="Members run at once, a process each, GPUs in turn; 0 only makes the tables of what is done."
        ),
    ] = 1,
    together: Annotated[
        int, typer.Option(help="Classifiers trained at once in each process, in threads; small ones fill a GPU so.")
    ] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Run members as tasks of this Ray cluster; 'local' starts one here.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no member later than this; then make the tables of what is done.")
    ] = None,
) -> None:
    """Run grids of recipes, side by side; a killed grid goes on and repeats nothing that is finished."""
    from prunus.run.compare import compare_all, load_grids
    from prunus.run.show import show_grid

    _alone("compare")
    grids = load_grids(recipes, out)
    try:
        found = compare_all(grids, workers=workers, together=together, ray=ray, minutes=minutes)
    except RuntimeError as error:  # members failed; the others are finished and in the tables
        typer.echo(f"prunus: {error}", err=True)
        raise typer.Exit(1) from None
    for grid, rows in zip(grids, found, strict=True):
        show_grid(rows, Path(grid.out))


@app.command()
def soup(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe of a classifier with the section `soup`.")],
    out: Annotated[str | None, typer.Option(help="Run folder.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that train members, GPUs in turn.")] = 1,
    together: Annotated[int, typer.Option(help="Members trained at once in each process, in threads.")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Train members as tasks of this Ray cluster; 'local' starts one here.")
    ] = None,
    assign: SetOption = None,
) -> None:
    """Average retrained copies of one pruned classifier, phase by phase, beside baselines. A killed run goes on."""
    from prunus.run.show import show_soup
    from prunus.run.vision.soups.command import soup_run
    from prunus.run.vision.soups.recipe import load_soup

    _alone("soup")
    checked = load_soup(recipe, assignments(assign) | ({"out": out} if out is not None else {}))
    try:
        result = soup_run(checked, workers=workers, together=together, ray=ray)
    except RuntimeError as error:  # members failed for good; the others are kept
        typer.echo(f"prunus: {error}", err=True)
        raise typer.Exit(1) from None
    show_soup(result, Path(checked.out))


@app.command()
def average(
    checkpoints: Annotated[list[Path], typer.Argument(help="Folders or .safetensors files that share one mask.")],
    out: Annotated[Path, typer.Option(help="Folder of the average.")],
    weights: Annotated[str | None, typer.Option(help="Their weights, as in 0.5,0.25,0.25; equal if left out.")] = None,
    greedy: Annotated[
        Path | None,
        typer.Option(help="Recipe that scores on validation data: only members that help are averaged."),
    ] = None,
) -> None:
    """Average checkpoints on disk, a tensor at a time; zeros stay zero, and members of other masks are refused."""
    from prunus.report import print_table
    from prunus.run.average import average_checkpoints, average_greedily
    from prunus.run.scored import scorer

    _alone("average")
    if greedy is not None and weights is not None:
        raise ValueError("--weights and --greedy contradict each other: a greedy soup weighs its members alike")
    if greedy is None:
        rows = average_checkpoints(checkpoints, out, numbers(weights, "--weights"))
    else:
        by = scorer(greedy)
        rows = average_greedily(checkpoints, out, by.score)
        by.settle_(out)
    print_table(rows, title=str(out))


@app.command()
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe of the training; see recipes/embedded/pretrain.yaml.")],
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/pretrain"),
) -> None:
    """Train a small OPT-style language model and its tokenizer from text."""
    from prunus.report import print_table, progress
    from prunus.run.pretrain import pretrain as run
    from prunus.run.pretrain import read_recipe

    _alone("pretrain")
    checked = read_recipe(recipe)
    # With `minutes` the number of steps is known only once some were timed.
    with progress("pretrain", checked.steps if checked.minutes is None else None) as advance:
        summary = run(checked, out, on_step=lambda done, _steps, _loss: advance.to(done))
    print_table([{"text": text, **found} for text, found in summary["perplexity"].items()], title=str(out))


@app.command()
def show(
    recipe: RecipeArg = None,
    names: Annotated[bool, typer.Option("--names", help="Print what recipes may name instead, with options.")] = False,
    assign: SetOption = None,
) -> None:
    """Print a recipe with every default filled in, after checking it; or all that recipes may name."""
    import yaml

    if names:
        from prunus.report import print_table
        from prunus.run.names import rows

        print_table(list(rows()), title="what recipes may name")
        return
    from prunus.run.recipe import load_recipe, merge, parse, read_yaml
    from prunus.run.vision.soups.recipe import class_of

    overrides = assignments(assign)
    raw = merge({} if recipe is None else read_yaml(recipe), overrides)
    checked = parse(raw, class_of(raw), str(recipe or "flags")) if "images" in raw else load_recipe(recipe, overrides)
    typer.echo(yaml.safe_dump(checked.model_dump(mode="json"), sort_keys=False), nl=False)


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


def _alone(command: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ValueError(f"{command} runs in one process, not in {processes}; launch `prunus compress` on several GPUs")


def main() -> None:
    """Entry point: wrong input is one line and exit status 2."""
    try:
        app()
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        if logging.getLogger().isEnabledFor(logging.INFO):
            raise
        text = " ".join(str(error).split()) if isinstance(error, OSError) else str(error)
        sys.stderr.write(f"prunus: {text}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("prunus: stopped; the same command goes on from here\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
