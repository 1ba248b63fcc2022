"""Every strategy against its formula written out in numpy, one token at a time, all of them in one batch."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from decoding.accept import verify as verify_checks
from decoding.core import BadRequest, EngineConfig, Program, Request, Role, Sampling
from decoding.engine import Engine
from decoding.events import Delta, Failed
from decoding.solvers import Fusion
from decoding.strategies import STRATEGIES
from decoding.strategies.reward_guided import Arm, Objective
from tests.fakes import EOS, TableModel, random_table, table_engine, verify_rows

NAMES = ("base", "expert", "anti", "other")
CONFIG = EngineConfig(block_size=4, max_num_batched_tokens=16, max_num_seqs=64)
WIDTH = 257
Rows = dict[str, np.ndarray[Any, Any]]  # term name -> logits [W]


def lp(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    z = z.astype(np.float64)
    top = z.max()
    result: np.ndarray[Any, Any] = z - top - math.log(np.exp(z - top).sum())
    return result


def top_set(z: np.ndarray[Any, Any], p: float) -> np.ndarray[Any, Any]:
    order = np.argsort(-z, kind="stable")
    mass = np.cumsum(np.exp(lp(z))[order])
    inside = np.zeros(len(z), bool)
    inside[order[: int((mass < p).sum()) + 1]] = True
    return inside


def plausible(z: np.ndarray[Any, Any], of: np.ndarray[Any, Any], ratio: float) -> np.ndarray[Any, Any]:
    keep = np.exp(lp(of)) >= ratio * np.exp(lp(of)).max()
    return np.where(keep, z, -np.inf)


def eft(w: list[float], top_p: float | None, outside: str, amplify: float) -> Callable[[Rows], np.ndarray[Any, Any]]:
    def formula(r: Rows) -> np.ndarray[Any, Any]:
        z = lp(r["base"])
        out = z.copy()
        for i, weight in enumerate(w):
            suffix = "" if i == 0 else f"_{i + 1}"
            tuned, ref = lp(r["tuned" + suffix]), lp(r["reference" + suffix])
            inside = np.ones(len(z), bool) if top_p is None else top_set(tuned, top_p)
            out += weight * np.where(inside, tuned - ref, 0.0)
            if outside == "drop":
                out[~inside] = -np.inf
            if outside == "tuned":
                out = np.where(inside, out, tuned)
        if amplify != 1:
            out += (amplify - 1) * (z - lp(r["reference"]))
        return out

    return formula


def fusion(r: Rows) -> np.ndarray[Any, Any]:
    experts = [lp(r[name]) for name in sorted(r) if name.startswith("expert")]
    base, small = lp(r["base"]), lp(r["small"])

    def kl(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
        return float((np.exp(a) * (a - b)).sum())

    best = (math.inf, 0.0, 0)
    for a in np.arange(21) * 0.1:
        for i, expert in enumerate(experts):
            fused = lp(base + a * (expert - small))
            loss = sum((kl(fused, base) - kl(t, small)) ** 2 + (kl(base, fused) - kl(small, t)) ** 2 for t in experts)
            if loss < best[0]:
                best = (loss, a, i)
    return base + best[1] * (experts[best[2]] - small)


Case = tuple[str, dict[str, Any], Callable[[Rows], np.ndarray[Any, Any]]]
CASES: list[Case] = [
    ("plain", {}, lambda r: r["base"]),
    *(
        (
            "proxy_tuning",
            {"expert": "expert", "anti": "anti", "alpha": a},
            lambda r, a=a: r["base"] + a * (r["expert"] - r["anti"]),
        )
        for a in (0.5, 1.5)
    ),
    (
        "cfg",
        {"negative_prompt": "x", "guidance": 1.7},
        lambda r: r["negative"] + 1.7 * (r["positive"] - r["negative"]),
    ),
    *(
        (
            "contrastive",
            {"amateur": "anti", "weight": 0.5, "plausibility": p},
            lambda r, p=p: plausible(1.5 * r["base"] - 0.5 * r["amateur"], r["base"], p),
        )
        for p in (0.0, 0.1, 1.0)
    ),
    (
        "contrastive_prompt",
        {"better": "b", "worse": "w", "weight": 0.8},
        lambda r: r["base"] + 0.8 * (r["better"] - r["worse"]),
    ),
    (
        "reward_guided",
        {"arms": [Arm("expert", 0.7), Arm("anti", 0.3)], "beta": 0.5},
        lambda r: lp(r["base"]) + (0.7 * lp(r["arm_1"]) + 0.3 * lp(r["arm_2"])) / 0.5,
    ),
    (
        "multi_objective",
        {"models": [Objective("expert", 0.4), Objective("anti", 0.6)]},
        lambda r: 0.4 * lp(r["objective_1"]) + 0.6 * lp(r["objective_2"]),
    ),
    *(
        (
            "unlearning",
            {"assistant": "expert", "weight": w, "plausibility": 0.01},
            lambda r, w=w: plausible(r["base"] - (w * r["assistant"] if w else 0), r["base"], 0.01),
        )
        for w in (0.0, 0.8)
    ),
    *(
        (
            "emulated_fine_tuning",
            {
                "tuned": "expert",
                "reference": "anti",
                "weights": [w],
                "top_p": p,
                "outside": outside,
                "amplify": amplify,
            },
            eft([w], p, outside, amplify),
        )
        for w, p, outside, amplify in [
            (1.0, None, "base", 1.0),
            (0.7, 0.9, "base", 1.5),
            (1.0, 0.5, "drop", 1.0),
            (1.0, 0.5, "tuned", 1.0),
        ]
    ),
    (
        "emulated_fine_tuning",
        {"tuned": ["expert", "other"], "reference": "anti", "weights": [0.7, 0.4], "top_p": 0.8},
        eft([0.7, 0.4], 0.8, "base", 1.0),
    ),
    ("dynamic_fusion", {"experts": ["expert"], "small": "anti", "mode": "paper"}, fusion),
    ("dynamic_fusion", {"experts": ["expert", "other"], "small": "anti", "mode": "paper"}, fusion),
]


def models(shift: dict[str, float] | None = None, scale: float = 3.0) -> dict[str, TableModel]:
    return {
        name: TableModel(name, random_table(i, scale=scale) + (shift or {}).get(name, 0.0), memory=6)
        for i, name in enumerate(NAMES)
    }


def build(kind: str, params: dict[str, Any]) -> Program:
    return STRATEGIES[kind].build(STRATEGIES[kind].params(**params), "base")


def prompt_of(role: Role, salt: int) -> tuple[int, ...]:
    """A prompt per model and view, of different lengths, as the server would render them."""
    seed = len(repr(role.view)) + len(role.model)
    return tuple((17 * seed + 31 * j + salt) % 256 for j in range(5 + 3 * (seed % 4)))


def requests(cases: list[Case], **changes: Any) -> list[Request]:
    made = []
    for i, (kind, params, _) in enumerate(cases):
        program = build(kind, params)
        prompts = tuple(prompt_of(term.role, i) for term in program.policy.terms)
        sampling = dataclasses.replace(Sampling(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=3), **changes)
        made.append(Request(f"{i}-{kind}", program, prompts, sampling, "base", WIDTH, (EOS,)))
    return made


def run(engine: Engine, made: list[Request]) -> dict[str, tuple[list[int], list[Any]]]:
    out: dict[str, tuple[list[int], list[Any]]] = {req.id: ([], []) for req in made}
    for req in made:
        engine.submit(pickle.loads(pickle.dumps(req)))  # as it goes to the engine's process
    while engine.has_work():
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Delta):
                out[event.request_id][0].extend(event.token_ids)
                out[event.request_id][1].extend(event.logprobs)
        engine.check()
    return out


def rows_of(fakes: dict[str, TableModel], req: Request, out: list[int]) -> Rows:
    return {
        term.name: fakes[term.role.model].row([*prompt, *out]).numpy().astype(np.float64)
        for term, prompt in zip(req.program.policy.terms, req.prompts, strict=True)
    }


def test_every_strategy_equals_its_formula_with_all_of_them_in_one_batch() -> None:
    made = requests(CASES)
    got = run(table_engine(models(), CONFIG), made)
    fakes = models()
    for req, (_, _, formula) in zip(made, CASES, strict=True):
        ids, entries = got[req.id]
        out: list[int] = []
        for step in range(12):
            z = formula(rows_of(fakes, req, out))
            assert ids[step] == int(np.argmax(z)), (req.id, step)
            assert entries[step].logprob == pytest.approx(lp(z)[ids[step]], abs=1e-4), req.id
            out.append(ids[step])


def test_nudging_equals_its_rule() -> None:
    """Written as the paper's loop over words, not as a state machine over tokens."""
    case: Case = ("nudging", {"nudger": "expert", "threshold": 0.2}, lambda r: r["base"])
    starts = {ord(" "), ord("\n"), EOS}
    fakes = models(scale=2.0)
    for table in (fakes["base"].table, fakes["expert"].table):
        table[:, 32] += 4.0  # spaces often enough for words
    req = requests([case], max_tokens=60)[0]
    ids, _ = run(table_engine(fakes, CONFIG), [req])[req.id]
    out: list[int] = []
    nudged = 0
    while len(out) < 60:
        rows = rows_of(fakes, req, out)
        if np.exp(lp(rows["base"])).max() >= 0.2:
            out.append(int(rows["base"].argmax()))
            continue
        out.append(int(rows["nudger"].argmax()))
        nudged += 1
        while len(out) < 60 and (token := int(rows_of(fakes, req, out)["nudger"].argmax())) not in starts:
            out.append(token)
            nudged += 1
    assert ids == out[:60]
    assert 5 < nudged < 55


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [64.0, -64.0])
def test_no_policy_sees_a_constant_added_to_a_models_logits(name: str, shift: float) -> None:
    cases = [*CASES, ("nudging", {"nudger": "expert", "threshold": 0.2}, lambda r: r["base"])]
    made = requests(cases, repetition_penalty=1.0)
    plain = run(table_engine(models(), CONFIG), made)
    shifted = run(table_engine(models({name: shift}), CONFIG), made)
    for req in made:
        assert shifted[req.id][0] == plain[req.id][0], req.id
        wanted = [entry.logprob for entry in plain[req.id][1]]
        assert [entry.logprob for entry in shifted[req.id][1]] == pytest.approx(wanted, abs=2e-3)


