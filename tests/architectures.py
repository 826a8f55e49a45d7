"""Tiny models of many architectures, built from configs: four blocks of width 32 with large random weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from models import VOCABULARY

_SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **{"num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "sliding_window": 8, "chunk_size": 8},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **{"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    **{"num_heads": 8, "expand": 2, "conv_kernel": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}

DENSE = (
    *(
        "llama",
        "mistral",
        "ministral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "opt",
        "gpt2",
    ),
    *("gptj", "gpt_neox", "gpt_bigcode", "bloom", "falcon", "mpt", "olmo", "olmo2", "olmo3", "cohere", "cohere2"),
    *("smollm3", "granite", "stablelm", "starcoder2", "glm", "glm4", "exaone4", "nemotron", "persimmon", "codegen"),
    *("helium", "seed_oss", "bitnet", "arcee", "modernbert-decoder", "biogpt", "diffllama", "hunyuan_v1_dense"),
    *("mamba", "mamba2", "bamba", "lfm2", "recurrent_gemma", "qwen3_5_text"),
)
EXPERTS = (
    *(
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "deepseek_v2",
        "deepseek_v3",
        "gpt_oss",
        "llama4_text",
        "olmoe",
    ),
    *("granitemoe", "jamba", "glm4_moe", "phimoe", "minimax", "flex_olmo", "ernie4_5_moe", "dots1", "jetmoe"),
)


def tiny(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of the type `kind` in evaluation mode; every size that its config knows is small."""
    config_class = CONFIG_MAPPING[kind]
    known = set(inspect.signature(config_class.__init__).parameters)
    known |= {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    aliases = getattr(config_class, "attribute_map", None) or {}
    options = {k: v for k, v in _SIZES.items() if k in known and not (k in aliases and aliases[k] in _SIZES)}
    if "kv_lora_rank" in options:
        options.pop("head_dim", None)
        options["num_key_value_heads"] = 4
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**(options | changes)), experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    return model.eval()


def saved(kind: str, folder: Path, **changes: Any) -> Path:
    """A tiny model of the type `kind`, saved into `folder`."""
    tiny(kind, **changes).save_pretrained(folder)
    return folder
