"""Models of several towers: the one that text passes is pruned and retrained, every other tensor keeps its bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file

from prunus.language.single import compress
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.prune import prune
from prunus.recipe import LanguageRecipe, parse
from prunus.score import observe, wanda
from tests.conftest import VOCABULARY, byte_tokenizer

TEXT = {
    "vocab_size": VOCABULARY + 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
EYE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}


def llava() -> Any:
    text, eye = tf.LlamaConfig(**TEXT), tf.CLIPVisionConfig(**EYE, patch_size=8)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=text, vision_config=eye, image_token_index=VOCABULARY + 1)
    )


def test_what_text_does_not_pass_keeps_its_bytes_in_memory_and_streamed(text_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llava()
    source = tmp_path / "dense"
    model.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    dense, made = load_file(source / "model.safetensors"), []
    for streaming in (False, True):
        out = tmp_path / f"run-{streaming}"
        given = {
            "model": str(source), "device": "cpu", "prune": {"criterion": "wanda", "sparsity": 0.5},
            "calibrate": {"data": str(text_file), "samples": 4, "length": 32, "batch_size": 2},
            "evaluate": {"data": {"text": str(text_file)}, "window": 32, "batch_size": 128},
            "streaming": streaming, "out": str(out),
            "retrain": {"data": str(text_file), "train": ["mask_lora"], "steps": 2, "batch_size": 2, "length": 32},
        }  # fmt: skip
        compress(parse(given, LanguageRecipe, "test"))
        saved, masks = load_file(out / "model" / "model.safetensors"), Masks.load(out / "model" / "masks.safetensors")
        assert all("language_model" in name for name in masks)
        changed = {name for name in dense if not torch.equal(dense[name], saved[name])}
        assert dense.keys() == saved.keys()
        assert len(changed) == len(masks) == 14
        assert not any("vision" in name or "projector" in name for name in changed)
        for name in ("config.json", "preprocessor_config.json"):
            assert (out / "model" / name).read_bytes() == (source / name).read_bytes()
        assert json.loads((out / "result.json").read_text())["perplexity"]["merged"]
        made.append(saved)
    assert all(torch.equal(made[0][name], made[1][name]) for name in dense)
    back = type(model).from_pretrained(tmp_path / "run-True" / "model")
    masks.check(back)


def test_the_vision_tower_is_pruned_where_images_calibrate() -> None:
    torch.manual_seed(0)
    model = llava().eval()
    tokens = torch.randint(0, VOCABULARY, (2, 12))
    tokens[:, 2:6] = VOCABULARY + 1  # the places of the four patches of each image
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": torch.randn(2, 3, 16, 16)}
    views = find_layers(model, include=["*vision*"])
    dense, seen = {name: each.clone() for name, each in model.state_dict().items()}, []
    first = next(view for view in views if view.name.endswith("layers.0.self_attn.q_proj"))
    hook = model.get_submodule(first.name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    masks = prune(model, wanda, None, 0.5, views=views, batches=[batch])
    changed = {name for name, each in model.state_dict().items() if not torch.equal(each, dense[name])}
    assert changed == set(masks) == {view.parameter for view in views}
    weight = dense[first.parameter]
    score = weight.abs() * seen[0].flatten(0, 1).norm(dim=0)
    kept = score.argsort(dim=1, descending=True)[:, : weight.shape[1] // 2]
    assert torch.equal(masks[first.parameter], torch.zeros_like(weight, dtype=torch.bool).scatter_(1, kept, value=True))


def test_rows_of_pictures_are_never_taken_for_masked_text() -> None:
    torch.manual_seed(0)
    model = llava().eval()
    eye = model.model.vision_tower.config
    patches = (eye.image_size // eye.patch_size) ** 2 + 1  # and a class token
    tokens = torch.full((2, patches), 5)
    tokens[:, :4] = VOCABULARY + 1
    mask = torch.ones_like(tokens)
    mask[1, -1] = 0  # a text of exactly as many tokens as there are patches, one of them masked
    views = find_layers(model, include=["*"], exclude=["*patch_embedding"])
    with torch.no_grad(), observe(model, views, gram=False) as inputs:
        model(input_ids=tokens, attention_mask=mask, pixel_values=torch.randn(2, 3, 16, 16))
    seen = {name: each.tokens for name, each in inputs.items()}
    assert {each for name, each in seen.items() if "vision" in name} == {2 * patches}
    assert {each for name, each in seen.items() if "projector" in name} == {2 * (patches - 1)}
    assert {each for name, each in seen.items() if "language" in name or "lm_head" in name} == {2 * patches - 1}
