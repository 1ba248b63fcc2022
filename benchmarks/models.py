"""Random models for benchmarks: real sizes, no downloads. Times do not depend on the values of the weights.

`make_model` writes one to a directory, `build` makes one on a device. A model that was `taught` a rule says which token
follows which with a wide margin, whatever rounding does, so that its texts are known and so is how often a drafter that
was taught a `spoiled` rule is right.
"""

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
    "8B": Size(32, 4096, 14336, 32, 8, 128_256),  # Llama-3.1-8B
    "1B": Size(16, 2048, 8192, 32, 8, 128_256),  # Llama-3.2-1B, the head untied: a step reads as much
    "0.1B": Size(12, 512, 1408, 8, 2, 128_256),
}
RULE = 3.0  # standard deviation of a taught model's embedding, against which its layers' sums are small enough


def make_model(path: Path, size: Size, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a random Llama with a byte-level tokenizer to `path` (unless it is there) and return it."""
    if (path / "model.safetensors").exists():
        return path
    torch.manual_seed(seed)
    LlamaForCausalLM(config_of(size)).to(dtype).save_pretrained(path)
    make_tokenizer(size.vocab).save_pretrained(path)
    return path


def config_of(size: Size, length: int = 2048) -> LlamaConfig:
    """A Llama of this size with contexts of up to `length` tokens."""
    return LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )


@torch.no_grad()
def build(size: Size, seed: int, device: torch.device, rule: torch.Tensor | None = None) -> LlamaForCausalLM:
    """A random bf16 Llama made on `device`, taught `rule` if there is one; the same for a seed and a device."""
    torch.manual_seed(seed)
    with device:
        model = LlamaForCausalLM._from_config(config_of(size, 8192), dtype=torch.bfloat16)
    model.eval().requires_grad_(False)
    if rule is not None:
        embedding = model.get_input_embeddings().weight.normal_(0.0, RULE)
        model.get_output_embeddings().weight[rule.to(device)] = embedding / RULE
    return model


def make_rule(vocab: int, seed: int) -> torch.Tensor:
    """Which token follows each: [vocab] int64, one cycle through all, so that no text repeats itself."""
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    rule = torch.empty(vocab, dtype=torch.int64)
    rule[order] = order.roll(-1)
    return rule


def spoiled(rule: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """`rule` with this share of the tokens followed by wrong ones, at random places."""
    order = torch.randperm(len(rule), generator=torch.Generator().manual_seed(seed))
    wrong = order[: round(share * len(rule))]
    made = rule.clone()
    made[wrong] = rule[wrong.roll(1)]
    return made


def text_of(rule: torch.Tensor, last: int, length: int) -> list[int]:
    """The tokens that follow `last`."""
    found: list[int] = []
    for _ in range(length):
        last = int(rule[last])
        found.append(last)
    return found


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """256 bytes, `<eos>`, and placeholders up to `vocab` ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {char: i for i, char in enumerate(alphabet)} | {"<eos>": 256}
    ids |= {f"<x{i}>": i for i in range(257, vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)
