"""Encoders of text and images: padded batches, ways to prune in memory, distilled embeddings, saved as they came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from prunus.adapt import adapt
from prunus.layers import find_layers
from prunus.measure import target_perplexity
from prunus.patterns import NM, Unstructured
from prunus.prune import prune, prune_in_turn
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
