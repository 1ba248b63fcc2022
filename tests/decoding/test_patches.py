"""Patched models against themselves, kernels interpreted; what computes something else stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import decoding.patches
import decoding.runner
from decoding.hosting import SpanInput
from decoding.patches import patch
from decoding.runner import Runner
from tests.thin import thinned
from tests.tiny import tiny_model
from tests.triton_kernels.mutate import mutated
from triton_kernels import rms_norm, rope, swiglu

Tensor = torch.Tensor
IDS = torch.arange(6)[None] * 7 % 96
# What is patched in a model of one layer: norms (query and key norms among them), MLPs, attention layers.
PATCHED = {
    "llama": (3, 1, 1),
    "gemma2": (5, 1, 1),
    "gemma3_text": (7, 1, 1),
    "qwen2": (3, 1, 1),
    "qwen3": (5, 1, 1),
    "phi3": (3, 1, 1),
    "cohere": (0, 1, 1),  # its norm subtracts the mean
    "glm": (3, 1, 1),
    "olmo2": (5, 1, 1),
    "gpt_oss": (3, 0, 1),  # experts only
    "deepseek_v3": (5, 1, 1),  # a dense layer and a shared expert; turns keys of another number of heads
    "bitnet": (5, 0, 1),  # its MLP has a norm inside
    "gpt_neox": (0, 0, 1),
    "nanochat": (0, 0, 0),  # turns the other way round, and its norm has no weight
    "gpt2": (0, 0, 0),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS, use_cache=False).logits[0]
    return out


def small(arch: str, **changes: Any) -> Any:
    more = {"layer_types": ["sliding_attention"]} if arch in ("gemma2", "gemma3_text", "gpt_oss") else {}
    return tiny_model(arch, **({"num_hidden_layers": 1} | more | changes))


def counts(modules: dict[str, list[nn.Module]]) -> tuple[int, int, int]:
    kinds = ("RMSNorm", "MLP", "Attention")
    return tuple(sum(len(v) for k, v in modules.items() if k.endswith(kind)) for kind in kinds)  # type: ignore[return-value]


def distance(got: Tensor, want: Tensor) -> float:
    """Relative L2 error in units of the dtype's epsilon."""
    return float((got.double() - want.double()).norm() / want.double().norm()) / torch.finfo(want.dtype).eps


@pytest.mark.parametrize(
    ("arch", "dtype"), thinned((arch, dtype) for dtype in (torch.float32, torch.bfloat16) for arch in PATCHED)
)
def test_patched_models_are_what_they_were(arch: str, dtype: torch.dtype) -> None:
    """A layer and a norm of some ten roundings that may fall another way; in bf16 the interpreter cuts off instead."""
    model = small(arch).to(dtype)
    want = logits(model)
    patches = patch(model)
    assert counts(patches.modules) == PATCHED[arch]
    got = logits(model)
    assert distance(got, want) <= 10
    if PATCHED[arch][0]:
        assert not torch.equal(got, want), "the kernels have run"
    patches.unpatch()
    assert torch.equal(logits(model), want)
    assert not any("forward" in vars(module) for module in model.modules())


# -- what is left alone -----------------------------------------------------------------------------------------------


class ScaledRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = super().forward(hidden_states) * 1.01
        return out


class RelaxedRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Its epsilon is inside the root's square: only small rows tell."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.weight * (hidden_states * (hidden_states.pow(2).mean(-1, keepdim=True) + 2e-6).rsqrt())
        return out


class EagerRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Takes the roots in the model's dtype: the same in fp32, not in bf16."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        out: Tensor = self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))
        return out


class TwoRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        out: Tensor = super().forward(hidden_states)
        return out if gate is None else out * gate


class ShiftedMLP(LlamaMLP):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 0.01))
        return out


