"""Rotary embedding: the kernel in the interpreter against the reference, the reference against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from tests.triton_kernels.mutate import mutated
from triton_kernels import rope as file
from triton_kernels.rope import rope, rope_reference

Tensor = torch.Tensor
LLAMA: dict[str, Any] = {}
COHERE = {"interleaved": True, "wide": True}
GLM = {"interleaved": True, "paired": True}
# tokens, query heads, key heads, head dim, width of cos, convention
CASES: list[tuple[int, int, int, int, int, dict[str, Any]]] = [
    (1, 1, 1, 2, 2, LLAMA),
    (3, 9, 2, 12, 12, LLAMA),
    (5, 4, 4, 20, 8, LLAMA),
    (2, 3, 1, 16, 8, {"paired": True, "rotated": 16}),
    (3, 5, 3, 6, 6, COHERE),
    (2, 8, 1, 22, 12, GLM),
    (4, 17, 8, 10, 4, {"interleaved": True}),
    (4, 2, 1, 10, 6, {"wide": True}),
]
ULPS = 3  # bf16 roundings in a row: of a product and of the sum, and the interpreter cuts off where torch rounds


def draw(tokens: int, q_heads: int, k_heads: int, size: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """q and k as attention layers give them, views of [H, T, d]; no two columns of cos or sin are equal."""
    torch.manual_seed(tokens)
    q, k = (torch.randn(heads, tokens, size + 3)[..., :size].transpose(0, 1) for heads in (q_heads, k_heads))
    cos, sin = torch.randn(2, tokens, width + 1)[..., :width]
    return [x.to(dtype) for x in (q, k, cos, sin)]


def worst(case: tuple[int, int, int, int, int, dict[str, Any]], dtype: torch.dtype, run: Callable[..., Any] = rope,
          in_place: bool = False) -> float:  # fmt: skip
    """Largest error of `run` as a multiple of `ULPS` of the two products' sizes."""
    *shape, options = case
    q, k, cos, sin = draw(*shape, dtype)
    want = rope_reference(q, k, cos, sin, **options)
    sizes = [x.abs().double() for x in (q, k, cos, sin)]  # with both signs of sin: of a cos + b sin and b cos + a sin
    plus, minus = rope_reference(*sizes, **options), rope_reference(*sizes[:3], -sizes[3], **options)
    given = (q, k)
    got = run(q, k, cos, sin, in_place=in_place, kernel=True, **options)
    assert not in_place or (got[0] is given[0] and got[1] is given[1])
    errors = []
    for g, w, p, m in zip(got, want, plus, minus):
        allowed = ULPS * torch.finfo(dtype).eps * torch.maximum(p.abs(), m.abs())
        errors.append(((g.double() - w.double()).abs() / allowed.clamp_min(1e-30)).max())
        turned = options.get("rotated") or shape[-1]
        assert torch.equal(g[..., turned:], w[..., turned:])
    return float(torch.stack(errors).max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_kernel_does_what_the_reference_does(case: Any, dtype: torch.dtype, in_place: bool) -> None:
    assert worst(case, dtype, in_place=in_place) <= 1


def test_strides_that_no_vector_is_in_and_rows_that_are_shared() -> None:
    q, k, cos, sin = draw(4, 3, 2, 8, 8, torch.float32)
    cos, sin = cos[:1].expand(4, 8), sin.T.contiguous().T
    q = q.transpose(0, 2).contiguous().transpose(0, 2)
    for got, want in zip(rope(q, k, cos, sin, kernel=True), rope_reference(q, k, cos, sin)):
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="heads of stride 1"):
        rope(q, k, cos, sin, in_place=True, kernel=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("own", "width", "options"),
    [
        (modeling_llama.apply_rotary_pos_emb, 8, {}),
        (modeling_phi3.apply_rotary_pos_emb, 6, {}),
        (modeling_cohere.apply_rotary_pos_emb, 8, COHERE),
        (modeling_glm.apply_rotary_pos_emb, 4, GLM),
        (modeling_gpt_oss.apply_rotary_pos_emb, 4, {"paired": True, "rotated": 8}),
    ],
)
def test_the_reference_is_transformers_own(
    own: Callable[..., Any], width: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    q, k, cos, sin = draw(5, 4, 2, 8, width, dtype)
    want = own(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    for got, expected in zip(rope_reference(q, k, cos, sin, **options), want):
        assert torch.equal(got.transpose(0, 1)[None], expected), "bit for bit"


def test_arguments_that_do_not_fit_are_refused() -> None:
    q, k, cos, sin = draw(4, 3, 2, 8, 8, torch.float32)
    for wrong in ((q[:3], k, cos, sin), (q, k[..., :6], cos, sin), (q, k, cos[:, :4], sin), (q[..., :4], k, cos, sin)):
        with pytest.raises(ValueError, match="do not fit"):
            rope(*wrong)
    for options in ({"rotated": 6}, {"paired": True, "rotated": 20}, {"rotated": 7}):
        with pytest.raises(ValueError, match="do not fit"):
            rope(q, k, cos, sin, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs wide=True"):
        rope(q.bfloat16(), k.bfloat16(), cos, sin)
    assert rope(q[:0], k[:0], cos[:0], sin[:0], kernel=True)[0].shape == (0, 3, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(a_cos - b_sin)", "(a_cos + b_sin)"),
        ("a * sin_b", "a * sin_a"),
        ("at_a, at_b = 2 * pair, 2 * pair + 1", "at_a, at_b = pair, pair + HALF"),
        ("(group - q_groups) * HEADS", "group * HEADS"),
        ("x_ptr + HALF + pair", "x_ptr + PAIRS + pair"),
        ("ROTATED + at, passed", "ROTATED + at, passed * 0"),
    ],
)
def test_broken_kernels_fail(old: str, new: str, tmp_path: Path) -> None:
    broken = mutated(file.__file__, old, new, tmp_path).rope

    def fails(case: Any) -> bool:
        try:
            return not worst(case, torch.float32, run=broken) <= 1
        except AssertionError:  # what is passed on is compared exactly
            return True

    assert any(fails(case) for case in CASES)


def test_rounding_once_and_twice() -> None:
    """In bf16 the square of 1 + 3/128 is rounded down to 1 + 6/128, so the difference from 1 loses what is left."""
    x = torch.tensor([[[1 + 3 / 128, 1.0]]], dtype=torch.bfloat16)
    cos, sin = torch.tensor([[1 + 3 / 128, 1.0]]).bfloat16(), torch.ones(1, 2).bfloat16()
    for wide, want in ((False, 6 / 128), (True, 6 / 128 + 2 / 4096)):
        assert rope(x, x, cos, sin, wide=wide, kernel=True)[0][0, 0, 0].item() == want
