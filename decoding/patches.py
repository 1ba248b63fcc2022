"""Kernels in place of a hosted model's own RMS norms, gated MLPs and rotary embeddings. Only for where triton is.

A model's code is not known here, only what it computes: a module is patched when its own output, on random input and
with its own weights, is what one of the known formulas gives, rounding for rounding, and what the kernel gives. Else it
stays as it is. Everything is set on instances, so another model of the same class is not touched, and `unpatch` leaves
nothing behind. Modules, and with them their hooks, are still called as modules.

Rotary embeddings are functions that attention layers find among their module's globals. Those stay; a layer gets its
own forward again with a scope in which that one name means the kernel.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from triton_kernels.rms_norm import rms_norm, rms_norm_reference
from triton_kernels.rope import rope
from triton_kernels.swiglu import Activation, swiglu, swiglu_reference

log = logging.getLogger(__name__)
Tensor = torch.Tensor
Forward = Callable[..., Any]

ROTARY = "apply_rotary_pos_emb"  # transformers' name for it in every model that has it
NORMS = ((0.0, False), (0.0, True), (1.0, False))  # offset of the weight, cast after it: Llama, OLMo 2, Gemma
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu")


class NotPatched(Exception):
    """Why a module stays as it is."""


@dataclass(slots=True)
class Patches:
    """What was patched: modules by the name of their class. `unpatch` undoes it."""

    modules: dict[str, list[nn.Module]] = field(default_factory=dict)

    def unpatch(self) -> None:
        """The modules compute as their classes do again."""
        for modules in self.modules.values():
            for module in modules:
                del module.forward
        self.modules.clear()


@torch.inference_mode()
def patch(model: nn.Module) -> Patches:
    """Patch what can be patched; a line is logged for each class of which something cannot.

    On a CPU the kernels need triton's interpreter, or every check fails. Takes a few launches a module and waits for
    them; what is patched never waits, and may be compiled or captured.
    """
    patches, refused = Patches(), dict[str, str]()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    scopes: dict[Any, dict[str, Any]] = {}
    for module in model.modules():
        name = type(module).__name__
        try:
            if "forward" in vars(module):
                continue  # somebody else's patch, which knows of more than the class does
            if name.endswith("RMSNorm"):
                forward = _norm(module, dtype)
            elif _is_mlp(module):
                forward = _mlp(module, dtype)
            elif _rotates(module):
                forward = _attention(module, dtype, scopes)
            else:
                continue
        except Exception as error:  # also whatever a module says that is called as it is not meant to be
            refused[name] = str(error) or type(error).__name__
            continue
        module.forward = forward
        patches.modules.setdefault(name, []).append(module)
    for name, reason in refused.items():
        log.info("%s keeps its own forward: %s", name, reason.splitlines()[0])
    return patches


# -- the check --------------------------------------------------------------------------------------------------------


def _draw(module: nn.Module, dtype: torch.dtype, *shape: int) -> Tensor:
    """Random numbers on the module's device. The first row is so small that an epsilon shows."""
    like = next(iter([*module.parameters(), *module.buffers()]), torch.empty(0))
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x[..., 0, :] *= 1e-3
    return x.to(like.device, dtype)


