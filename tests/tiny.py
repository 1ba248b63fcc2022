"""Builders of tiny random models, one entry per architecture; `SERVED` are those that must be served exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from decoding.selfcheck import randomize

VOCAB = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
HEADS_OF_8 = {"head_dim": 8}
SLIDING = {"sliding_window": 8}
ALTERNATE = SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 64,
}

SERVED: dict[str, dict[str, Any]] = {
    "afmoe": MOE | ALTERNATE | {"head_dim": 8, "num_dense_layers": 1},
    "apertus": {},
    "arcee": HEADS_OF_8,
    "bitnet": {},
    "cohere": {},
    "cohere2": ALTERNATE,
    "deepseek_v2": LATENT | ROUTED | MOE,
    "deepseek_v3": LATENT | ROUTED | MOE,
    "dots1": ROUTED | MOE | {"head_dim": 8},
    "ernie4_5": HEADS_OF_8,
    "exaone4": ALTERNATE,
    "flex_olmo": MOE,
    "gemma": HEADS_OF_8,
    "gemma2": ALTERNATE | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": ALTERNATE | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "glm": HEADS_OF_8,
    "glm4": HEADS_OF_8,
    "glm4_moe": ROUTED | MOE | {"head_dim": 8},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": MOE | ALTERNATE | {"head_dim": 8},
    "granite": {},
    "granitemoe": MOE,
    "helium": HEADS_OF_8,
    "hunyuan_v1_dense": HEADS_OF_8,
    "jais2": HEADS_OF_8,
    "jetmoe": MOE | {"kv_channels": 8},
    "llama": {},
    "llama4_text": MOE
    | {
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1],
        "moe_layers": [1],
    },
    "mimo_v2_flash": MOE | {"sliding_window": 8, "head_dim": 8, "v_head_dim": 12},
    "minicpm3": LATENT,
    "minimax_m2": MOE | {"head_dim": 8},
    "ministral": ALTERNATE | {"head_dim": 8},
    "mistral": SLIDING | {"head_dim": 8},
    "mixtral": MOE | SLIDING,
    "nanochat": {},
    "nemotron": HEADS_OF_8,
    "olmo": {},
    "olmo2": {},
    "olmo3": ALTERNATE,
    "olmoe": MOE,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": SLIDING,
    "qwen2": {},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 24},
    "qwen3": HEADS_OF_8,
    "qwen3_moe": MOE | {"head_dim": 8},
    "seed_oss": HEADS_OF_8,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {},
    "starcoder2": SLIDING,
    "vaultgemma": ALTERNATE | {"head_dim": 8, "query_pre_attn_scalar": 8},
}


def tiny_config(arch: str, **changes: Any) -> Any:
    """The configuration of a tiny model of type `arch`; `changes` go on top."""
    return AutoConfig.for_model(arch, **(COMMON | SERVED.get(arch, {}) | changes))


def tiny_model(arch: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny fp32 model with random weights of a scale at which greedy near-ties are rare."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(arch, **changes), attn_implementation="eager")
    return randomize(model.eval().float(), seed)


def tiny_directory(arch: str, path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a tiny model of type `arch` under `path` as safetensors; returns `path`."""
    tiny_model(arch, seed, **changes).to(dtype).save_pretrained(path)
    return path
