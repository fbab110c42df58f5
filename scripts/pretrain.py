"""Train a small language model from text (OPT-style, or of experts), with tokenizer, log and baselines it must beat.

    python scripts/pretrain.py recipes/embedded/pretrain.yaml --out runs/embedded

    recipe -> split (whole books held out) -> tokenizer -> tokens -> train -> perplexities -> folder

The folder holds an ordinary Hugging Face model (float16) with its tokenizer, `text/<split>.txt` (excerpts of the books
held out), `metrics.jsonl`, `baselines.json` and `recipe.yaml`. A killed run, called again, goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from ngram import count_ngrams, fit_weights, trigram_perplexity, unigram_perplexity
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prunus.blocks import compile_blocks_
from prunus.data import SPLITS, PackedTokens, read_texts, tokenize_documents
from prunus.machine import Precision, atomic, write_json, write_text
from prunus.measure import perplexity
from prunus.recipe import parse
from prunus.recipe.plain import Strict, read_yaml
from prunus.report import print_table, progress
from prunus.train import Trace, linear_warmup_decay, next_token_loss, train

__all__ = ["Books", "HeldOut", "ModelSize", "PretrainRecipe", "pretrain", "read_recipe"]

_logger = logging.getLogger(__name__)
PROBE_STEPS = 60
SPECIALS = ["<pad>", "</s>"]  # the trainer numbers them in this order, from 0


class HeldOut(Strict):
    """Titles of the books never trained on, by what they are for, and how much of each split is written as text.

    train: for calibrating and retraining later; validation: for choices; test: for numbers to report.
    """

    train: list[str] = Field(min_length=1)
    validation: list[str] = Field(min_length=1)
    test: list[str] = Field(min_length=1)
    train_bytes: int = Field(165_000, gt=0)
    validation_bytes: int = Field(40_000, gt=0)
    test_bytes: int = Field(90_000, gt=0)


class ModelSize(Strict):
    """Sizes of the OPT-style model: pre-LayerNorm, biases everywhere, tied embeddings, no dropout.

    experts: with more than none a Mixtral-style model, two experts a token, each with `ffn` gated neurons.
    """

    vocabulary: int = Field(4096, ge=260)
    hidden: int = Field(256, gt=0)
    layers: int = Field(6, gt=0)
    heads: int = Field(4, gt=0)
    ffn: int = Field(960, gt=0)
    experts: int = Field(0, ge=0)
    context: int = Field(512, gt=1)


class PretrainRecipe(Strict):
    """Everything a pretraining needs; see recipes/embedded/pretrain.yaml."""

    data: str
    title_column: str = "title"
    text_column: str = "text"
    leave_out: list[str] = Field(default_factory=list[str])
    held_out: HeldOut
    model: ModelSize = ModelSize()  # pyright: ignore[reportCallIssue]
    steps: int = Field(12_000, ge=2)
    minutes: float | None = Field(None, gt=0)
    batch: int = Field(64, gt=0)
    lr: float = Field(3e-3, gt=0)
    warmup: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.1, ge=0)
    beta2: float = Field(0.95, gt=0, lt=1)
    clip: float = Field(1.0, gt=0)
    precision: Precision = "bf16"
    compile: bool = False
    save_seconds: float = Field(180.0, ge=0)
    evaluate_every: int = Field(1000, gt=0)
    seed: int = 0


@dataclass(frozen=True)
class Books:
    """Texts of the books to train on and, by split, of those held out."""

    training: list[str]
    held_out: dict[str, list[str]]


def read_recipe(path: Path) -> PretrainRecipe:
    """The recipe of a YAML file, checked.

    Raises: FileNotFoundError for a missing file; ValueError naming each wrong key with its value and mend.

    >>> read_recipe(Path("recipes/embedded/pretrain.yaml")).model.hidden
    256
    """
    return parse(read_yaml(path), PretrainRecipe, str(path))


def pretrain(
    recipe: PretrainRecipe, folder: Path, *, on_step: Callable[[int, int, float], None] | None = None
) -> dict[str, Any]:
    """Run the recipe into `folder` and return its summary (also written there as baselines.json).

    on_step(steps done, steps in all, loss) reports progress. Finished parts found in the folder are not done again.
    Raises: ValueError for a title that the data does not hold, or a folder that belongs to another recipe.
    """
    _claim(recipe, folder)
    books = _split(recipe)
    tokenizer = _tokenizer(recipe, books.training, folder)
    tokens = _cached(folder / "work" / "tokens.pt", lambda: tokenize_documents(books.training, tokenizer).int())
    held_out = {split: tokenize_documents(texts, tokenizer) for split, texts in books.held_out.items()}
    _logger.info("%d training tokens; held out: %s", len(tokens), {k: len(v) for k, v in held_out.items()})
    excerpts = _write_excerpts(recipe.held_out, books, folder)
    trace, steps, model = _train(recipe, folder, tokens, held_out["validation"], tokenizer, on_step)
    _save(model, tokenizer, folder)
    measured = held_out | {"test_excerpt": tokenize_documents(excerpts["test"], tokenizer)}
    summary = _summary(recipe, model, trace, steps, tokens)
    summary["perplexity"] = _measure(recipe, folder, tokens, measured)
    write_json(folder / "baselines.json", summary)
    return summary


def _claim(recipe: PretrainRecipe, folder: Path) -> None:
    (folder / "work").mkdir(parents=True, exist_ok=True)
    path, text = folder / "recipe.yaml", yaml.safe_dump(recipe.model_dump(), sort_keys=False)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{folder} holds a run of another recipe ({path}); choose another folder or delete it.")
    write_text(path, text)


def _split(recipe: PretrainRecipe) -> Books:
    texts = read_texts(recipe.data, column=recipe.text_column)
    titles = [title.strip() for title in read_texts(recipe.data, column=recipe.title_column)]
    by_title = dict(zip(titles, texts, strict=True))
    named = {split: list[str](getattr(recipe.held_out, split)) for split in SPLITS}
    apart = {title for split in SPLITS for title in named[split]} | set(recipe.leave_out)
    if unknown := sorted(apart - set(titles)):
        raise ValueError(f"{recipe.data} has no book called {unknown}; its titles begin with {titles[:5]}.")
    training = [text for title, text in zip(titles, texts, strict=True) if title not in apart]
    if not training:
        raise ValueError(f"All {len(titles)} books of {recipe.data} are held out; none is left to train on.")
    return Books(training, {split: [by_title[title] for title in named[split]] for split in SPLITS})


def _tokenizer(recipe: PretrainRecipe, texts: Sequence[str], folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the training texts, or the one that the folder already holds."""
    path = folder / "work" / "bpe.json"
    if not path.exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=recipe.model.vocabulary,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer, length=len(texts))
        bpe.save(str(path))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        pad_token="<pad>",
        bos_token="</s>",
        eos_token="</s>",
        model_max_length=recipe.model.context,
        clean_up_tokenization_spaces=False,
    )


