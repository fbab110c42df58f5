"""Masks in transformers' own Trainer, and a saved model on its way to the hub."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from prunus.adapt import mask_adapters
from prunus.masks import Masks
from prunus.save import push_to_hub, save_model
from prunus.train import HoldMasks
from tests.conftest import byte_tokenizer, tiny_llama
from tests.systems.test_average import some_masks


def _trainer(model: Any, folder: Path, *callbacks: Any) -> Trainer:
    rows = [{"input_ids": (ids := torch.arange(i, i + 12)), "labels": ids} for i in range(16)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=0.01,
        weight_decay=0.1,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))  # type: ignore[arg-type]


def _pruned() -> tuple[Any, Masks]:
    model = tiny_llama()
    masks = some_masks(model)
    masks.apply_(model)
    return model, masks


def test_trainer_keeps_the_zeros_and_logs_them(tmp_path: Path) -> None:
    model, masks = _pruned()
    name = next(iter(masks))
    before = model.get_parameter(name).detach().clone()
    trainer = _trainer(model, tmp_path, HoldMasks(masks))
    trainer.train()
    masks.check(model)
    assert not torch.equal(model.get_parameter(name), before)
    said = [row["sparsity"] for row in trainer.state.log_history if "loss" in row]
    assert said == pytest.approx([masks.sparsity] * 2, abs=1e-3)


def test_the_sparsity_is_that_of_tied_and_wrapped_weights_too(tmp_path: Path) -> None:
    model, masks = _pruned()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    head = Masks({"lm_head.weight": torch.arange(model.lm_head.weight.numel()).view_as(model.lm_head.weight) % 4 == 0})
    head.apply_(model)
    for each, whole in ((head, model), (masks, torch.nn.DataParallel(model))):
        logs: dict[str, Any] = {}
        HoldMasks(each).on_log(None, SimpleNamespace(log_history=[]), None, logs, model=whole)
        assert logs["sparsity"] == pytest.approx(each.sparsity, abs=1e-3)


def test_without_it_the_zeros_are_lost(tmp_path: Path) -> None:
    model, masks = _pruned()
    _trainer(model, tmp_path).train()
    with pytest.raises(ValueError, match="nonzero weights under its mask"):
        masks.check(model)


def test_trainer_trains_masked_adapters(tmp_path: Path) -> None:
    base, masks = _pruned()
    config = peft.LoraConfig(r=2, target_modules=[name.removesuffix(".weight") for name in masks])
    model = mask_adapters(peft.get_peft_model(base, config), masks)
    _trainer(model, tmp_path).train()
    merged = model.merge_and_unload()
    masks.check(merged)
    assert any(not torch.equal(merged.get_parameter(name), tiny_llama().get_parameter(name)) for name in masks)


def test_push_to_hub_sends_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = _pruned()
    save_model(model, byte_tokenizer(), tmp_path / "model", masks=masks, info={"model": "org/dense"})
    sent: list[Any] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            sent.append(token)

        def create_repo(self, *args: Any, **how: Any) -> None:
            sent.append((args, how))

        def upload_folder(self, **how: Any) -> Any:
            sent.append(how | {"files": sorted(path.name for path in Path(how["folder_path"]).iterdir())})
            return SimpleNamespace(repo_url="https://huggingface.co/me/sparse")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push_to_hub(tmp_path / "model", "me/sparse", private=True, token="t") == "https://huggingface.co/me/sparse"
    token, made, uploaded = sent
    assert (token, made) == ("t", (("me/sparse",), {"private": True, "exist_ok": True}))
    assert uploaded["repo_id"] == "me/sparse"
    assert {"README.md", "masks.safetensors", "model.safetensors", "prunus.json"} <= set(uploaded["files"])
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "base_model: org/dense\n" in card.split("---\n")[1]

    (tmp_path / "model" / "README.md").unlink()
    with pytest.raises(ValueError, match=r"has no README\.md"):
        push_to_hub(tmp_path / "model", "me/sparse")
    with (tmp_path / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"worm")
    with pytest.raises(ValueError, match="is damaged"):
        push_to_hub(tmp_path / "model", "me/sparse")
    assert len(sent) == 3
