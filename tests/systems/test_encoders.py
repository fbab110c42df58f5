"""Encoders of text and images: padded batches, ways to prune in memory, distilled embeddings, saved as they came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from prunus.adapt import adapt
from prunus.data import build_encoder, pooling_of, read_sentences
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.measure import accuracy, spearman, target_perplexity
from prunus.patterns import NM, Unstructured
from prunus.prune import prune, prune_in_turn
from prunus.recipe import EncoderRecipe, Recipe, parse
from prunus.run.evaluate import evaluate_model
from prunus.score import global_, magnitude, observable, observe, wanda
from prunus.score.allocations import evopress
from prunus.solve import sparsegpt
from prunus.train import (
    classification_loss,
    distilled_classification,
    distilled_embeddings,
    embeddings,
    train,
)
from prunus.vision.setting import Setting
from prunus.vision.sweeps import sweep_of
from prunus.vision.train import train_run

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
BATCH = {
    "input_ids": torch.randint(3, 30, (4, 6), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4, [1] * 6]),
}


def bert(cls: type = BertModel) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, max_position_embeddings=8, num_labels=3, **SMALL)
    return (cls(config, add_pooling_layer=False) if cls is BertModel else cls(config)).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)).eval()


def test_masked_positions_count_in_no_statistic() -> None:
    model, seen = bert(), {}
    views = find_layers(model)
    attended = BATCH["attention_mask"].bool()
    for garbage in (3, 17):  # what stands where nothing is attended
        ids = torch.where(attended, BATCH["input_ids"], garbage)
        with torch.no_grad(), observe(model, views, gram=True) as inputs:
            model(input_ids=ids, attention_mask=BATCH["attention_mask"])
        seen[garbage] = inputs
    for view in views:
        one, other = (seen[garbage][view.name] for garbage in (3, 17))
        assert one.tokens == other.tokens == 18
        torch.testing.assert_close(one.gram, other.gram)


class Fused(nn.Module):
    """As BEiT and EVA multiply: by a layer's weight with a bias of the owner's, not through the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 12, bias=False), nn.Linear(12, 8)
        self.q_bias = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.linear(x, weight=self.qkv.weight, bias=self.q_bias))


def test_a_layer_whose_weight_is_used_without_calling_it_is_observed() -> None:
    torch.manual_seed(0)
    model, x = Fused(), torch.randn(4, 5, 8)
    with torch.no_grad(), observe(model, find_layers(model), gram=True) as inputs:
        for _ in range(2):
            model(x)
    assert {name: each.tokens for name, each in inputs.items()} == {"qkv": 40, "out": 40}
    rows = x.flatten(0, 1)
    torch.testing.assert_close(inputs["qkv"].gram, 2 * rows.T @ rows)


@pytest.mark.parametrize(
    ("criterion", "pattern", "allocation"),
    [
        (magnitude, None, global_),
        (wanda, Unstructured("row"), None),
        (wanda, NM(2, 4), None),
        (sparsegpt(), NM(2, 4), None),
        (wanda, Unstructured("layer"), evopress(2, 2, step=0.25)),
    ],
)
def test_encoders_are_pruned_from_a_tokenizers_batches(criterion: object, pattern: object, allocation: object) -> None:
    for model in (bert(), bert(BertForSequenceClassification)):
        masks = prune(model, criterion, pattern, 0.5, allocation=allocation, batches=[BATCH])  # type: ignore[arg-type]
        masks.check(model)
        assert masks.sparsity == pytest.approx(0.5, abs=0.01)
        assert not any("embeddings" in name for name in masks)


