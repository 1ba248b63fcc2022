"""Where a drafter begins: a model of the target's vocabulary, from a directory or as new as its shape says."""

import re
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

_SHAPE = re.compile(r"(\d+)x(\d+)")
_HEAD = 32  # the smallest head size that common servers accept: narrow models have few, wide heads


def read_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer in `directory`. Raises ValueError if it is a slow one or has no end token."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not isinstance(tokenizer.eos_token_id, int):
        raise ValueError(f"{directory} needs a fast tokenizer (tokenizer.json) with an eos_token")
    return tokenizer


def first_drafter(
    start: str, target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> tuple[PreTrainedModel, bool]:
    """The model to start from, fp32, and whether its weights are new.

    `start`: a model directory, or one with config.json alone (new weights), or a shape LAYERSxHIDDEN, say "1x64": a
    Llama with tied embeddings. A directory's tokenizer must be the target's, given here; a shape has no other.

    Raises ValueError if it is neither, or of another tokenizer.
    """
    directory = Path(start)
    if not directory.is_dir():
        shape = _SHAPE.fullmatch(start)
        if shape is None or not int(shape[1]) or not int(shape[2]) or int(shape[2]) % 16:
            raise ValueError(
                f"{start!r} is neither a directory nor a shape such as 1x64 (layers x hidden, a multiple of 16)"
            )
        return LlamaForCausalLM(_llama(int(shape[1]), int(shape[2]), target)), True
    if (directory / "tokenizer.json").is_file() and not same_tokenizer(read_tokenizer(directory), tokenizer):
        raise ValueError(f"{directory} has another tokenizer than the target; a drafter speaks the target's ids")
    if list(directory.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), False
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32), True


def same_tokenizer(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Whether both give the same ids to the same tokens and end with the same one."""
    return bool(one.get_vocab() == other.get_vocab() and one.eos_token_id == other.eos_token_id)


def _llama(layers: int, hidden: int, target: PreTrainedModel) -> LlamaConfig:
    known = target.config
    heads = -(-hidden // _HEAD)
    return LlamaConfig(
        vocab_size=known.vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=_HEAD,
        max_position_embeddings=known.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id,
        pad_token_id=known.pad_token_id,
    )