def _build(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    size = recipe.model
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.context,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "pad_token_id": SPECIALS.index("<pad>"),
        "bos_token_id": SPECIALS.index("</s>"),
        "eos_token_id": SPECIALS.index("</s>"),
    }
    if size.experts:
        experts = {"intermediate_size": size.ffn, "num_local_experts": size.experts, "num_key_value_heads": size.heads}
        config: Any = MixtralConfig(**shared, **experts, router_aux_loss_coef=0.01)
    else:
        config = OPTConfig(**shared, word_embed_proj_dim=size.hidden, ffn_dim=size.ffn, dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return MixtralForCausalLM(config) if size.experts else OPTForCausalLM(config)


def _balanced_loss(model: Any, ids: Tensor) -> Tensor:
    """The loss of the next token, and a hundredth of what uneven use of the experts costs (Fedus et al. 2022)."""
    return model(input_ids=ids, labels=ids, output_router_logits=True).loss


def _train(
    recipe: PretrainRecipe,
    folder: Path,
    tokens: Tensor,
    validation: Tensor,
    tokenizer: PreTrainedTokenizerFast,
    on_step: Callable[[int, int, float], None] | None,
) -> tuple[Trace, int, PreTrainedModel]:
    """Train the model of the recipe; returns the trace, the steps done and the model (float32)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packed = PackedTokens(tokens.to(device), recipe.model.context)

    def batches(step: int) -> Tensor:
        return packed.at(step, batch=recipe.batch, seed=recipe.seed)

    steps = _steps(recipe, folder, batches, tokenizer)
    model = _ready(recipe, tokenizer)
    started = time.perf_counter()

    def report(done: int, loss: float) -> None:
        line: dict[str, Any] = {"step": done, "loss": loss, "seconds": round(time.perf_counter() - started, 2)}
        if done % recipe.evaluate_every == 0 or done == steps:
            line["validation_perplexity"] = perplexity(model, validation, window=recipe.model.context, batch_size=64)
        _log(folder / "metrics.jsonl", line)
        if on_step is not None:
            on_step(done, steps, loss)

    trace = train(
        model,
        batches,
        _optimizer(model, recipe),
        linear_warmup_decay(steps, recipe.warmup),
        steps=steps,
        loss=_balanced_loss if recipe.model.experts else next_token_loss,
        clip=recipe.clip,
        precision=recipe.precision,
        checkpoint=folder / "work" / "checkpoint.pt",
        save_seconds=recipe.save_seconds,
        report_every=50,
        on_step=report,
    )
    return trace, steps, model


def _ready(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    model = _build(recipe, tokenizer)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]
    if recipe.compile:
        compile_blocks_(model)
    return model


def _steps(
    recipe: PretrainRecipe, folder: Path, batches: Callable[[int], Tensor], tokenizer: PreTrainedTokenizerFast
) -> int:
    """The steps that fit the recipe's minutes by a short probe, never more than its steps; kept for a resumed run."""
    if recipe.minutes is None:
        return recipe.steps
    path = folder / "work" / "steps.json"
    if not path.exists():
        times: list[float] = []
        probe = _ready(recipe, tokenizer)
        train(
            probe,
            batches,
            _optimizer(probe, recipe),
            linear_warmup_decay(PROBE_STEPS),
            steps=PROBE_STEPS,
            loss=_balanced_loss if recipe.model.experts else next_token_loss,
            clip=recipe.clip,
            precision=recipe.precision,
            report_every=10,
            on_step=lambda done, loss: times.append(time.perf_counter()),
        )
        per_step = (times[-1] - times[0]) / (PROBE_STEPS - 10)
        fitting = max(2, min(recipe.steps, int(recipe.minutes * 60 / per_step)))
        _logger.info("%.1f ms a step: %d steps of at most %d", 1000 * per_step, fitting, recipe.steps)
        write_json(path, {"steps": fitting, "seconds_per_step": per_step})
    return json.loads(path.read_text(encoding="utf-8"))["steps"]


def _optimizer(model: PreTrainedModel, recipe: PretrainRecipe) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.beta2), fused=torch.cuda.is_available())


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    weights = {name: tensor.detach().cpu().half() for name, tensor in model.state_dict().items()}
    saved = type(model)(model.config).half()  # a copy, so that the caller's model keeps float32
    saved.load_state_dict(weights)
    saved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class name that earlier releases and serving programs do not know.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(path, config)


