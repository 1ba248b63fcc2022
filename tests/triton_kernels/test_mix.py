"""The mix: the kernels in the interpreter against the reference, and the reference against the engine's own steps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from decoding.combine import Gating, TorchRows
from decoding.core import Sampling
from decoding.sampling import Position, process
from decoding.truncate import cut_below
from tests.decoding.test_sampling import sequence
from tests.triton_kernels.mutate import mutated
from triton_kernels import mix as subject
from triton_kernels.cutoffs import cutoffs_reference
from triton_kernels.mix import Edits, Gates, Mixed, mix, mix_reference
from triton_kernels.row_stats import row_stats_reference

Tensor = torch.Tensor
WIDTH, N = 77, 4
OUTSIDE = {"base": 0, "of": 1, "drop": 2}


def tracks() -> tuple[list[Tensor], Tensor]:
    """Rows of three models, their dtypes, paddings and masked ids their own, and which rows: [3, n]."""
    torch.manual_seed(0)
    rows = [torch.randn(6, 90) * 3, (torch.randn(5, 80) * 3).bfloat16(), (torch.randn(4, 81) * 3).half()]
    rows[0][:, 70] = -torch.inf
    rows[1][:, 5] = -torch.inf
    rows[1][2, 9] = torch.nan
    rows[2][3] = -torch.inf
    return rows, torch.tensor([[0, 1, 5, 3], [4, 2, 0, 1], [0, 1, 2, 3]])


def shifts(rows: list[Tensor], index: Tensor) -> Tensor:
    return torch.stack([row_stats_reference(x, i, WIDTH)[1] for x, i in zip(rows, index)])


def some_gates(rows: list[Tensor], index: Tensor, of: list[int], outside: list[int], top_p: float = 0.8) -> Gates:
    plain = (torch.ones(N), torch.zeros(N, dtype=torch.int32), torch.full((N,), top_p), torch.zeros(N))
    cuts = [cutoffs_reference(rows[t], index[t], WIDTH, *plain) for t in of]
    return Gates(of, outside, torch.stack([c.least for c in cuts]), torch.stack([c.last for c in cuts]))


def some_masks() -> tuple[Tensor, Tensor]:
    masks = torch.rand(2, 96) < 0.5  # more bits than ids
    masks[1] = False
    masks[1, 40] = True
    return packed(masks), torch.tensor([0, -1, 1, 0], dtype=torch.int32)


def packed(masks: Tensor) -> Tensor:
    words = (masks.view(len(masks), -1, 32).long() << torch.arange(32)).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def some_edits() -> Edits:
    start = torch.tensor([0, 3, 3, 10, 11], dtype=torch.int32)
    ids = torch.tensor([1, 76, 40, 0, 2, 3, 40, 5, 70, 60, 7], dtype=torch.int32)
    times = torch.tensor([1.5, 1.0, 2.0, 1.2, 1.0, 0.5, 1.7, 1.0, 1.3, 1.0, 1.1])
    return Edits(start, ids, torch.linspace(-2, 2, 11), times, torch.tensor([True, False, False, True]))


def cases() -> dict[str, dict[str, Any]]:
    rows, index = tracks()
    weights = torch.tensor([[1.0, 0.5, -0.5], [1.0, 0.0, 2.0], [0.3, 1.0, -1.0], [1.0, 0.7, 0.0]])
    shift = shifts(rows, index)
    base = {"tracks": rows, "index": index, "width": WIDTH, "weights": weights, "terms": [0, 1, 2]}
    bits, mask_of = some_masks()
    masks = {"bits": bits, "mask_of": mask_of}
    floor = {"floor": (0, torch.tensor([math.log(0.1), -math.inf, math.log(0.9), math.log(0.01)]))}
    out: dict[str, dict[str, Any]] = {
        "logits": base,
        "log-probs": base | {"shifts": shift},
        "one": {**base, "tracks": rows[:1], "index": index[:1].int(), "weights": weights[:, :1], "terms": [0]},
        "masks and edits": base | masks | {"edits": some_edits()},
        "floor": base | floor | {"shifts": shift},
        "floor among the allowed": base | floor | masks | {"shifts": shift, "hide": False},
        "floor, masks and edits": base | floor | masks | {"shifts": shift, "edits": some_edits()},
    }
    for name, outside in OUTSIDE.items():
        gates = some_gates(rows, index, [1, 0], [outside, 0])
        out[f"gates {name}"] = base | {"shifts": shift, "gate_of": [1, -1, 0], "gates": gates}
    four = {"terms": [0, 1, 2, 0], "weights": torch.cat([weights, weights[:, :1]], 1), "gate_of": [0, -1, 1, 0]}
    gates = some_gates(rows, index, [2, 1], [OUTSIDE["of"], OUTSIDE["drop"]])
    return out | {"two gates": base | four | floor | masks | {"shifts": shift, "gates": gates}}


def check(found: Mixed, want: Mixed) -> None:
    # No number here is above 40, and none is the sum of more than a dozen roundings of at most 2e-6 each.
    for got, wanted in zip(found, want):
        assert not got.isnan().any()
        assert torch.equal(got == -torch.inf, wanted == -torch.inf)
        assert torch.allclose(got, wanted, rtol=0.0, atol=2.5e-5)


def run(name: str, module: ModuleType = subject) -> None:
    given = cases()[name]
    check(module.mix(**given, kernel=True), mix_reference(**given))


@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.parametrize("chunk", [32, 128])
def test_the_kernels_do_what_the_reference_does(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "CHUNK", chunk)
    run(name)


def test_one_token_and_no_rows() -> None:
    x, none = torch.tensor([[2.0, 3.0]]), torch.zeros(1, 0, dtype=torch.int64)
    z, best, lse = mix([x], torch.zeros(1, 1, dtype=torch.int64), 1, torch.ones(1, 1), [0], kernel=True)
    assert (z.tolist(), best.tolist(), lse.tolist()) == ([[2.0]], [2.0], [2.0])
    assert mix([x], none, 1, torch.ones(0, 1), [0], kernel=True).z.shape == (0, 1)


def test_a_row_without_a_token_is_all_minus_infinity() -> None:
    rows, index = tracks()
    bits = torch.zeros(1, 3, dtype=torch.int32)
    edits = some_edits()._replace(relative=torch.ones(N, dtype=torch.bool))
    masked = {"bits": bits, "mask_of": torch.zeros(N, dtype=torch.int32), "edits": edits}
    floor = (0, torch.zeros(N))
    found = mix(rows, index, WIDTH, torch.ones(N, 3), [0, 1, 2], floor=floor, **masked, kernel=True)  # type: ignore[arg-type]
    assert (found.z == -torch.inf).all()
    assert found.policy_lse.isfinite().tolist() == [True, True, True, False]  # row 3: a model with nothing finite


@pytest.mark.parametrize("outside", list(OUTSIDE))
@pytest.mark.parametrize("logprobs", [False, True])
def test_the_reference_mixes_as_the_engine_does(outside: Any, logprobs: bool) -> None:
    rows, index = tracks()
    index[1, 1], index[2, 3] = 3, 1  # whole rows: where one is broken, a gate of the engine's lets everything pass
    weights = torch.tensor([[1.0, 0.5, -0.5], [1.0, 0.0, 2.0], [0.3, 1.0, -1.0], [1.0, 0.7, 0.0]])
    gating = Gating(1, (0.8,) * N, outside)
    want = TorchRows([(x, i.tolist()) for x, i in zip(rows, index)], WIDTH, logprobs).mix(
        [0, 1, 2], weights, [None, gating, gating]
    )
    gates = some_gates(rows, index, [1], [OUTSIDE[outside]])
    shift = shifts(rows, index) if logprobs else None
    z = mix_reference(rows, index, WIDTH, weights, [0, 1, 2], shift, [-1, 0, 0], gates).z
    assert torch.equal(z == -torch.inf, want == -torch.inf)
    assert torch.allclose(z, want, rtol=0.0, atol=2e-5)


def test_the_reference_cuts_the_implausible_as_the_engine_does() -> None:
    rows, index = tracks()
    weights, ratios = torch.ones(N, 3), torch.tensor([0.1, 0.2, 0.5, 0.3]).log()
    bits, mask_of = some_masks()
    free = mix_reference(rows, index, WIDTH, weights, [0, 1, 2]).z
    found = mix_reference(rows, index, WIDTH, weights, [0, 1, 2], floor=(0, ratios), bits=bits, mask_of=mask_of)
    allowed = mix_reference(rows, index, WIDTH, weights, [0, 1, 2], bits=bits, mask_of=mask_of).z > -torch.inf
    by = rows[0][index[0], :WIDTH]
    want = cut_below(free, by, by.masked_fill(~allowed, -torch.inf).amax(1) + ratios)
    assert torch.equal(found.policy_best, want.amax(1))
    assert torch.equal(found.z, want.masked_fill(~allowed, -torch.inf))


@pytest.mark.parametrize("terms", [1, 2])
def test_masks_and_edits_are_the_engines_processors(terms: int) -> None:
    torch.manual_seed(3)
    row = torch.randn(1, WIDTH) * 4
    asked = Sampling(
        repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.25,
        logit_bias=((2, 3.0), (9, -1.0), (4, 2.0)), allowed_token_ids=tuple(range(0, WIDTH, 2)),
    )  # fmt: skip
    seq = sequence(asked, [2, 4, 4, 6, 7], prompt=(8, 4), terms=terms)
    seq.group = replace(seq.group, width=WIDTH)
    want = row[0].clone()
    process(want, Position(seq))
    counts, bias = {2: 1, 4: 2, 6: 1, 7: 1}, dict(asked.logit_bias)
    ids = sorted({*counts, *bias, 8})
    add = [bias.get(i, 0.0) - (0.5 + 0.25 * counts[i] if i in counts else 0.0) for i in ids]
    times = [1.7 if i in counts or i == 8 else 1.0 for i in ids]
    start = torch.tensor([0, len(ids)], dtype=torch.int32)
    edits = Edits(start, torch.tensor(ids).int(), torch.tensor(add), torch.tensor(times), torch.tensor([terms > 1]))
    mask = torch.zeros(1, 96, dtype=torch.bool)
    mask[0, 0:WIDTH:2] = True
    given = {"bits": packed(mask), "mask_of": torch.zeros(1, dtype=torch.int32), "edits": edits}
    for kernel in (False, True):
        z = mix([row], torch.zeros(1, 1).long(), WIDTH, torch.ones(1, 1), [0], **given, kernel=kernel).z[0]  # type: ignore[arg-type]
        assert torch.equal(z == -torch.inf, want == -torch.inf)
        assert torch.allclose(z.log_softmax(0), want.log_softmax(0), rtol=0.0, atol=2e-5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    rows, index = tracks()
    with pytest.raises(ValueError, match="tracks"):
        mix(rows[:2], index, WIDTH, torch.ones(N, 3), [0, 1, 2])
    with pytest.raises(ValueError, match="masks"):
        mix(rows, index, WIDTH, torch.ones(N, 3), [0, 1, 2], bits=torch.zeros(1, 2, dtype=torch.int32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("(x == least) & (at > last)", "(x == least) & (at >= last)", "gates base"),
        ("sound & (known | (use == 0))", "sound & known", "log-probs"),
        ("& (weight != 0.0)", "", "logits"),
        ("v - tl.where(known, shift, 0.0)", "v", "log-probs"),
        ("usable = allowed & ", "usable = ", "floor, masks and edits"),
        ("(v > 0, v / times, v * times)", "(v > 0, v * times, v / times)", "masks and edits"),
        ("part + 2 * step, part + 3 * step", "part, part + step", "masks and edits"),
        ("tl.store(part + 2 * step, best)", "tl.store(part, best)", "masks and edits"),
    ],
)
def test_broken_kernels_are_noticed(old: str, new: str, name: str, tmp_path: Path) -> None:
    module = mutated(subject.__file__, old, new, tmp_path)
    module.CHUNK = 32  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        run(name, module)
