"""A model as its body and its head, so that logits are made for the rows that are needed, a few at a time."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.loop import Objective, language_modelling
from triton_kernels.distill_sweep import chunked_cross_entropy


class Head(NamedTuple):
    """logits = hidden weight^T + bias; weight [vocab, hidden], bias [vocab]."""

    weight: Tensor
    bias: Tensor | None

    def narrowed(self, width: int) -> "Head":
        """Of the first `width` tokens; padding lies behind them."""
        if width == len(self.weight):
            return self
        return Head(self.weight[:width], None if self.bias is None else self.bias[:width])


def head_of(model: nn.Module) -> Head:
    """Of a model that `is_plain`; read it anew for each step, because tensors of parameters may be replaced."""
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    return Head(head.weight, head.bias)


def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    """What the head of a plain model reads: [batch, length, hidden], in autocast's dtype where that is on."""
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator]
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


@torch.no_grad()
def is_plain(model: nn.Module) -> bool:
    """Whether the logits of `model` are head(last hidden states) and nothing more: no cap, scale or projection between.

    Asked on a short batch. The head's own output is replaced by values far from zero, as training may bring them: a cap
    would leave small ones nearly as they are.
    """
    head: object = getattr(model, "get_output_embeddings", lambda: None)()
    body = getattr(model, "base_model", None)
    if type(head) is not nn.Linear or body is None or body is model:
        return False
    ids = torch.arange(6, device=head.weight.device)[None] % len(head.weight)  # [1, 6]
    values = torch.linspace(-200, 200, len(head.weight), dtype=head.weight.dtype, device=head.weight.device)
    read: list[Tensor] = []

    def plant(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        read.append(inputs[0])
        return values.expand_as(output)

    training, hook = model.training, head.register_forward_hook(plant)
    try:
        model.eval()
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
        model.train(training)
    return _same(logits, values.expand(1, 6, -1)) and len(read) == 1 and _same(hidden, read[0])


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-4, atol=1e-5)


def logits_by_row(model: nn.Module, ids: Tensor, plain: bool) -> Callable[[int, slice], Tensor]:
    """One forward over ids [batch, length]; gives logits [positions, vocab] of some positions of a row, when asked.

    plain: what `is_plain` says of the model. If it is not, they are all held.
    """
    if not plain:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return lambda row, where: logits[row, where]
    hidden, head = hidden_states(model, ids), head_of(model)
    return lambda row, where: nn.functional.linear(hidden[row, where], *head)


def reading(model: nn.Module) -> Objective:
    """`language_modelling` for `model`, chunk by chunk where its head allows."""
    return _language_modelling_in_chunks if is_plain(model) else language_modelling


def _language_modelling_in_chunks(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    mask = targets[:, 1:]  # [batch, length - 1]
    return chunked_cross_entropy(hidden_states(model, ids)[:, :-1][mask], *head_of(model), ids[:, 1:][mask])