def _measure(
    recipe: PretrainRecipe, folder: Path, tokens: Tensor, measured: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Perplexities of the saved float16 weights (run in float32) and of the n-gram models, by held-out text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]
    window = recipe.model.context
    ngrams = count_ngrams(tokens.long().numpy(), model.config.vocab_size)
    weights = fit_weights(ngrams, measured["validation"].numpy())
    return {
        name: {
            "model": perplexity(model, text, window=window, batch_size=16),
            "trigram": trigram_perplexity(ngrams, weights, text.numpy(), window=window),
            "unigram": unigram_perplexity(ngrams, text.numpy(), window=window),
            "tokens": len(text),
        }
        for name, text in measured.items()
    }


def _summary(
    recipe: PretrainRecipe, model: PreTrainedModel, trace: Trace, steps: int, tokens: Tensor
) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": len(tokens),
        "steps": steps,
        "tokens_seen": trace.tokens,
        "epochs": round(trace.tokens / len(tokens), 2),
        "seconds": round(trace.seconds, 1),
        "tokens_per_second": round(trace.tokens / trace.seconds),
        "peak_bytes": trace.peak_bytes,
        "final_loss": sum(trace.losses[-100:]) / len(trace.losses[-100:]),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "protocol": f"documents encoded one by one, each ended by </s>; windows of {recipe.model.context}; mean over "
        "predicted tokens; n-gram weights fitted on the validation books",
    }


def _write_excerpts(held_out: HeldOut, books: Books, folder: Path) -> dict[str, list[str]]:
    """Write text/<split>.txt: of each held-out book an equal share of whole paragraphs; returns the texts."""
    texts: dict[str, list[str]] = {}
    for split in SPLITS:
        share = getattr(held_out, f"{split}_bytes") // len(books.held_out[split])
        joined = "\n\n".join(_excerpt(text, share - 2) for text in books.held_out[split]) + "\n"
        write_text(folder / "text" / f"{split}.txt", joined)
        texts[split] = [joined]
    return texts


def _excerpt(text: str, size: int) -> str:
    """Whole paragraphs of at most `size` bytes in all, from the first that begins after a tenth of the text."""
    # Some books leave a line between paragraphs, others do not.
    gap = "\n\n" if text.count("\n\n") * 2000 > len(text) else "\n"
    start = text.find(gap, len(text) // 10) + len(gap)
    raw = text[start:].encode("utf-8")[:size].decode("utf-8", errors="ignore")
    end = raw.rfind(gap)
    return (raw[:end] if end > 0 else raw).strip()


def _log(path: Path, line: dict[str, Any]) -> None:
    """Append the line, dropping what an interrupted run wrote after its last checkpoint."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [old for old in lines if json.loads(old)["step"] < line["step"]]
    write_text(path, "\n".join([*kept, json.dumps(line)]) + "\n")


def _cached(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    if not path.exists():
        with atomic(path) as partial:
            torch.save(compute(), partial)
    return torch.load(path, weights_only=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe named on the command line; a wrong one is a line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path, help="YAML recipe; see recipes/embedded/pretrain.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="output folder")
    asked = parser.parse_args(arguments)
    try:
        recipe = read_recipe(asked.recipe)
        # With `minutes` the number of steps is known only once some were timed.
        with progress("pretrain", recipe.steps if recipe.minutes is None else None) as advance:
            summary = pretrain(recipe, asked.out, on_step=lambda done, _steps, _loss: advance.to(done))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"pretrain: {error}\n")
        sys.exit(2)
    print_table([{"text": text, **found} for text, found in summary["perplexity"].items()], title=str(asked.out))


if __name__ == "__main__":
    main()