class OtherAttention(LlamaAttention):  # type: ignore[misc]
    """Its forward has no rotary embedding of its own to find."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("base", "kind", "dtype"),
    [
        (LlamaRMSNorm, ScaledRMSNorm, torch.bfloat16),
        (LlamaRMSNorm, RelaxedRMSNorm, torch.float32),
        (LlamaRMSNorm, EagerRMSNorm, torch.bfloat16),
        (LlamaRMSNorm, TwoRMSNorm, torch.float32),
        (LlamaMLP, ShiftedMLP, torch.bfloat16),
        (LlamaAttention, OtherAttention, torch.float32),
    ],
)
def test_a_deviating_module_is_left_alone(
    base: type, kind: type, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = small("llama", num_hidden_layers=2).to(dtype)
    changed = [module for module in model.modules() if type(module) is base][1:]
    assert changed
    for module in changed:
        module.__class__ = kind
    with caplog.at_level(logging.INFO, "decoding.patches"):
        patches = patch(model)
    assert kind.__name__ not in patches.modules
    assert not any("forward" in vars(module) for module in changed)
    assert len(patches.modules[base.__name__]) == 1, "its base class is patched beside it"
    lines = [record for record in caplog.records if kind.__name__ in record.getMessage()]
    assert len(lines) == (kind is not OtherAttention), "one line a class"
    patches.unpatch()


def test_a_rotation_that_deviates_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        return own(q, k, cos, -sin, unsqueeze_dim)  # type: ignore[no-any-return]

    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turned_back)
    patches = patch(small("llama"))
    assert counts(patches.modules) == (3, 1, 0)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, Olmo2RMSNorm])
def test_norms_are_told_apart_in_bf16(kind: type[nn.Module]) -> None:
    """Where the cast comes is one rounding's difference; the formula that was found makes none."""
    module = nn.ModuleList([kind(64)]).to(torch.bfloat16)
    nn.init.normal_(module[0].weight)  # type: ignore[arg-type]
    (patched,) = patch(module).modules[kind.__name__]
    found = patched.forward.args[2:4]  # type: ignore[union-attr]
    assert found == {LlamaRMSNorm: (0.0, False), Olmo2RMSNorm: (0.0, True), Gemma2RMSNorm: (1.0, False)}[kind]


@pytest.mark.parametrize(
    ("file", "function", "old", "new", "kept"),
    [
        (rms_norm, "rms_norm", "/ width + eps", "/ width", 0),
        (swiglu, "swiglu", "x * _sigmoid(x)", "x * _sigmoid(1.01 * x)", 1),
        (rope, "rope", "(a_cos - b_sin)", "(a_cos + b_sin)", 2),
    ],
)
def test_broken_kernels_are_not_used(
    file: Any, function: str, old: str, new: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = mutated(file.__file__, old, new, tmp_path)
    monkeypatch.setattr(decoding.patches, function, getattr(broken, function))
    found = counts(patch(small("llama")).modules)
    assert [bool(n) for n in found] == [i != kept for i in range(3)]


# -- how a patch lives ------------------------------------------------------------------------------------------------


def test_another_model_of_the_class_is_not_touched() -> None:
    one, other = small("llama"), small("llama", seed=1)
    want = logits(other)
    scope = dict(vars(modeling_llama))
    patch(one)
    assert torch.equal(logits(other), want)
    assert dict(vars(modeling_llama)) == scope
    assert not any("forward" in vars(module) for module in other.modules())


def test_modules_are_still_called_with_their_hooks() -> None:
    model = small("llama")
    patch(model)
    seen: list[str] = []
    mlp = model.model.layers[0].mlp
    for name, module in (("mlp", mlp), ("up", mlp.up_proj), ("norm", model.model.norm)):
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    logits(model)
    assert seen == ["up", "mlp", "norm"]


def test_inputs_of_another_dtype_go_the_models_own_way() -> None:
    model = small("llama").to(torch.bfloat16)
    norm, x = model.model.norm, torch.randn(1, 3, 32)
    want = norm(x)
    patch(model)
    assert torch.equal(norm(x), want)


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_patched_models_compile_into_one_graph(arch: str) -> None:
    model = small(arch)
    patch(model)
    want = logits(model)
    ops: list[str] = []

    def spy(graph: Any, _inputs: Any) -> Any:
        ops.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.inference_mode():
        compiled = torch.compile(model.model, backend=spy, fullgraph=True)
        hidden = compiled(input_ids=IDS, position_ids=torch.arange(6)[None], use_cache=False).last_hidden_state
        got = model.lm_head(hidden)[0]
    assert distance(got, want) <= 10
    used = [sum(op in name for name in ops) for op in ("trimtab.rms_norm", "trimtab.swiglu", "trimtab.rope")]
    assert used == [*PATCHED[arch]]
    torch._dynamo.reset()


def test_a_patched_model_is_hosted_as_it_was() -> None:
    """What the runner does on a GPU: probed, then patched; and its pool, its packing and its attention around it."""
    spans = [SpanInput(list(range(1, 7)), 0, [0], range(6)), SpanInput([5, 6], 0, [1], [1])]
    plain, patched = (Runner(small("llama"), "m", kernels=False) for _ in range(2))
    patched._patches = decoding.runner._patch(patched.model)
    assert counts(patched._patches.modules) == PATCHED["llama"]
    for runner in (plain, patched):
        runner.allocate(2, 16)
    assert distance(patched.forward(spans).logits, plain.forward(spans).logits) <= 10
    for runner in (plain, patched):
        runner.close()
    assert not any("forward" in vars(module) for module in patched.model.modules()), "closed means undone"
