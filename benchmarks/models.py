"""Random models for benchmarks: real sizes, no downloads. Times do not depend on the values of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Size:
    """Llama dimensions."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int = 32_000


SIZES = {
    "330M": Size(24, 1024, 2816, 16, 4),
    "30M": Size(6, 384, 1024, 6, 2),
    "tiny": Size(2, 64, 128, 4, 2, 512),
}


def make_model(path: Path, size: Size, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a random Llama with a byte-level tokenizer to `path` (unless it is there) and return it."""
    if (path / "model.safetensors").exists():
        return path
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    make_tokenizer(size.vocab).save_pretrained(path)
    return path


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """256 bytes, `<eos>`, and placeholders up to `vocab` ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {char: i for i, char in enumerate(alphabet)} | {"<eos>": 256}
    ids |= {f"<x{i}>": i for i in range(257, vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)