def _distance(got: Tensor, want: Tensor) -> float:
    """The largest relative L2 error of a row, in units of the dtype's epsilon."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return float("inf")
    errors = (got.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1).clamp_min(1e-30)
    return float(errors.max()) / torch.finfo(want.dtype).eps


def _same(formula: Tensor, kernel: Callable[[], Tensor], own: Tensor) -> bool:
    """Whether `own` is what the formula gives and what the kernel gives.

    The formula is torch's, with the same roundings: a sixteenth of an epsilon leaves room for a few of another order,
    while one rounding too many or too few makes a quarter of an epsilon. A kernel may round each of its steps another
    way, up to three of a whole epsilon each.
    """
    return _distance(formula, own) <= 1 / 16 and _distance(kernel(), own) <= 4


def _sole(given: tuple[Tensor, ...], named: dict[str, Tensor]) -> Tensor:
    (x,) = (*given, *named.values())
    return x


def _takes_one(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1


# -- RMS norms --------------------------------------------------------------------------------------------------------


def _norm(module: nn.Module, dtype: torch.dtype) -> Forward:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float) or not _takes_one(module):
        raise NotPatched("it is not a weight, an epsilon and one input")
    if weight.dtype != dtype:
        raise NotPatched(f"its weight is {weight.dtype}")
    x = _draw(module, dtype, 1, 3, weight.shape[0])
    own = module.forward(x)
    for offset, cast_last in NORMS:
        forward = partial(_normed, module, eps, offset, cast_last)
        formula = rms_norm_reference(x, weight, eps, None, offset, cast_last)[0]
        if _same(formula, partial(forward, x), own):
            return forward
    raise NotPatched("no known norm gives what it gives")


def _normed(module: nn.Module, eps: float, offset: float, cast_last: bool, *given: Tensor, **named: Tensor) -> Any:
    x, weight = _sole(given, named), module.weight
    if x.dtype != weight.dtype:
        return type(module).forward(module, x)
    if torch.compiler.is_compiling():
        return torch.ops.trimtab.rms_norm(x, weight, eps, offset, cast_last)
    assert isinstance(weight, Tensor)
    return rms_norm(x, weight, eps, None, offset, cast_last, kernel=True)[0]


# -- gated MLPs -------------------------------------------------------------------------------------------------------


def _is_mlp(module: nn.Module) -> bool:
    """By its projections, which must be layers: experts keep theirs in one tensor."""
    names = {name for name, _ in module.named_children()}
    return names >= {"gate_proj", "up_proj", "down_proj"} or names >= {"gate_up_proj", "down_proj"}


def _mlp(module: nn.Module, dtype: torch.dtype) -> Forward:
    if not _takes_one(module):
        raise NotPatched("it takes more than one input")
    first: Any = module.gate_up_proj if hasattr(module, "gate_up_proj") else module.gate_proj
    x = _draw(module, dtype, 1, 3, int(first.in_features))
    own = module.forward(x)
    for activation in ACTIVATIONS:
        forward = partial(_gated, module, activation)
        if _same(_project(module, partial(swiglu_reference, activation=activation), x), partial(forward, x), own):
            return forward
    raise NotPatched("no known gate gives what it gives")


def _project(module: Any, gate: Callable[..., Tensor], x: Tensor) -> Tensor:
    fused = hasattr(module, "gate_up_proj")
    inner = gate(module.gate_up_proj(x)) if fused else gate(module.gate_proj(x), module.up_proj(x))
    out: Tensor = module.down_proj(inner)
    return out


def _gated(module: nn.Module, activation: Activation, *given: Tensor, **named: Tensor) -> Tensor:
    return _project(module, partial(_gate, activation), _sole(given, named))


def _gate(activation: Activation, gate: Tensor, up: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.trimtab.swiglu(gate, up, activation)
        return out
    return swiglu(gate, up, activation, kernel=True)


# -- rotary embeddings ------------------------------------------------------------------------------------------------

Convention = tuple[bool, bool, bool, bool]  # interleaved, paired, wide, and twice as many numbers turned as cosines


def _rotates(module: nn.Module) -> bool:
    own = type(module).forward
    return isinstance(own, FunctionType) and ROTARY in own.__code__.co_names and ROTARY in own.__globals__


def _attention(module: nn.Module, dtype: torch.dtype, scopes: dict[Any, dict[str, Any]]) -> Forward:
    """The layer's own forward over a copy of its scope, one for all layers of a class, in which rotary is ours."""
    own: Any = type(module).forward
    if own not in scopes:
        rotary = own.__globals__[ROTARY]
        conventions = _conventions(module, rotary, dtype)
        # Without its module's name: torch.compile would look names up in the module of that name, not in the scope.
        scope = {name: value for name, value in own.__globals__.items() if name != "__name__"}
        scopes[own] = scope | {ROTARY: partial(_rotated, rotary, dtype, conventions)}
    if not scopes[own][ROTARY].args[2]:
        raise NotPatched("no known rotary embedding gives what its own gives")
    function = FunctionType(own.__code__, scopes[own], own.__name__, own.__defaults__, own.__closure__)
    function.__kwdefaults__ = own.__kwdefaults__
    return MethodType(function, module)