def test_unlearning_never_says_a_masked_token_however_its_logits_are_shifted() -> None:
    """In the authors' code masked tokens have logit 0, and so win where all kept logits are negative."""
    fakes = models(dict.fromkeys(NAMES, -64.0))
    case: Case = ("unlearning", {"assistant": "expert", "weight": 0.8, "plausibility": 0.05}, lambda r: r["base"])
    req = requests([case], temperature=2.0, seed=1, max_tokens=200)[0]
    ids, _ = run(table_engine(fakes, CONFIG), [req])[req.id]
    for i, token in enumerate(ids):
        p = np.exp(lp(rows_of(fakes, req, ids[:i])["base"]))
        assert p[token] >= 0.05 * p.max() * (1 - 1e-5)


def test_plausibility_is_relative_to_the_best_allowed_token() -> None:
    fakes = models()
    case: Case = ("contrastive", {"amateur": "anti", "weight": 0.5, "plausibility": 0.5}, lambda r: r["base"])
    allowed = (3, 4, 5)
    req = requests([case], allowed_token_ids=allowed, max_tokens=30)[0]
    ids, _ = run(table_engine(fakes, CONFIG), [req])[req.id]
    for i, token in enumerate(ids):
        rows = rows_of(fakes, req, ids[:i])
        base = {t: rows["base"][t] for t in allowed}
        kept = [t for t in allowed if base[t] >= max(base.values()) + math.log(0.5)]
        assert token == max(kept, key=lambda t: 1.5 * rows["base"][t] - 0.5 * rows["amateur"][t])


