"""Every causal language model that transformers knows, tiny and random, through Prunus, each in a process of its own.

    find -> Wanda 50 % -> SparseGPT 2:4 -> MaskLoRA, two steps, merge -> save -> load: equal bits
                          └─ the same, streamed from the saved folder: equal bits

`python -m tests.families [--workers N] [NAME ...] > rows.jsonl` prints a line for each, in about ten minutes where two
cores have nothing else to do, and `python -m tests.families --table rows.jsonl` writes them into docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

SIZES = {  # value -> the config keys that get it
    128: "vocab_size max_position_embeddings n_positions n_ctx vocab_size_per_layer_input image_size",
    96: "intermediate_size intermediate_size_mlp ffn_dim d_ff n_inner ffn_hidden_size dff dim_ff encoder_ffn_dim "
    "decoder_ffn_dim",
    64: "hidden_size d_model n_embd dim embed_dim emb_dim word_embed_proj_dim lru_width",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size "
    "moe_shared_expert_intermediate_size patch_size",
    16: "head_dim attention_head_size d_head linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head "
    "mamba_head_dim attention_chunk_size kv_lora_rank q_lora_rank sliding_window attention_window_size "
    "hidden_size_per_layer_input index_head_dim",
    8: "qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_d_state time_step_rank mamba_n_heads index_topk",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_attention_heads n_head "
    "n_heads num_heads decoder_attention_heads encoder_attention_heads linear_num_heads linear_num_value_heads "
    "num_local_experts num_experts n_routed_experts moe_num_experts laurel_rank index_n_heads",
    3: "moe_layer_end_index",
    2: "num_key_value_heads moe_topk moe_k num_experts_per_tok num_experts_per_token linear_num_key_heads mamba_expand "
    "full_attention_interval altup_num_inputs num_kv_shared_layers eos_token_id",
    1: "n_shared_experts first_k_dense_replace n_group topk_group bos_token_id moe_layer_start_index",
    0: "pad_token_id",
}
WORDS = {key: value for value, keys in SIZES.items() for key in keys.split()} | {"rope_theta": 10000.0}
BEGIN, END = "<!-- table: python -m tests.families --table -->", "<!-- end of the table -->"
LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")  # a kind for each layer
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OWN: dict[str, dict[str, Any]] = {  # what a family needs besides
    "BailingHybridConfig": {
        "head_dim": 8, "linear_head_dim": 16, "linear_num_heads": 4, "num_expert_group": 1, "layer_group_size": 2,
    },
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"encoder_hash_byte_group_vocab": 100},
    "CodeGenConfig": {"rotary_dim": 8},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "Dots3NoteTextConfig": {"per_layer_config": {}, "shared_experts_intermediate_size": 32},
    "FalconH1Config": {"mamba_d_ssm": 64, "mamba_d_head": 8},
    "GPTJConfig": {"rotary_dim": 8},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "GraniteMoeHybridConfig": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "shared_intermediate_size": 64,
    },
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "LongcatFlashConfig": {"expert_ffn_hidden_size": 32, "zero_expert_num": 2, "head_dim": 8, "num_layers": 2},
    "Llama4TextConfig": {"interleave_moe_layer_step": 2},
    "Mamba2Config": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "GitVisionConfig": {"image_size": 32},
    "MllamaTextConfig": {"cross_attention_layers": [1]},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 100, "ple_embed_dim": 64,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
    },
    "RemBertConfig": {"input_embedding_size": 32, "output_embedding_size": 32},
    "ReformerConfig": {
        "is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"], "feed_forward_size": 96,
    },
    "XmodConfig": {"default_language": "en_XX"},
    "ZayaConfig": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "xLSTMConfig": {"embedding_dim": 64, "num_blocks": 4, "qk_dim_factor": 1.0},
}  # fmt: skip


def small(cls: type, own: dict[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of a config class, and of the configs inside it, that make a tiny model."""
    default = cls()
    said, renamed = default.to_dict(), getattr(cls, "attribute_map", {})
    found = {key: value for key, value in WORDS.items() if key in said and key not in renamed}
    if "qk_rope_head_dim" in said:  # the width that is turned; a head's is made of two
        found |= {"head_dim": 8} if "head_dim" in said and said["head_dim"] == said["qk_rope_head_dim"] else {}
    if said.get("num_key_value_heads") == said.get("num_attention_heads", said.get("num_heads")):
        found |= {"num_key_value_heads": 4} if "num_key_value_heads" in found else {}
    for key in LISTS:
        kinds = list(dict.fromkeys(said.get(key) or []))
        if kinds:
            found[key] = (kinds * 4)[:4]
    for key in getattr(cls, "sub_configs", {}):
        inner = getattr(default, key, None)
        if inner is not None:
            found[key] = small(type(inner), OWN.get(type(inner).__name__)) | {"model_type": inner.model_type}
    return found | (OWN.get(cls.__name__, {}) if own is None else own)


