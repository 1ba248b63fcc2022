"""Fakes with exactly known behaviour: a byte tokenizer, a table model, and a model that reads its whole KV pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from decoding.accept import Check, verify
from decoding.admit import Hosted
from decoding.core import EngineConfig
from decoding.engine import Engine
from decoding.hosting import Rows, SpanInput
from decoding.judge import JudgeHead
from decoding.sampling import Drawn
from decoding.state import Sequence as State
from decoding.text import TextModel

EOS = 256


def byte_tokenizer(extra: int = 0) -> PreTrainedTokenizerFast:
    """256 bytes, then `<eos>` (256), then `extra` more tokens `<x0>`, `<x1>`, ..."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of)
    vocab = {char: i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)
    fast.add_tokens([f"<x{i}>" for i in range(extra)])
    return fast


def _byte_of(char: str) -> int:
    from decoding.detokenizer import BYTE_OF_CHAR

    return BYTE_OF_CHAR[char]


class TableModel:
    """A runner whose next-token logits are a table, and whose "KV" holds the ids, so that a wrong block shows.

    table: [n, V] logits. The row is chosen by (sum of weight_i * id_i over the last `memory` ids) mod n; memory 1
    with n = V is a plain bigram table. The ids come from the pool, through the block table, never from the span.
    """

    def __init__(self, id: str, table: torch.Tensor, memory: int = 1, max_model_len: int = 512) -> None:
        self.id, self.table, self.memory, self.max_model_len = id, table.float(), memory, max_model_len
        self.width, self.parameters, self.cost = table.shape[1], table.numel(), 1.0
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.pool = torch.zeros(0)
        self.block_size = 0
        self.spans: list[list[SpanInput]] = []  # every forward's input, for tests that count
        self.broken = False
        self.asked_hidden = False

    def kv_bytes_per_block(self, block_size: int) -> int:
        return block_size

    def allocate(self, num_blocks: int, block_size: int) -> None:
        self.pool, self.block_size = torch.full((num_blocks, block_size), -1), block_size

    def be_batch_invariant(self, on: bool) -> None:
        """A table is."""

    def warm_up(self, compile_from: int = 0) -> bool:
        return False

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.pool[target] = self.pool[source]

    def row(self, context: Sequence[int]) -> torch.Tensor:
        """The logits [V] after `context`."""
        tail = list(context)[-self.memory :]
        return self.table[sum((3 * i + 1) * token for i, token in enumerate(reversed(tail))) % len(self.table)]

    def forward(self, spans: Sequence[SpanInput], want_hidden: bool = False) -> Rows:
        if self.broken:
            raise RuntimeError("broken on purpose")
        self.spans.append(list(spans))
        self.asked_hidden |= want_hidden
        written: set[tuple[int, int]] = set()
        for span in spans:
            for i, token in enumerate(span.token_ids):
                slot = ((span.start + i) // self.block_size, (span.start + i) % self.block_size)
                at = (span.blocks[slot[0]], slot[1])
                assert at not in written, "two spans of one tick write the same slot"
                written.add(at)
                self.pool[at] = token
        rows, hidden = [], []
        for span in spans:
            for offset in span.rows:
                end = span.start + offset + 1
                context = torch.cat([self.pool[b] for b in span.blocks])[:end].tolist()
                assert min(context) >= 0, "a position was read before it was computed"
                rows.append(self.row(context))
                hidden.append(self.hidden(context))
        empty = torch.zeros(0, self.width)
        return Rows(torch.stack(rows) if rows else empty, torch.stack(hidden) if hidden and want_hidden else None)

    def hidden(self, context: Sequence[int]) -> torch.Tensor:
        """The "hidden state" [1] at the last position of `context`: whether its id is even, as +1 or -1."""
        return torch.tensor([1.0 - 2.0 * (context[-1] % 2)])


def verify_rows(z: torch.Tensor, sequences: Sequence[State], generator: torch.Generator) -> list[Drawn]:
    """`verify` without drafts: one token per row of z [n, W], row i being sequence i's."""
    return [drawn[0] for drawn in verify(z, [Check(s, i) for i, s in enumerate(sequences)], generator)]


def random_table(seed: int, n: int = 101, width: int = 257, scale: float = 3.0) -> torch.Tensor:
    """[n, width] logits from a seed."""
    return scale * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def table_engine(
    models: dict[str, TableModel],
    config: EngineConfig | None = None,
    blocks: int | None = None,
    extra: int = 0,
    judges: dict[str, JudgeHead] | None = None,
) -> Engine:
    """An engine over table models that share the byte tokenizer; `blocks`: KV blocks of each."""
    text = byte_tokenizer(extra)
    config = config or EngineConfig(block_size=4)
    size = config.block_size
    return Engine(
        {
            id: Hosted(model, TextModel(id, text), None if blocks is None else blocks * model.kv_bytes_per_block(size))
            for id, model in models.items()
        },
        config,
        judges,
    )