@pytest.mark.parametrize("subset", ["norms", "mask_lora", "full"])
def test_distilled_embeddings_come_back_and_the_encoder_is_saved_as_it_came(subset: str, tmp_path: Path) -> None:
    dense, model = bert(), bert()
    masks = prune(model, wanda, None, 0.7, batches=[BATCH])
    loss = distilled_embeddings(dense)
    before = loss(model, BATCH).item()
    generator = torch.Generator().manual_seed(0)
    adaptation = adapt(model, [subset], masks=masks, views=find_layers(model), rank=2, alpha=4.0, generator=generator)
    optimizer = torch.optim.AdamW(adaptation.param_groups(3e-3), weight_decay=0.0)
    held = masks if subset == "full" else None
    train(model, lambda step: BATCH, optimizer, lambda step: 1.0, steps=20, loss=loss, masks=held)
    adaptation.merge_()
    masks.check(model)
    assert loss(model.eval(), BATCH).item() < 0.8 * before
    model.save_pretrained(tmp_path)
    back = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert torch.equal(embeddings(back, BATCH), embeddings(model, BATCH))


def test_embeddings_are_means_over_what_is_attended() -> None:
    model = bert()
    found = embeddings(model, BATCH)
    alone = embeddings(model, {"input_ids": BATCH["input_ids"][1:2, :4]})
    torch.testing.assert_close(found[1:2], alone)
    left = {key: each[1:2].roll(2, 1) for key, each in BATCH.items()}  # padded before its first token
    hidden = model(**left).last_hidden_state[:, 2]
    torch.testing.assert_close(embeddings(model, left, "first"), nn.functional.normalize(hidden, dim=-1))
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(4))


def test_a_classifier_of_texts_trains_on_its_own_loss_under_its_masks() -> None:
    model = bert(BertForSequenceClassification)
    labelled = {**BATCH, "labels": torch.tensor([0, 1, 2, 0])}
    masks = prune(model, sparsegpt(), NM(2, 4), batches=[BATCH])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trace = train(model, lambda step: labelled, optimizer, lambda step: 1.0, steps=8, loss=own_loss, masks=masks)
    assert trace.losses[-1] < trace.losses[0]
    pair, dense = (BATCH, labelled["labels"]), bert(BertForSequenceClassification)
    torch.testing.assert_close(classification_loss()(model, pair), model(**labelled).loss)
    loss = distilled_classification(dense, weight=1.0)
    assert float(loss(dense, pair).detach()) == pytest.approx(0, abs=1e-6)
    trace = train(model, lambda step: pair, optimizer, lambda step: 1.0, steps=8, loss=loss, masks=masks)
    assert trace.losses[-1] < trace.losses[0]
    masks.check(model)


def test_vision_transformers_are_pruned_and_distilled_like_any_classifier() -> None:
    dense, model = vit(), vit()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = (images, torch.tensor([0, 1, 2, 0]))
    masks = prune(model, wanda, None, 0.6, batches=[batch])
    assert "vit.embeddings.patch_embeddings.projection.weight" in masks
    for loss in (distilled_classification(dense), classification_loss()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        trace = train(model, lambda step: batch, optimizer, lambda step: 1.0, steps=4, loss=loss, masks=masks)
        assert trace.losses[-1] < trace.losses[0]
    masks.check(model)


def test_encoder_decoders_count_what_each_part_attends() -> None:
    model, batch = made_of("t5")
    views = find_layers(model)
    with torch.no_grad(), observe(model, views, gram=False) as inputs:
        model(**batch)
    seen = {view.name: inputs[view.name].tokens for view in views}
    assert seen["encoder.block.0.layer.0.SelfAttention.q"] == seen["decoder.block.0.layer.1.EncDecAttention.k"] == 18
    assert seen["decoder.block.0.layer.0.SelfAttention.q"] == seen["decoder.block.0.layer.1.EncDecAttention.q"] == 20
    masks = prune(model, sparsegpt(), NM(2, 4), batches=[batch])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trace = train(model, lambda step: batch, optimizer, lambda step: 1.0, steps=4, loss=own_loss, masks=masks)
    assert trace.losses[-1] < trace.losses[0]
    masks.check(model)
    with pytest.raises(ValueError, match=r"both receive \(4, 6\) positions"):
        prune(model, wanda, None, 0.5, batches=[{**BATCH, "labels": BATCH["input_ids"]}])


def test_a_mask_of_sound_holds_for_the_shorter_length_that_the_encoder_makes_of_it() -> None:
    model, batch = whisper()
    mask = torch.tensor([[1] * 16, [1] * 8 + [0] * 8, [1] * 5 + [0] * 11, [1] * 16])
    views, inputs = find_layers(model), []
    for place in (0, 2):  # with the convolutions, and where nobody asks for them
        with torch.no_grad(), observe(model, views[place:], gram=False) as found:
            model(**batch, attention_mask=mask)
        inputs.append({name: each.tokens for name, each in found.items()})
    assert inputs[0]["model.encoder.conv1"] == 45
    assert inputs[0]["model.encoder.conv2"] == inputs[0]["model.encoder.layers.0.fc1"] == 8 + 4 + 3 + 8
    cross = "model.decoder.layers.0.encoder_attn"
    assert inputs[0][f"{cross}.k_proj"] == 23
    assert inputs[0][f"{cross}.q_proj"] == inputs[0]["model.decoder.layers.0.fc1"] == 20
    assert inputs[1] == {name: count for name, count in inputs[0].items() if ".conv" not in name}


def whisper() -> tuple[Any, dict[str, Tensor]]:
    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    wide = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "vocab_size": 30, "num_mel_bins": 4}
    ids = {"max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 0, "decoder_start_token_id": 1}
    ids |= {"bos_token_id": 1, "eos_token_id": 2}
    model = WhisperForConditionalGeneration(WhisperConfig(**small, **wide, **ids))
    sound = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(0))
    return model.eval(), {"input_features": sound, "labels": BATCH["input_ids"][:, :5].contiguous()}