def config_of(name: str) -> Any:
    """The tiny config of a family."""
    import transformers as tf

    cls = getattr(tf, name)
    said = small(cls)
    try:
        return cls(**said)
    except Exception:
        return cls(**{key: value for key, value in said.items() if key not in LISTS})


def try_(name: str) -> dict[str, Any]:
    """What Prunus makes of a family: a row of the table."""
    import torch
    import transformers as tf

    row: dict[str, Any] = {"config": name, "stage": "config"}
    try:
        torch.manual_seed(0)
        config = config_of(name)
        row["stage"] = "build"
        model: Any = tf.AutoModelForCausalLM.from_config(config).float().eval()
        row["parameters"] = sum(each.numel() for each in model.parameters())
        if row["parameters"] > 20e6:
            raise RuntimeError(f"{row['parameters']} parameters are not tiny")
        tokens = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(1))
        row["stage"] = "own forward"
        with torch.no_grad():
            model(tokens)
    except Exception as error:
        return row | {"result": "not built", "error": said(error), "where": place(error, "transformers")}
    before = {name: each.clone() for name, each in model.state_dict().items()}
    try:
        whole_(row, model, tokens)
    except Exception as error:
        same = all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
        refused = isinstance(error, ValueError) and same and row["stage"] in ("find", "wanda")
        result = "refused" if refused else "fails"
        return row | {"result": result, "error": said(error), "where": place(error, "prunus")}
    return row


def whole_(row: dict[str, Any], model: Any, tokens: Any) -> None:
    """The whole way of one model, with the stage that is reached and what is measured in `row`."""
    import torch

    import prunus
    from prunus.adapt import adapt

    row["stage"] = "find"
    row["blocks"] = len(prunus.find_blocks(model))
    views = prunus.find_layers(model)
    row["share"] = round(sum(view.shape[0] * view.shape[1] for view in views) / row["parameters"], 3)
    with tempfile.TemporaryDirectory() as folder:
        dense = f"{folder}/dense"
        model.save_pretrained(dense)
        row["stage"] = "wanda"
        prunus.stream(model, prunus.wanda, None, 0.5, tokens=tokens, batch_size=2)
        row["stage"] = "sparsegpt"
        got = prunus.stream(model, prunus.sparsegpt(), prunus.NM(2, 4), tokens=tokens, batch_size=2)
        masks = got.masks
        row["fallback"] = sum(len(each.fallback) for each in got.reports)
        row["stage"] = "adapt"
        taken = [view for view in prunus.find_layers(model) if view.parameter in masks]
        generator = torch.Generator().manual_seed(0)
        adaptation = adapt(model, ["mask_lora"], masks=masks, views=taken, rank=2, alpha=4.0, generator=generator)
        row["stage"] = "train"
        optimizer = torch.optim.AdamW(adaptation.param_groups(1e-3, {}), weight_decay=0.0)
        lr = prunus.linear_warmup_decay(2, 0.1)
        prunus.train(model, lambda step: tokens, optimizer, lr, steps=2, loss=prunus.next_token_loss)
        row["stage"] = "merge"
        model.eval()
        adaptation.merge_()
        masks.check(model)
        row["stage"] = "perplexity"
        row["perplexity"] = prunus.perplexity(model, tokens.flatten(), window=24, batch_size=2)
        row["stage"] = "save"
        prunus.save_model(model, None, f"{folder}/sparse", masks=masks, info={"pattern": "2:4"})
        row["stage"] = "load"
        back = type(model).from_pretrained(f"{folder}/sparse").eval()
        with torch.no_grad():
            same = torch.equal(model(tokens).logits, back(tokens).logits)
        row["result"] = "works" if same else "reload differs"
        if same:
            row["streamed"] = streamed(model, Path(dense), tokens)
    row["stage"] = ""


