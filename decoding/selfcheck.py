"""Checks a hosted model against Hugging Face's own forward before it serves anyone.

Two parts. The *tiny twin* has the same class and a shrunk configuration in fp32: ragged chunks, a fork and a
roll-back run over it, with windows and chunks short enough to matter. The *real weights* run two short prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from decoding.attention import Tensor
from decoding.core import ModelLoadError
from decoding.heads import HeadModel, own_classifier
from decoding.hosting import SpanInput
from decoding.runner import Runner

TWIN_TOKENS = 40
TWIN_BLOCK = 4
SHORT = 8  # the twin's window and chunk
MAX_TWIN_LAYERS = 12
FORK = 14  # positions the twin's two tracks share: not a multiple of the block

# Sizes that a smaller twin may have without becoming another model. Values are upper bounds.
SMALL = {
    "vocab_size": 128,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "mlp_dim": 64,
    "ffn_hidden_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "original_max_position_embeddings": 128,
    "max_window_layers": 2,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
HEAD_DIM = 32
NARROW = {  # latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}


def layer_kinds(config: Any, layers: int) -> list[tuple[Any, ...]]:
    """What distinguishes each layer: the entries of every per-layer list of the configuration."""
    lists = [v for k, v in sorted(config.to_dict().items()) if isinstance(v, list | tuple) and len(v) == layers]
    return list(zip(*lists)) if lists else [()] * layers


def kept_layers(config: Any, layers: int) -> list[int]:
    """Indices of the first two layers of each kind, in order, at least four in all where the model has them."""
    seen: dict[str, int] = {}
    kept: list[int] = []
    for index, kind in enumerate(layer_kinds(config, layers)):
        seen[repr(kind)] = seen.get(repr(kind), 0) + 1
        if seen[repr(kind)] <= 2 or index < 3:
            kept.append(index)
    return kept[:MAX_TWIN_LAYERS]


def shrink(config: Any, level: int = 0) -> Any:
    """A copy of `config` with few layers, short windows and chunks; level 0 also narrow, level 1 also small.

    The more is shrunk the quicker the check, but some configurations tie sizes together: see `make_twin`.
    """
    small = copy.deepcopy(config)
    layers = int(small.num_hidden_layers)
    kept = kept_layers(small, layers)
    for name, value in small.to_dict().items():
        if isinstance(value, list | tuple) and len(value) == layers and layers > 1:
            setattr(small, name, [value[i] for i in kept])
    small.num_hidden_layers = len(kept)
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(small, name, None):
            setattr(small, name, SHORT)
    if level <= 1:
        _bound(small, SMALL)
    if level == 0:
        _narrow(small)
    if (small.pad_token_id or 0) >= small.vocab_size:
        small.pad_token_id = 0
    small.dtype = torch.float32
    return small


def _bound(config: Any, bounds: Mapping[str, int]) -> None:
    for name, bound in bounds.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > bound:
            setattr(config, name, bound)


def _narrow(config: Any) -> None:
    """Fewer and smaller heads, keeping whether query heads share KV heads; the hidden size follows."""
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    shared = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None)
    kv_heads = min(shared, 2)
    few = kv_heads * min(heads // shared, 2)
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = kv_heads
    config.num_attention_heads = few
    dim = min(head_dim or hidden // heads, HEAD_DIM)
    if head_dim:
        config.head_dim = dim
    config.hidden_size = few * dim
    _bound(config, NARROW)
    if getattr(config, "qk_rope_head_dim", None):
        config.head_dim = config.qk_rope_head_dim  # latent attention: the part that is rotated
    if getattr(config, "word_embed_proj_dim", None) == hidden:
        config.word_embed_proj_dim = few * dim


def make_twin(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A tiny fp32 model of class `kind` with random weights. Raises ModelLoadError when none can be built."""
    failure: Exception | None = None
    for level in (0, 1, 2):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                twin: PreTrainedModel = kind._from_config(shrink(config, level), attn_implementation="eager")
            randomize(twin.float().eval())
            own_logits(twin, torch.ones(1, 2, dtype=torch.int64))
            return twin
        except Exception as error:
            failure = error
    raise ModelLoadError(f"{config.model_type}: no tiny twin could be built to check it with: {failure}")


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Draw weights of a scale at which every part of the model matters; in place.

    Transformers' own initialisation is so small that attention is nearly uniform and mistakes hide.
    """
    noise = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=noise)
        if parameter.dim() >= 2:
            parameter.copy_(drawn * 1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(drawn * 0.1)
    return model


@torch.inference_mode()
def own_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Hugging Face's own forward with its eager attention, before a runner takes the model over.

    ids [n, length] -> logits [n, length, width].
    """
    model.set_attn_implementation("eager")
    logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits
    return logits