def test_infinite_logits_give_no_nan_and_zero_weights_leave_them_out() -> None:
    fakes = models()
    fakes["expert"].table[:, 50:] = -torch.inf
    cases: list[Case] = [case for case in CASES if case[0] != "plain"]
    got = run(table_engine(fakes, CONFIG), requests(cases))
    for req_id, (ids, entries) in got.items():
        assert all(math.isfinite(entry.logprob) for entry in entries), req_id
        assert len(ids) == 12
    proxied = next(ids for req_id, (ids, _) in got.items() if "proxy" in req_id)
    assert max(proxied) < 50
    zero: Case = ("proxy_tuning", {"expert": "expert", "anti": "anti", "alpha": 0.0}, lambda r: r["base"])
    plain: Case = ("plain", {}, lambda r: r["base"])
    req, same = requests([zero])[0], requests([plain])[0]
    same = dataclasses.replace(same, prompts=req.prompts[:1])
    assert run(table_engine(fakes, CONFIG), [req])[req.id] == run(table_engine(models(), CONFIG), [same])[same.id]


def one(kind: str, params: dict[str, Any], prompts: tuple[int, ...] = (1, 2, 3)) -> list[int]:
    program = build(kind, params)
    sampling = Sampling(temperature=0.0, max_tokens=20, ignore_eos=True)
    req = Request("one", program, (prompts,) * len(program.policy.terms), sampling, "base", WIDTH, (EOS,))
    return run(table_engine(models(), CONFIG), [req])["one"][0]


