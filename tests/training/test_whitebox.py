"""The white-box objective in chunks against the formula on whole logits; what it holds; models whose heads do more."""

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PhiConfig, PreTrainedModel

from tests.triton_kernels.shapes import Shapes
from training import losses, whitebox
from training.loop import Objective
from training.whitebox import Loss, distillation
from triton_kernels import distill_sweep

LOSSES = {
    "kl": Loss("kl"),
    "tvd": Loss("tvd"),
    "tvd++": Loss("tvd++"),
    "tvd++ by position": Loss("tvd++", per_position=True),
    "lk": Loss("lk"),
    "lk mixed": Loss("lk", decay=2.0),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "initializer_range": 0.4,
}  # fmt: skip
TIED = LlamaConfig(vocab_size=331, tie_word_embeddings=True, **SMALL)
BIASED = PhiConfig(vocab_size=331, **SMALL)
PADDED = LlamaConfig(vocab_size=337, **SMALL)
CAPPED = Gemma2Config(vocab_size=331, head_dim=8, final_logit_softcapping=2.0, **SMALL)


def model(config: Any, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return made.double().eval()


def rows(length: int = 7) -> tuple[Tensor, Tensor]:
    ids = torch.randint(331, (3, length), generator=torch.Generator().manual_seed(0))
    return ids, torch.arange(3 * length).view(3, length) % 3 > 0


def whole(target: nn.Module, loss: Loss) -> Objective:
    """The specification: `training.losses` on what the models give."""

    def objective(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        wanted, drafted = (each(input_ids=ids).logits[:, :-1, :331] for each in (target, model))
        mask = targets[:, 1:]
        return loss.of_logits(wanted[mask].detach(), drafted[mask]).sum() / mask.sum().clamp(min=1)

    return objective


def step(drafter: nn.Module, objective: Objective, ids: Tensor, targets: Tensor) -> list[Tensor]:
    """Loss and gradients."""
    drafter.zero_grad()
    loss = objective(drafter, ids, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return [loss.detach(), *(each.grad for each in drafter.parameters() if each.grad is not None)]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@each_loss
@pytest.mark.parametrize(
    ("target", "drafter", "said"),
    [
        (PADDED, TIED, ""),
        (TIED, PADDED, ""),
        (TIED, BIASED, ""),
        (BIASED, TIED, ""),
        (CAPPED, TIED, "target"),
        (PADDED, CAPPED, "drafter"),
        (CAPPED, CAPPED, "both"),
    ],
    ids=["tied", "padded", "biased", "biased target", "capped target", "capped drafter", "capped both"],
)
def test_loss_and_gradients_are_those_of_whole_logits(target: Any, drafter: Any, said: str, loss: Loss) -> None:
    large, small, console = model(target, 0), model(drafter, 1), quiet()
    objective = distillation(large, small, loss, console)
    for ids, targets in (rows(), rows(2)):
        want = step(small, whole(large, loss), ids, targets)
        found = step(small, objective, ids, targets)
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-11)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert [f"the {name}'s logits are more" in shown for name in ("target", "drafter")] == [
        said in ("target", "both"),
        said in ("drafter", "both"),
    ]


@each_loss
def test_nothing_counts(loss: Loss) -> None:
    ids, targets = rows()
    large, small = model(PADDED, 0), model(TIED, 1)
    found = step(small, distillation(large, small, loss, quiet()), ids, torch.zeros_like(targets))
    assert not any(each.any() for each in found)


@each_loss
@pytest.mark.parametrize("bf16", [True, False])
def test_whole_logits_are_never_made(loss: Loss, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_sweep.chunked_distill_loss, "__kwdefaults__", {
        **distill_sweep.chunked_distill_loss.__kwdefaults__, "chunk": 4
    })  # fmt: skip
    ids, targets = rows(10)  # 18 of 30 positions count
    large, small = model(TIED, 0).float(), model(TIED, 1).float()
    objective = distillation(large, small, loss, quiet())
    with Shapes() as shapes, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        step(small, objective, ids, targets)
    of_vocabulary = {shape for shape in shapes.made if 331 in shape}
    assert (4, 331) in of_vocabulary
    assert max(shape[0] for shape in of_vocabulary if shape[-1] == 331 and len(shape) > 1) == 4
    assert {shape for shape in of_vocabulary if shape[-1] != 331} == {(331, 16)}  # the head and its gradient


@each_loss
def test_the_trainers_precision(loss: Loss) -> None:
    """Under autocast both ways round the same products to bf16; they differ in the order of rounding."""
    ids, targets = rows()
    large, small = model(PADDED, 0).float(), model(TIED, 1).float()
    found = []
    for objective in (distillation(large, small, loss, quiet()), whole(large, loss)):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(small, objective, ids, targets))
    for mine, other in zip(*found, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() <= 0.03 * other.norm()


@each_loss
def test_by_the_kernel(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, in the interpreter: fp32 logits near 4, of which 1 / sigma and 1 / A make steps of some 1e-5."""
    ids, targets = rows(4)
    large, small = model(PADDED, 0).float(), model(TIED, 1).float()
    want = step(small, whole(large, loss), ids, targets)
    monkeypatch.setattr(whitebox, "on_kernel", lambda x, kernel: True)
    monkeypatch.setattr(whitebox, "chunked_distill_loss", None)
    found = step(small, distillation(large, small, loss, quiet()), ids, targets)
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)


def test_unknown_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="no loss called 'mse'"):
        Loss("mse")
    assert Loss("tvd").of_logits is losses.tvd
