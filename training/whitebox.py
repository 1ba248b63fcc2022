"""The white-box objective: a drafter's distributions against its target's, at every token that counts.

Where a model's logits are its head's product with its hidden states, only a chunk of them exists at a time; those of
other models are held whole. `training.losses` says what the losses are.
"""

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from rich.console import Console
from torch import Tensor, nn

from training.heads import Head, head_of, hidden_states, is_plain
from training.loop import Objective
from training.losses import Distillation, kl, lk, lk_mixed, tvd, tvd_plus
from triton_kernels.dispatch import on_kernel
from triton_kernels.distill_sweep import KINDS, TargetHead, chunked_distill_loss


@dataclass(frozen=True, slots=True)
class Loss:
    """One of KINDS. Raises ValueError for an unknown one.

    per_position: tvd++ with a sigma for each position. decay: lk in its mixed form.
    """

    kind: str
    per_position: bool = False
    decay: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no loss called {self.kind!r}; choose from {', '.join(KINDS)}")

    @property
    def of_logits(self) -> Distillation:
        """The same as a function of whole logits."""
        if self.kind == "lk" and self.decay is not None:
            return partial(lk_mixed, decay=self.decay)
        known: dict[str, Distillation] = {
            "kl": kl,
            "tvd": tvd,
            "tvd++": partial(tvd_plus, per_position=self.per_position),
            "lk": lk,
        }
        return known[self.kind]

    def behind(self, hidden: Tensor, head: Head, target: Tensor | TargetHead) -> Tensor:
        """Its mean over the rows of hidden [n, hidden]; target: logits [n, vocab], or what they are made of."""
        if not on_kernel(hidden, None) or find_spec("triton") is None:
            return chunked_distill_loss(
                hidden, *head, target, self.kind, per_position=self.per_position, decay=self.decay
            )
        from triton_kernels.distill_loss import distill_loss

        return distill_loss(
            hidden, *head, target, self.kind, per_position=self.per_position, decay=self.decay, kernel=True
        )


def distillation(target: nn.Module, drafter: nn.Module, loss: Loss, console: Console) -> Objective:
    """The mean of `loss` over the tokens that are targets; the labels are not looked at. Zero without targets.

    For steps of `drafter`, the model that the objective is then given. Says so where whole logits are held.
    """
    plain = {name: is_plain(model) for name, model in (("target", target), ("drafter", drafter))}
    for name in (name for name, found in plain.items() if not found):
        console.print(f"distil: the {name}'s logits are more than its head's product; a step holds them whole")

    def objective(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        mask = targets[:, 1:]  # [batch, length - 1]: position t predicts token t + 1
        with torch.no_grad():
            p = _head_rows(target, ids, mask) if plain["target"] else _logit_rows(target, ids, mask)
            if isinstance(p, TargetHead) and not plain["drafter"]:
                p = p.logits()
        if plain["drafter"]:
            q = _head_rows(model, ids, mask)
            p, head = _aligned(p, Head(q.weight, q.bias))
            return loss.behind(q.hidden, head, p)
        assert isinstance(p, Tensor)
        drafted = _logit_rows(model, ids, mask)
        width = min(p.shape[1], drafted.shape[1])
        rows = loss.of_logits(p[:, :width], drafted[:, :width])  # [n]
        return rows.sum() / mask.sum().clamp(min=1)

    return objective


def _head_rows(model: nn.Module, ids: Tensor, mask: Tensor) -> TargetHead:
    """Of the positions that count."""
    return TargetHead(hidden_states(model, ids)[:, :-1][mask], *head_of(model))


def _logit_rows(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Of the positions that count, [n, vocab]."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1][mask]


def _aligned(target: Tensor | TargetHead, head: Head) -> tuple[Tensor | TargetHead, Head]:
    """Both for the tokens that both know: padded heads differ."""
    if isinstance(target, TargetHead):
        width = min(len(target.weight), len(head.weight))
        return TargetHead(target.hidden, *Head(target.weight, target.bias).narrowed(width)), head.narrowed(width)
    width = min(target.shape[1], len(head.weight))
    return target[:, :width], head.narrowed(width)