def test_identities() -> None:
    base = one("plain", {})
    assert one("proxy_tuning", {"expert": "expert", "anti": "anti", "alpha": 0.0}) == base
    assert one("proxy_tuning", {"expert": "expert", "anti": "expert"}) == base
    assert one("reward_guided", {"arms": [Arm("expert")], "beta": 1e9}) == base
    assert one("reward_guided", {"arms": [Arm("expert", 0.0)]}) == base
    assert one("contrastive", {"amateur": "anti", "weight": 0.0}) == base
    assert one("unlearning", {"assistant": "anti", "weight": 0.0}) == base
    assert one("cfg", {"negative_prompt": "x", "guidance": 1.0}) == base
    assert one("contrastive_prompt", {"better": "b", "worse": "b"}) == base
    expert = one("multi_objective", {"models": [Objective("expert", 1.0), Objective("anti", 0.0)]})
    proxy = STRATEGIES["plain"].build(STRATEGIES["plain"].params(), "expert")
    sampling = Sampling(temperature=0.0, max_tokens=20, ignore_eos=True)
    alone = Request("one", proxy, ((1, 2, 3),), sampling, "expert", WIDTH, (EOS,))
    assert expert == run(table_engine(models(), CONFIG), [alone])["one"][0]
    pair = {"tuned": "expert", "reference": "anti", "weights": [0.6]}
    assert one("emulated_fine_tuning", pair) == one("proxy_tuning", {"expert": "expert", "anti": "anti", "alpha": 0.6})
    assert one("dynamic_fusion", {"experts": ["expert"], "small": "base"}) == expert
    assert one("dynamic_fusion", {"experts": ["anti"], "small": "anti"}) == base
    assert one("nudging", {"nudger": "expert", "threshold": 0.0}) == base
    assert one("nudging", {"nudger": "expert", "threshold": 1.0}) == expert


def test_one_prompt_of_one_model_is_computed_once_for_all_its_terms() -> None:
    fakes = models()
    program = build("emulated_fine_tuning", {"tuned": ["expert", "other"], "reference": "anti", "amplify": 1.5})
    sampling = Sampling(temperature=0.0, max_tokens=5, ignore_eos=True)
    req = Request("r", program, ((1, 2, 3),) * len(program.policy.terms), sampling, "base", WIDTH, (EOS,))
    run(table_engine(fakes, CONFIG), [req])
    assert [sum(len(s.token_ids) for spans in fakes[name].spans for s in spans) for name in NAMES] == [7] * 4