def check_twin(
    kind: type[PreTrainedModel],
    config: Any,
    kernels: bool | Literal["triton"] = True,
    device: torch.device | str = "cpu",
) -> None:
    """Ragged chunks of two tracks that share a prefix, with a fork and a roll-back, against HF's own forward.

    Raises ModelLoadError on a mismatch. The tolerance, 1e-4 of the largest logit, is ten times what fp32 rounding
    was seen to make of it over all architectures, and a hundredth of what one wrong key changes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small products are slower on many
    try:
        twin = make_twin(kind, config).to(device)
        noise = torch.Generator().manual_seed(1)
        ids = torch.randint(1, int(twin.config.vocab_size), (2, TWIN_TOKENS), generator=noise)
        ids[1, :FORK] = ids[0, :FORK]
        expected = own_logits(twin, ids.to(device))  # [2, length, width]
        runner = Runner(twin, "twin", kernels=kernels)
        try:
            runner.allocate(2 * TWIN_TOKENS // TWIN_BLOCK, TWIN_BLOCK)
            got = _ragged(runner, *ids.tolist())
        finally:
            runner.close()
    finally:
        torch.set_num_threads(threads)
    scale = max(1.0, float(expected.abs().max()))
    worst = float((got - expected).abs().max()) / scale
    if not worst <= 1e-4:  # NaN must fail too
        raise ModelLoadError(
            f"{config.model_type}: a tiny model of its kind differs from Hugging Face's own forward by {worst:.1e} "
            "of its largest logit; it would be served wrongly."
        )


def _ragged(runner: Runner, first: list[int], second: list[int]) -> Tensor:
    """Logits [2, length, width] of two tracks, computed in chunks of 1 to 9 tokens, packed together after the fork.

    Blocks are handed out in a scattered order. The second track takes over the first one's blocks at `FORK` (full
    ones shared, the partial one copied); the first is fed wrong tokens once and rolled back.
    """
    order = [(7 * i + 3) % (2 * TWIN_TOKENS // TWIN_BLOCK) for i in range(2 * TWIN_TOKENS // TWIN_BLOCK)]
    per_track = TWIN_TOKENS // TWIN_BLOCK
    one, two = order[:per_track], order[per_track:]

    def span(ids: list[int], blocks: list[int], start: int, n: int) -> SpanInput:
        return SpanInput(ids[start : start + n], start, blocks, range(min(n, len(ids) - start)))

    out: list[list[Tensor]] = [[], []]
    start = 0
    for n in (6, 1, FORK - 7):
        out[0].append(runner.forward([span(first, one, start, n)]).logits)
        start += n
    shared = FORK // TWIN_BLOCK
    runner.copy_blocks([(one[shared], two[shared])])
    two = one[:shared] + two[shared:]
    out[1].extend(out[0])
    runner.forward([SpanInput([0, 0, 0], FORK, one, [2])])  # a draft that is rejected: rolled back by overwriting
    starts = [FORK, FORK]
    for lengths in ((1, 9), (9, 1), (1, 1), (2, 5), (8, 4), (TWIN_TOKENS, TWIN_TOKENS)):
        spans = []
        for ids, blocks, begin, n in zip((first, second), (one, two), starts, lengths):
            spans.append(span(ids, blocks, begin, min(n, TWIN_TOKENS - begin)))
        logits = runner.forward(spans).logits
        cut = len(spans[0].token_ids)
        out[0].append(logits[:cut])
        out[1].append(logits[cut:])
        starts = [begin + len(s.token_ids) for begin, s in zip(starts, spans)]
    return torch.stack([torch.cat(rows) for rows in out])


@torch.inference_mode()
def check_head(model: HeadModel, expected: Tensor, ids: Tensor) -> None:
    """The head where transformers has a class for it: its own forward on single prompts without padding.

    expected [n, length, outputs] of ids [n, length]; a classifier of texts answers with the last position's row.
    A class with parts beside decoder and head fails: they have no weights here. Raises ModelLoadError on a mismatch.
    """
    own = own_classifier(model)
    if own is None:
        return
    kind = type(own).__name__
    for prompt, want in zip(ids, expected, strict=True):
        try:
            got = own(input_ids=prompt[None], use_cache=False, return_dict=True).logits[0]
        except Exception as error:
            raise ModelLoadError(f"{kind}: its own forward fails with this decoder and head: {error}") from error
        want = want[-1:] if got.dim() == 1 else want
        error_size = float((got.float().view_as(want) - want.float()).norm() / want.float().norm().clamp_min(1e-6))
        if not error_size <= max(8 * torch.finfo(want.dtype).eps, 1e-5):
            raise ModelLoadError(f"{kind}: its own forward differs by {error_size:.1e}; it would be served wrongly.")


def check_weights(runner: Runner, expected: Tensor, prompts: Sequence[Sequence[int]]) -> None:
    """The loaded weights on short prompts, packed together, against HF's own logits [n, length, width].

    Needs an allocated pool of whole blocks for each prompt. Compares centred logits by each row's relative L2 error
    and takes each prompt's lower quartile, for a fault spares only the first row. The bound is what rounding to the
    model's dtype four times a layer adds up to: 4 eps sqrt(layers); eight times that in a mixture of experts, where
    rounding sends tokens to other experts (HF's own sdpa and eager differ as much). Unrelated logits give 1.4.
    """
    blocks = -(-len(prompts[0]) // runner.block_size)
    spans = []
    for i, ids in enumerate(prompts):
        spans.append(SpanInput(ids, 0, range(i * blocks, (i + 1) * blocks), range(len(ids))))
    got = runner.forward(spans).logits.float().view_as(expected)  # [n, length, width]
    want = expected.float()
    if runner.head is None:  # a shift of all logits means nothing; of a head's outputs it does
        got, want = got - got.mean(-1, keepdim=True), want - want.mean(-1, keepdim=True)
        norms = want.norm(dim=-1)
    else:
        norms = want.norm(dim=-1).mean(-1, keepdim=True)  # a single output may be next to nothing in one row
    errors = (got - want).norm(dim=-1) / norms.clamp_min(1e-6)  # [n, length]
    quartile = float(errors.sort(dim=-1).values[:, errors.shape[1] // 4].max())
    routed = any(getattr(runner.model.config, name, None) for name in EXPERTS)
    bound = (32 if routed else 4) * torch.finfo(runner.dtype).eps * len(runner.layers) ** 0.5
    bound = min(max(bound, 1e-4), 0.5)
    if not quartile <= bound:
        raise ModelLoadError(
            f"{runner.model.config.model_type}: the loaded model's logits differ from Hugging Face's own by "
            f"{quartile:.1e} (allowed: {bound:.1e}); it would be served wrongly."
        )
