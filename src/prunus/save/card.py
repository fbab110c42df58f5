"""The README.md of a saved model: what it is, how it was made, what was measured, and what its size means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["SIZE_NOTE", "model_card"]

SIZE_NOTE = (
    "The weight files are as large as those of the dense model: pruned weights are stored as zeros in ordinary dense "
    "tensors, so that every program that reads the dense model reads this one. Zeros alone save neither disk, memory "
    "nor time. A general compressor (zstd, gzip) makes the files smaller for storage and transfer; a speed-up needs a "
    "runtime with kernels for the pattern (2:4 on recent NVIDIA GPUs, for example) and its own conversion step."
)


def model_card(name: str, info: Mapping[str, Any]) -> str:
    """Markdown for the model `name` from the contents of its prunus.json.

    Reads `model`, `pattern`, `sparsity`, `recipe`, `metrics` (or `perplexity`, `zero_shot`) and `versions`; what is
    missing is left out.
    """
    sparsity: Mapping[str, Any] = info.get("sparsity", {})
    lines = [f"# {name}", "", _summary(info, sparsity), "", "## Size", "", SIZE_NOTE, ""]
    metrics = info.get("metrics") or {key: info[key] for key in ("perplexity", "zero_shot") if key in info}
    if metrics:
        lines += ["## Results", "", *_metric_table(metrics), ""]
    recipe = info.get("recipe")
    if recipe:
        lines += ["## Recipe", "", "```yaml", *_yaml(recipe), "```", ""]
    layers: Mapping[str, float] = sparsity.get("layers", {})
    if layers:
        lines += ["## Sparsity by layer", "", "| layer | zeros |", "|---|---|"]
        lines += [f"| `{layer}` | {100 * share:.2f} % |" for layer, share in layers.items()] + [""]
    lines += ["## Files", "", *_files(info), ""]
    return "\n".join(lines)


def _summary(info: Mapping[str, Any], sparsity: Mapping[str, Any]) -> str:
    base = f" of `{info['model']}`" if info.get("model") else ""
    pattern = f" ({info['pattern']})" if info.get("pattern") else ""
    share = sparsity.get("pruned")
    what = f"{100 * share:.2f} % of the weights of its pruned layers are zero{pattern}. " if share is not None else ""
    return (
        f"A sparse version{base}, made with Prunus {info.get('versions', {}).get('prunus', '')}. {what}"
        "It is an ordinary dense checkpoint and loads with `transformers.AutoModelForCausalLM.from_pretrained`."
    )


def _metric_table(metrics: Mapping[str, Any]) -> list[str]:
    rows = list(_flat(metrics))
    return ["| measured | value |", "|---|---|", *(f"| {name} | {_number(value)} |" for name, value in rows)]


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        rows += _flat(value, f"{name}, ") if isinstance(value, Mapping) else [(name, value)]
    return rows


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _yaml(recipe: Any) -> list[str]:
    import yaml

    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip().splitlines()


def _files(info: Mapping[str, Any]) -> list[str]:
    lines = ["- `prunus.json`: recipe, sparsity by layer, metrics and the versions it was made with"]
    if info.get("masks"):
        lines.append("- `masks.safetensors`: the pruning masks, eight to a byte; read with `prunus.masks.Masks.load`")
    return lines