def test_a_trace_shows_every_roles_part() -> None:
    cases = [*CASES, ("nudging", {"nudger": "expert", "threshold": 0.2}, lambda r: r["base"])]
    made = requests(cases, logprobs=None, temperature=1.5, seed=4)
    made = [dataclasses.replace(req, program=dataclasses.replace(req.program, trace=True)) for req in made]
    plain = run(table_engine(models(), CONFIG), requests(cases, logprobs=None, temperature=1.5, seed=4))
    engine, fakes = table_engine(models(), CONFIG), models()
    for req in made:
        engine.submit(req)
    traces: dict[str, list[Any]] = {req.id: [] for req in made}
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Delta):
                assert event.logprobs == ()
                traces[event.request_id] += event.trace
    for req, (_, _, formula) in zip(made, cases, strict=True):
        ids = [entry.token_id for entry in traces[req.id]]
        assert ids == plain[req.id][0]  # tracing changes nothing
        for i, entry in enumerate(traces[req.id]):
            rows = rows_of(fakes, req, ids[:i])
            for role in entry.roles:
                assert role.logprob == pytest.approx(lp(rows[role.role])[entry.token_id], abs=1e-4)
            first = rows[entry.roles[0].role]
            assert entry.rank == int((first > first[entry.token_id]).sum())
            if req.program.policy.solver is None:
                assert entry.logprob == pytest.approx(lp(formula(rows))[entry.token_id], abs=1e-4)
        names = {term.name for term in req.program.policy.terms if term.weight or req.program.policy.solver}
        assert {role.role for role in traces[req.id][0].roles} >= names


def test_echo_scores_the_mixed_distribution() -> None:
    fakes = models()
    prompt = tuple(range(20, 50))
    for kind, params, formula in CASES:
        program = build(kind, params)
        sampling = Sampling(temperature=0.0, max_tokens=0, prompt_logprobs=0)
        req = Request("e", program, (prompt,) * len(program.policy.terms), sampling, "base", WIDTH, (EOS,))
        engine = table_engine(models(), CONFIG)
        engine.submit(req)
        events = [event for _ in range(20) for event in engine.step()]
        for i, entry in enumerate(events[0].logprobs[1:], 1):
            rows = {
                t.name: fakes[t.role.model].row(prompt[:i]).numpy().astype(np.float64) for t in program.policy.terms
            }
            want = lp(formula(rows))[prompt[i]]
            assert entry.logprob == pytest.approx(want, abs=1e-4) or (entry.logprob == want == -math.inf)


@pytest.mark.parametrize(
    ("kind", "params", "names"),
    [
        ("proxy_tuning", {"expert": "e", "anti": "a", "alpha": math.nan}, "alpha"),
        ("contrastive", {"amateur": "a", "plausibility": 1.5}, "plausibility"),
        ("contrastive", {"amateur": "a", "weight": math.inf}, "weight"),
        ("cfg", {"negative_prompt": ""}, "negative_prompt"),
        ("reward_guided", {"arms": []}, "arms"),
        ("reward_guided", {"arms": [Arm("x")], "beta": 0.0}, "beta"),
        ("reward_guided", {"arms": [Arm("x", math.nan)]}, "arms"),
        ("reward_guided", {"arms": [Arm("x", 1.0, {"nonsense": "y"})]}, "arms"),
        ("multi_objective", {"models": []}, "models"),
        ("unlearning", {"assistant": "a", "plausibility": -0.1}, "plausibility"),
        ("nudging", {"nudger": "n", "threshold": 2.0}, "threshold"),
        ("emulated_fine_tuning", {"tuned": ["a", "b"], "reference": ["c", "d", "e"]}, "reference"),
        ("emulated_fine_tuning", {"tuned": ["a", "b"], "reference": ["c", "d"], "amplify": 2.0}, "amplify"),
        ("emulated_fine_tuning", {"tuned": ["a", "b"], "reference": "c", "weights": [1.0]}, "weights"),
        ("emulated_fine_tuning", {"tuned": "a", "reference": "c", "top_p": 1.5}, "top_p"),
        ("emulated_fine_tuning", {"tuned": ["a", "b"], "reference": "c", "top_p": 0.5, "outside": "tuned"}, "outside"),
        ("dynamic_fusion", {"experts": [], "small": "s"}, "experts"),
        ("dynamic_fusion", {"experts": ["e"], "small": "s", "step": 0.0}, "step"),
        ("dynamic_fusion", {"experts": ["e"], "small": "s", "max_alpha": 1000.0}, "max_alpha"),
    ],
)  # fmt: skip
def test_bad_parameters_name_themselves(kind: str, params: dict[str, Any], names: str) -> None:
    with pytest.raises(BadRequest) as refused:
        build(kind, params)
    assert refused.value.param == names