def texts(cls: type, config: Any) -> tuple[Any, dict[str, Tensor]]:
    return cls(config).eval(), {**BATCH, "labels": BATCH["input_ids"][:, :5].contiguous()}


def made_of(family: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    if family == "whisper":
        return whisper()
    if family == "t5":
        small = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        return texts(T5ForConditionalGeneration, T5Config(vocab_size=30, decoder_start_token_id=0, **small))
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "max_position_embeddings": 8}
    ids = {"vocab_size": 30, "pad_token_id": 0, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    cls, config = {"bart": (BartForConditionalGeneration, BartConfig), "marian": (MarianMTModel, MarianConfig)}[family]
    return texts(cls, config(**sizes, **ids))


@pytest.mark.parametrize("family", ["t5", "bart", "marian", "whisper"])
def test_the_encoder_is_pruned_and_then_the_decoder_on_what_it_says(family: str) -> None:
    (model, batch), (by_hand, _) = made_of(family), made_of(family)
    masks = prune_in_turn(model, wanda, None, 0.5, batches=[batch])
    views = observable(by_hand, find_layers(by_hand))
    cross = [view for view in views if ".encoder_attn." in view.name or ".EncDecAttention." in view.name]
    keys = [view for view in cross if view.name.endswith((".k_proj", ".k", ".v_proj", ".v"))]
    encoder = [view for view in views if ".encoder." in f".{view.name}"]
    stem = [[view] for view in encoder if ".conv" in view.name]  # of Whisper
    assert len(keys) == 2
    for part in (
        *stem,
        [view for view in encoder if [view] not in stem],
        keys,
    ):  # what reaches keys and values is the encoder's alone
        prune(by_hand, wanda, None, 0.5, views=part, batches=[batch])
    own, other = dict(model.named_parameters()), dict(by_hand.named_parameters())
    for view in (*encoder, *keys):
        assert torch.equal(own[view.parameter], other[view.parameter]), view.name
    masks.check(model)
    assert masks.sparsity == pytest.approx(0.5, abs=0.02)
    labels = batch["labels"].clone()
    labels[0, 2:] = -100
    found = target_perplexity(model, [{**batch, "labels": labels}, batch])
    losses = [model(**{**batch, "labels": each}).loss.double() for each in (labels, batch["labels"])]
    counts = [17, 20]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert found == pytest.approx(mean.exp().item(), rel=1e-5)


def own_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


LINES = [
    f"the {color} {thing} is {state}"
    for color in ("red", "blue", "green")
    for thing in ("fox", "cat", "dog", "owl")
    for state in ("good", "bad", "fine", "poor")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder of sentences, with a tokenizer of words and a pooling beside it."""
    out = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", *dict.fromkeys(word for line in LINES for word in line.split())]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(out)
    bert().save_pretrained(out)
    (out / "1_Pooling").mkdir()
    (out / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    return out


@pytest.fixture
def encoder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same under one name in every run, in an empty folder: jobs draw by what their recipes say, names included."""
    monkeypatch.chdir(tmp_path)
    Path("encoder").symlink_to(folder)
    return Path("encoder")


def recipe_of(folder: Path, out: Path, texts: Any, **changes: Any) -> EncoderRecipe:
    raw = {"model": str(folder), "texts": texts, "device": "cpu", "out": str(out), "train": {"batch_size": 8}}
    prune = {"criterion": "wanda", "sparsity": 0.6, "allocation": "uniform"}
    retrain = {"train": ["mask_lora", "norms", "biases"], "rank": 4, "steps": 30, "lr": 1e-2, "schedule": "linear"}
    return parse(raw | {"prune": prune, "retrain": retrain} | changes, Recipe, "test")  # type: ignore[return-value]


def test_an_encoder_of_sentences_is_pruned_and_distilled_by_a_recipe_and_saved_as_it_came(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("Of animals. " + ". ".join(LINES) + ".")
    recipe = recipe_of(folder, tmp_path / "run", {"source": str(path), "aim": "embeddings", "validation": 0.25})
    result = train_run(recipe)
    stages = result["stages"]
    assert stages["dense"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert stages["dense"]["spearman"] == pytest.approx(1, abs=1e-6)
    assert stages["pruned"]["cosine"] + 0.02 < result["cosine"] == stages["retrained"]["cosine"] < 1
    assert (result["texts"], result["measured_on"], result["sparsity"]) == (
        12,
        "validation",
        pytest.approx(0.6, abs=0.02),
    )
    out = tmp_path / "run"
    back, dense = (AutoModel.from_pretrained(each, add_pooling_layer=False).eval() for each in (out, folder))
    assert back.state_dict().keys() == dense.state_dict().keys()
    Masks.load(out / "masks.safetensors").check(back)
    for name in ("tokenizer.json", "1_Pooling/config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert evaluate_model(str(out), {})["cosine"] == stages["retrained"]
    held = read_sentences(str(path), AutoTokenizer.from_pretrained(out), "embeddings").split(0.25, 0)[1]
    mine, taught = (embeddings(model, held.batch()[0], "first").detach() for model in (back, dense))
    assert result["cosine"] == pytest.approx(float((mine * taught).sum(-1).mean()), abs=1e-5)


def labelled(path: Path, rows: list[tuple[Any, ...]], names: str = "text,label") -> str:
    path.write_text("\n".join([names, *(",".join(map(str, row)) for row in rows)]))
    return str(path)


def test_a_classifier_of_texts_is_trained_and_pruned_by_a_recipe(encoder: Path) -> None:
    Path("data").mkdir()
    rows = [(line, "praise" if line.endswith(("good", "fine")) else "blame") for line in LINES]
    labelled(Path("data/train.csv"), rows[:36])
    labelled(Path("data/test.csv"), rows[36:])
    texts = {"source": "data", "measure_on": "test"}
    prune = {"criterion": "sparsegpt", "pattern": "2:4", "exclude": ["classifier", "*pooler*"]}
    train = {"batch_size": 12, "epochs": 20, "lr": 1e-2}
    recipe = recipe_of(encoder, Path("run"), texts, train=train, prune=prune)
    result = train_run(recipe)
    assert result["stages"]["dense"]["top1"] == result["accuracy"] == 1
    assert result["worst_class"] == 1
    assert result["texts"] == 12
    back = AutoModelForSequenceClassification.from_pretrained("run").eval()
    assert back.config.id2label == {0: "blame", 1: "praise"}
    masks = Masks.load("run/masks.safetensors")
    masks.check(back)
    assert not any("classifier" in name or "pooler" in name for name in masks)
    # As it came again: names and numbers of its classes are its own, and so is what it says.
    numbers = [(line, int(name == "praise")) for line, name in rows[36:]]
    again = {"source": labelled(Path("numbers.csv"), numbers), "validation": 0.25}
    setting = Setting.of(recipe_of(Path("run"), Path("again"), again, retrain=None, prune=None))
    assert accuracy(setting.new_model(), setting.measured()).top1 == 1
    distilled = {"steps": 2, "lr": 1e-3, "distill": {"weight": 0.5}}
    found = train_run(recipe_of(Path("run"), Path("again"), again, retrain=distilled))
    assert found["stages"]["dense"]["top1"] == 1
    assert found["steps"] == 2
    with pytest.raises(ValueError, match="network that looks at images; compare sparsities"):
        sweep_of(Path("run"))


def test_an_encoder_in_16_bits_changes_no_default_of_other_threads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BertModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    set_to: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", set_to.append)
    with torch.device("meta"):
        empty = build_encoder(str(tmp_path), labels=["no", "yes"])
    whole = build_encoder(str(tmp_path), labels=["no", "yes"])
    assert {each.dtype for model in (empty, whole) for each in model.parameters()} == {torch.float32}
    assert set(set_to) <= {torch.float32}


def test_values_of_pairs_of_texts_are_ranked(encoder: Path) -> None:
    worth = {"good": 1.0, "fine": 0.6, "poor": 0.3, "bad": 0.0}
    short = [line.split(maxsplit=2)[2] for line in LINES]  # both fit into the eight positions of the encoder
    pairs = zip(short, short[5:] + short[:5], strict=True)
    rows = [(*pair, sum(worth[text.split()[-1]] for text in pair)) for pair in pairs]
    source = labelled(Path("pairs.csv"), rows, "one,other,score")
    texts = {"source": source, "aim": "values", "text": ["one", "other"], "label": "score", "validation": 0.25}
    retrain = {"steps": 20, "lr": 3e-3, "schedule": "linear", "distill": {"weight": 0.3}}
    train = {"batch_size": 12, "epochs": 30, "lr": 1e-2}
    changes = {"train": train, "retrain": retrain, "prune": {"criterion": "magnitude", "sparsity": 0.3}}
    result = train_run(recipe_of(encoder, Path("run"), texts, **changes))
    assert result["spearman"] > 0.8
    back = AutoModelForSequenceClassification.from_pretrained("run").eval()
    tokenizer = AutoTokenizer.from_pretrained("run")
    held = read_sentences(source, tokenizer, "values", ("one", "other"), label="score").split(0.25, 0)[1]
    keywords, labels = held.batch()
    values = back(**keywords).logits.flatten().detach().double()
    assert result["spearman"] == pytest.approx(spearmanr(values, labels).statistic)
    assert result["pearson"] == pytest.approx(pearsonr(values, labels.double()).statistic)
    assert result["loss"] == pytest.approx(float((values - labels).square().mean()), rel=1e-5)


def test_the_folder_says_how_embeddings_are_pooled(tmp_path: Path) -> None:
    assert pooling_of(str(tmp_path)) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    path = tmp_path / "1_Pooling" / "config.json"
    for way, found in (("mean_tokens", "mean"), ("cls_token", "first")):
        path.write_text(json.dumps({"pooling_mode_max_tokens": False, f"pooling_mode_{way}": True}))
        assert pooling_of(str(tmp_path)) == found
    path.write_text(json.dumps({"pooling_mode_lasttoken": True}))
    with pytest.raises(ValueError, match="pooling_mode_lasttoken; embeddings are known as"):
        pooling_of(str(tmp_path))


@pytest.mark.parametrize("x", [torch.tensor([1.0, 2, 2, 3, 3, 3, -1, 0]), torch.randn(50), torch.arange(9) % 4])
def test_spearman_is_scipys_with_ties_too(x: Tensor) -> None:
    y = torch.randn(len(x), generator=torch.Generator().manual_seed(1)).round()
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(x, x) == pytest.approx(1)


def test_texts_are_no_longer_than_places_that_are_counted_from_the_padding_on(folder: Path, tmp_path: Path) -> None:
    config = RobertaConfig(vocab_size=30, max_position_embeddings=8, pad_token_id=1, **SMALL)
    RobertaModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(" ".join([line] * 3) for line in LINES))
    texts = {"source": str(tmp_path / "texts.txt"), "aim": "embeddings"}
    with pytest.raises(ValueError, match=r"texts.length: 8 tokens are more than .* has places for; set 6"):
        Setting.of(recipe_of(tmp_path, tmp_path / "run", texts))
    setting = Setting.of(recipe_of(tmp_path, tmp_path / "run", texts | {"length": 6}))
    setting.new_model()(**next(setting.measured())[0])


def test_an_untrained_head_is_neither_measured_nor_a_teacher(folder: Path, tmp_path: Path) -> None:
    source = labelled(tmp_path / "texts.csv", [("one text", "no"), ("another text", "yes")] * 4)
    build_encoder(str(folder), labels=["bad", "good"]).save_pretrained(tmp_path / "bad")
    build_encoder(str(folder), labels=["yes", "no"]).save_pretrained(tmp_path / "own")
    for name in ("bad", "own"):
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / name)
    ways: dict[str, Any] = {"norms": {"train": ["norms"]}, "taught": {"distill": {"weight": 0.5}}, "all": {}}

    def setting(model: Path, way: str) -> Setting:
        retrain = {"steps": 2, "lr": 0.1, "schedule": "linear"} | ways[way]
        asked = {"source": source, "validation": 0.25}
        return Setting.of(recipe_of(model, tmp_path / "run", asked, train={"batch_size": 2}, retrain=retrain))

    for way in ("norms", "taught"):
        with pytest.raises(ValueError, match=r"train.epochs: 0 trains no 'bert.pooler.dense.weight'.*give epochs, or"):
            setting(folder, way)
    assert setting(folder, "all").sets.train.names == ("no", "yes")
    with pytest.raises(ValueError, match="the classes no, yes are not the model's, bad, good: call them alike"):
        setting(tmp_path / "bad", "all")
    assert setting(tmp_path / "own", "taught").sets.train.names == ("yes", "no")


def test_an_encoder_decoder_makes_no_embeddings(tmp_path: Path) -> None:
    sizes = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is an encoder-decoder, whose decoder asks for texts of its own"):
        build_encoder(str(tmp_path))


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ({"aim": "embeddings"}, {"train": {"epochs": 2}}, "train.epochs: embeddings have no labels"),
        ({"aim": "embeddings"}, {"retrain": {"steps": 2}}, "give retrain.lr"),
        ({}, {"soup": {"members": 2}, "retrain": {"steps": 2, "lr": 0.1}}, "soup: of networks that look at images"),
        (
            {},
            {"soup": {"members": 2, "also": ["greedy"]}, "retrain": {"steps": 2, "lr": 0.1}},
            r"soup: .*in Python prunus\.sms",
        ),
        ({}, {"model": "resnet18"}, "no folder of an encoder"),
        ({}, {"capture": True}, "lengths of their own"),
        ({"label": "said"}, {}, "no column 'said'"),
        ({"aim": "values"}, {}, "'a' is no number"),
        ({"label": "score"}, {}, "'1.0' is no class; give a name or a whole number, or take aim: values"),
        ({"aim": "values", "label": "same"}, {}, "the 1 values that are measured on are all 3, which no correlation"),
        ({"aim": "values"}, {"train": {"label_smoothing": 0.1}}, "train.label_smoothing: of classes; leave it out"),
        ({"measure_on": "test"}, {}, "split='test' was given"),
        ({}, {"train": {"batch_size": 9}}, "9 is more than the 3 training texts"),
    ],
)
def test_encoders_that_cannot_be_run_are_refused(
    folder: Path, tmp_path: Path, texts: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    rows = [("one text", "a", 3, 1.0), ("another text", "b", 3, 2.0)] * 2
    source = labelled(tmp_path / "texts.csv", rows, "text,label,same,score")
    asked = {"source": source, "validation": 0.25} | texts
    with pytest.raises(ValueError, match=message):
        Setting.of(recipe_of(folder, tmp_path / "run", asked, **({"train": {"batch_size": 1}} | changes)))