def streamed(loaded: Any, dense: Path, tokens: Any) -> str:
    """Whether pruning from the folder, a block at a time, has the bits of pruning in memory; or why it does not."""
    import torch
    import transformers as tf

    import prunus
    from prunus.checkpoint import empty_model, read_checkpoint
    from prunus.stream import Shards, Work

    how: dict[str, Any] = {"tokens": tokens, "batch_size": 2}
    try:
        config = tf.AutoConfig.from_pretrained(dense)
        empty = empty_model(config, torch.float32)
        source = Shards.of(empty, read_checkpoint(dense))
        with tempfile.TemporaryDirectory() as folder:
            work = Work(Path(folder), "key").open()
            made = prunus.stream(empty, prunus.wanda, None, 0.5, source=source, work=work, device="cpu", **how)
            model = type(loaded).from_pretrained(dense).eval()
            own = prunus.stream(model, prunus.wanda, None, 0.5, **how)
            if any(not torch.equal(own.masks[key], mask) for key, mask in made.masks.items()):
                return "masks differ"
            for name in prunus.find_blocks(model):
                for key, tensor in work.tensors(name).items():
                    if not torch.equal(model.get_submodule(name).state_dict()[key], tensor):
                        return f"{name}.{key} differs"
    except Exception as error:
        return said(error) + " @ " + place(error, "prunus")
    return "works"


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def place(error: BaseException, package: str) -> str:
    frames = [each for each in traceback.extract_tb(error.__traceback__) if package in each.filename]
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""


def say(row: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def names() -> list[str]:
    """The config classes of all causal language models."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as CONFIGS
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return sorted({CONFIGS[key] for key in NAMES if key in CONFIGS})


def _child(name: str, sender: Any) -> None:
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    warnings.simplefilter("ignore")
    started = time.time()
    row = try_(name)
    sender.send(row | {"seconds": round(time.time() - started, 1)})


def run(todo: list[str], *, workers: int, limit: float = 900.0) -> list[dict[str, Any]]:
    """A row for each config, from processes that are forked once everything is imported."""
    import torch
    import transformers  # noqa: F401

    import prunus
    import prunus.adapt
    import prunus.checkpoint  # noqa: F401

    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    waiting, rows, busy = list(todo), {}, {}
    while waiting or busy:
        while waiting and len(busy) < workers:
            name = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, sender))
            process.start()
            sender.close()
            busy[receiver] = (name, process, time.time())
        for receiver in wait(list(busy), timeout=1.0):
            name, process, _ = busy.pop(receiver)
            try:
                rows[name] = receiver.recv()
            except EOFError:
                rows[name] = {"config": name, "result": "crashed"}
            process.join()
            say(rows[name])
        for receiver, (name, process, started) in list(busy.items()):
            if time.time() - started > limit:
                process.kill()
                process.join()
                del busy[receiver]
                rows[name] = {"config": name, "result": "timeout"}
                say(rows[name])
    return [rows[name] for name in todo]


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Put the rows where the document has its table."""
    import transformers

    works = [row for row in rows if row["result"] == "works"]
    both = [row for row in works if row["streamed"] == "works"]
    built = [row for row in rows if row["result"] != "not built"]
    counts = (
        f"Of {len(rows)} causal language models of transformers {transformers.__version__}, {len(built)} could be made "
        f"tiny; {len(works)} work wholly in memory, {len(both)} of them streamed with equal bits as well."
    )
    lines = [counts, "", "| model | in memory | streamed | why not |", "|---|---|---|---|"]
    for row in rows:
        reason = row.get("error", "") if row["result"] != "works" else row["streamed"].replace("works", "")
        why = reason.partition(": ")[2].partition("; ")[0].replace("|", "\\|")[:160] if reason else ""
        cells = (row["config"].removesuffix("Config"), row["result"], row.get("streamed", "")[:5], why)
        lines.append("| " + " | ".join(cells) + " |")
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(before + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.table is None:
        run(options.names or names(), workers=options.workers)
    else:
        read = {
            row["config"]: row for row in map(json.loads, options.table.read_text().splitlines())
        }  # the last of each
        write_table(list(read.values()), Path(__file__).parents[1] / "docs" / "models.md")