def test_solvers_are_plain_data() -> None:
    assert pickle.loads(pickle.dumps(Fusion(True, 1.0, 0.5))) == Fusion(True, 1.0, 0.5)
    assert len({Fusion(), Fusion(), Fusion(step=0.2)}) == 2


@pytest.mark.parametrize("draws", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]))
def test_samples_follow_the_exact_distribution(case: Case, draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws from the row that the engine mixed, against softmax of the formula in float64."""
    import decoding.decide as module

    caught: list[tuple[torch.Tensor, Any]] = []

    def spy(z: torch.Tensor, checks: Any, generator: torch.Generator) -> Any:
        caught.append((z.clone(), [check.sequence for check in checks]))
        return verify_checks(z, checks, generator)

    monkeypatch.setattr(module, "verify", spy)
    req = requests([case], max_tokens=1, temperature=1.0, logprobs=None)[0]
    run(table_engine(models(), CONFIG), [req])
    (z, (sequence,)) = caught[0]
    sequence.output.clear()
    sequence.counts.clear()
    generator = torch.Generator().manual_seed(11)
    counts = np.zeros(WIDTH)
    for _ in range(draws // 10_000):
        drawn = verify_rows(z.repeat(10_000, 1), [sequence] * 10_000, generator)
        counts += np.bincount([each.token for each in drawn if each.token is not None], minlength=WIDTH)
    p = np.exp(lp(case[2](rows_of(models(), req, []))))
    assert counts[p == 0].sum() == 0
    common = p * draws >= 5
    observed = [*counts[common], counts[~common].sum()]
    expected = [*(p[common] * draws), p[~common].sum() * draws]
    if expected[-1] < 5:  # the rare ones together are too rare to test: they go with the last of the others
        observed = [*observed[:-2], observed[-2] + observed[-1]]
        expected = [*expected[:-2], expected[-2] + expected[-1]]
    if len(expected) > 1:
        assert chisquare(observed, np.array(expected) * sum(observed) / sum(expected)).pvalue > 1e-4


def test_every_strategy_equals_full_recompute_on_real_models() -> None:
    """Tiny random Llamas in fp32, a prompt per view, all strategies and gates in one batch."""
    from decoding.admit import Hosted
    from decoding.runner import Runner
    from decoding.text import TextModel
    from tests.decoding.test_hosted_engine import tiny_llama
    from tests.fakes import byte_tokenizer

    text = byte_tokenizer()
    runners = {name: Runner(tiny_llama(i, WIDTH, 2), name) for i, name in enumerate(NAMES)}
    engine = Engine({n: Hosted(r, TextModel(n, text)) for n, r in runners.items()}, CONFIG)
    made = requests(CASES, max_tokens=6)
    got = run(engine, made)
    references = {name: tiny_llama(i, WIDTH, 2) for i, name in enumerate(NAMES)}
    for req, (_, _, formula) in zip(made, CASES, strict=True):
        ids, entries = got[req.id]
        for step in range(6):
            rows = {}
            for term, prompt in zip(req.program.policy.terms, req.prompts, strict=True):
                with torch.no_grad():
                    logits = references[term.role.model](torch.tensor([[*prompt, *ids[:step]]])).logits[0, -1]
                rows[term.name] = logits.numpy().astype(np.float64)
            z = formula(rows)
            assert ids[step] == int(np.argmax(z)), (req.id, step)
            assert entries[step].logprob == pytest.approx(lp(z)[ids[step]], abs=1e-4), req.id