def _key(size: int, width: int, dtype: torch.dtype) -> str:
    """What decides how cosines of `width` turn heads of `size`: some turn as many numbers, others twice as many."""
    share = "all" if width == size else "half" if 2 * width == size else "part" if width < size else "more"
    return f"{share} {dtype}"


def _conventions(module: nn.Module, rotary: Forward, dtype: torch.dtype) -> dict[str, Convention]:
    """How `rotary` turns what, by `_key`: nothing for what it cannot take, or turns in some other way."""
    found: dict[str, Convention] = {}
    flags = [(a, b, c, d) for a in (False, True) for b in (False, True) for c in (False, True) for d in (False, True)]
    for width in (16, 8, 4):
        for of in {dtype, torch.float32}:
            q, k = _draw(module, dtype, 1, 3, 3, 16).transpose(1, 2), _draw(module, dtype, 1, 3, 2, 16).transpose(1, 2)
            cos, sin = _draw(module, of, 2, 1, 3, width).unbind()
            try:
                own = rotary(q, k, cos, sin)
                convention = next(each for each in flags if _turns_alike(q, k, cos, sin, each, own))
            except Exception:
                continue
            found[_key(16, width, of)] = convention
    return found


def _turns_alike(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, convention: Convention, own: Any) -> bool:
    try:
        formula = _turn(q, k, cos, sin, convention, False)
    except ValueError:
        return False
    kernel = partial(_turn, q, k, cos, sin, convention, True)
    return all(_same(formula[i], lambda i=i: kernel()[i], own[i]) for i in (0, 1))  # type: ignore[misc]


def _turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, convention: Convention, kernel: bool
) -> tuple[Tensor, Tensor]:
    """q [1, H, T, d], k [1, KH, T, d], cos and sin [1, T, w]."""
    interleaved, paired, wide, twice = convention
    rotated = cos.shape[-1] * (2 if twice else 1)
    packed = (q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
    if torch.compiler.is_compiling():
        q, k = torch.ops.trimtab.rope(*packed, interleaved, paired, wide, rotated)
    else:
        options: dict[str, Any] = {"interleaved": interleaved, "paired": paired, "wide": wide, "rotated": rotated}
        q, k = rope(*packed, **options, kernel=kernel)
    return q.transpose(0, 1)[None], k.transpose(0, 1)[None]


def _rotated(
    own: Forward, dtype: torch.dtype, conventions: dict[str, Convention],
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any,
) -> Any:  # fmt: skip
    """`own` wherever it is called otherwise than it was checked."""
    packed = q.dim() == k.dim() == 4 and cos.dim() == 3 and q.shape[0] == k.shape[0] == cos.shape[0] == 1
    convention = conventions.get(_key(q.shape[-1], cos.shape[-1], cos.dtype))
    if rest or named or not packed or q.dtype != dtype or k.dtype != dtype or convention is None:
        return own(q, k, cos, sin, *rest, **named)
    return _turn(q, k, cos, sin, convention, True)


# -- what torch.compile sees ------------------------------------------------------------------------------------------


@torch.library.custom_op("trimtab::rms_norm", mutates_args=())
def _rms_norm_op(x: Tensor, weight: Tensor, eps: float, offset: float, cast_last: bool) -> Tensor:
    return rms_norm(x, weight, eps, None, offset, cast_last, kernel=True)[0]


@_rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float, cast_last: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("trimtab::swiglu", mutates_args=())
def _swiglu_op(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    return swiglu(gate, up, activation, kernel=True)  # type: ignore[arg-type]


@_swiglu_op.register_fake
def _(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


@torch.library.custom_op("trimtab::rope", mutates_args=())
def _rope_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, paired: bool, wide: bool, rotated: int
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"interleaved": interleaved, "paired": paired, "wide": wide, "rotated": rotated}
    return rope(q, k, cos, sin, **options, kernel=True)


@_rope_op.register_fake
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, paired: bool, wide: bool, rotated: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)
