"""Adapters beside each other and the bare model in one packed forward, against PEFT's own, one model at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from decoding.core import (
    AdapterInUse,
    BadRequest,
    EngineConfig,
    ModelLoadError,
    ModelSpec,
    Policy,
    Program,
    Request,
    Role,
    Sampling,
    Speculation,
    Term,
    UnknownModel,
    View,
)
from decoding.engine import Engine
from decoding.events import Delta, Event
from decoding.generate import collect, load_models
from decoding.host_build import load_kernels
from decoding.host_compile import CompiledForward
from decoding.hosting import SpanInput
from decoding.lora import FEW_TOKENS
from decoding.prepare import Entry, prepare
from decoding.runner import Runner
from decoding.strategies import STRATEGIES
from decoding.text import TextModel
from decoding.texts import load_texts
from tests.fakes import byte_tokenizer
from tests.tiny import tiny_directory, tiny_model

pytestmark = [  # of PEFT's making
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning"),
]
LLAMA: dict[str, Any] = {"vocab_size": 257, "max_position_embeddings": 256, "eos_token_id": 256, "bos_token_id": None}
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "two": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 4, "lora_alpha": 4, "target_modules": EVERY},
    "stabilised": {"r": 16, "lora_alpha": 8, "target_modules": ["gate_proj", "up_proj"], "use_rslora": True},
    "down": {"r": 2, "lora_alpha": 7, "target_modules": ["down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"o_proj": 6, "layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"q_proj": 2},
    },
    "middle": {"r": 8, "lora_alpha": 8, "target_modules": ["k_proj"], "layers_to_transform": [1]},
    "regex": {"r": 5, "lora_alpha": 9, "target_modules": r".*\.[02]\.mlp\.(up|down)_proj"},
    "linear": {"r": 1, "lora_alpha": 3, "target_modules": "all-linear", "exclude_modules": ["k_proj"]},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_adapter(path: Path, model: Any, seed: int, **config: Any) -> Path:
    """A random LoRA as PEFT saves it; B is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * (0.3 if "lora_A" in name else 0.1))
    tuned.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    tiny_directory("llama", root / "base", **LLAMA)
    byte_tokenizer().save_pretrained(root / "base")
    for i, (name, config) in enumerate(ADAPTERS.items()):
        make_adapter(root / name, tiny_model("llama", **LLAMA), i, **config)
    return root


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str | None, Any]:
    """PEFT's own models, and the bare base under None."""
    models: dict[str | None, Any] = {None: tiny_model("llama", **LLAMA)}
    for name in ADAPTERS:
        models[name] = PeftModel.from_pretrained(tiny_model("llama", **LLAMA), folder / name).eval()
    return models


def make_runner(folder: Path, names: Any = tuple(ADAPTERS), **options: Any) -> Runner:
    runner = Runner(tiny_model("llama", **LLAMA), "base", **options)
    runner.allocate(64, 16)
    for name in names:
        runner.load_adapter(name, str(folder / name))
    return runner


def ids_of(seed: int, length: int) -> list[int]:
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=noise).tolist()


@torch.no_grad()
def own_logits(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


# -- one packed forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [True, False])
def test_eight_adapters_and_the_bare_model_in_one_forward(
    folder: Path, references: dict[str | None, Any], kernels: bool
) -> None:
    """Long stretches (a prompt of 5 to 21 tokens each), then one token each; the bare model stands between them."""
    runner = make_runner(folder, kernels=kernels)
    order = [*list(ADAPTERS)[:4], None, *list(ADAPTERS)[4:]]
    prompts = {name: ids_of(i, 5 + 2 * i) for i, name in enumerate(order)}
    blocks = {name: [2 * i, 2 * i + 1] for i, name in enumerate(order)}
    want = {name: own_logits(references[name], prompts[name]) for name in order}
    for name in ADAPTERS:  # each adapter matters, or the comparison would show nothing
        assert (want[name] - own_logits(references[None], prompts[name])).abs().max() > 0.05

    assert sum(len(ids) - 1 for ids in prompts.values()) > FEW_TOKENS
    long = [SpanInput(prompts[n][:-1], 0, blocks[n], range(len(prompts[n]) - 1), n) for n in order]
    got = runner.forward(long).logits.split([len(span.rows) for span in long])
    for name, rows in zip(order, got, strict=True):
        torch.testing.assert_close(rows, want[name][:-1], atol=1e-5, rtol=1e-5)

    short = [SpanInput(prompts[n][-1:], len(prompts[n]) - 1, blocks[n], [0], n) for n in order]
    chosen = runner.loras.choose(short, runner._like)
    assert chosen is not None
    one_call = (chosen.owners is not None, bool(chosen.masks))
    assert one_call == (runner._kernels, not runner._kernels), "few tokens: one call a layer"
    for name, row in zip(order, runner.forward(short).logits, strict=True):
        torch.testing.assert_close(row, want[name][-1], atol=1e-5, rtol=1e-5)
    runner.close()


@pytest.mark.parametrize("kernels", [True, False])
def test_one_of_eight_adapters_and_neighbours_that_share_one(
    folder: Path, references: dict[str | None, Any], kernels: bool
) -> None:
    runner = make_runner(folder, kernels=kernels)
    prompts = [ids_of(i, 4 + i) for i in range(3)]
    spans = [SpanInput(ids, 0, [i], [len(ids) - 1], "all") for i, ids in enumerate(prompts)]
    chosen = runner.loras.choose(spans, runner._like)
    assert chosen is not None
    assert chosen.runs == (("all", 0, 15),)
    assert not chosen.masks, "eight times the work for one adapter"
    for ids, row in zip(prompts, runner.forward(spans).logits, strict=True):
        torch.testing.assert_close(row, own_logits(references["all"], ids)[-1], atol=1e-5, rtol=1e-5)
    runner.close()


def test_a_bare_forward_is_bit_for_bit_what_it_was(folder: Path) -> None:
    runner = make_runner(folder, ())
    span = [SpanInput(ids_of(1, 9), 0, [0], range(9))]
    before = runner.forward(span).logits
    for name in ADAPTERS:
        runner.load_adapter(name, str(folder / name))
    assert torch.equal(runner.forward(span).logits, before)
    assert runner.loras.choose(span, runner._like) is None
    for name in ADAPTERS:
        runner.unload_adapter(name)
    assert runner.loras.bytes() == 0
    assert not any(module._forward_hooks for module in runner.loras.linears.values()), "nothing is left behind"
    assert torch.equal(runner.forward(span).logits, before)
    with pytest.raises(KeyError):
        runner.unload_adapter("all")
    with pytest.raises(KeyError, match="no adapter 'all'"):
        runner.forward([SpanInput([1], 0, [0], [0], "all")])
    runner.close()


def test_unloading_and_reloading_leaves_the_others_alone(folder: Path, references: dict[str | None, Any]) -> None:
    runner = make_runner(folder)
    runner.unload_adapter("all")
    first = runner.load_adapter("two", str(folder / "down"))  # another adapter under a known id
    again = runner.load_adapter("two", str(folder / "two"))
    assert first.generation != again.generation
    assert again == runner.load_adapter("two", str(folder / "two"))
    assert again.parameters == 3 * 8 * ((32 + 32) + (32 + 16))
    ids = ids_of(3, 12)
    rest = [name for name in ADAPTERS if name != "all"]
    spans = [SpanInput(ids, 0, [i], [11], name) for i, name in enumerate(rest)]
    for name, row in zip(rest, runner.forward(spans).logits, strict=True):
        torch.testing.assert_close(row, own_logits(references[name], ids)[-1], atol=1e-5, rtol=1e-5)
    runner.close()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the compiled graphs that were run, in order; every model is worth compiling."""
    used: list[str] = []
    run = CompiledForward._run

    def spy(self: CompiledForward, name: str, *rest: Any) -> Any:
        used.append(name)
        return run(self, name, *rest)

    monkeypatch.setattr(CompiledForward, "_run", spy)
    return used


Check = Callable[..., None]


def checker(runner: Runner, references: dict[str | None, Any]) -> Check:
    """`check(names, length)`: the first of `names`, then all of them, in one forward each, equal PEFT's logits."""

    def check(names: list[str | None], length: int = 10) -> None:
        ids = ids_of(4, length)
        for count in (1, len(names)):
            spans = [SpanInput(ids, 0, [i], range(length), name) for i, name in enumerate(names[:count])]
            for name, rows in zip(names, runner.forward(spans).logits.split(length)):
                torch.testing.assert_close(rows, own_logits(references[name], ids), atol=1e-5, rtol=1e-5)

    return check


def test_the_compiled_forward_stays_the_bare_models(
    folder: Path, references: dict[str | None, Any], graphs: list[str]
) -> None:
    """Adapters that come before it was compiled and after, and ones that go: no guard is checked any more."""
    runner = make_runner(folder, ["two"])
    assert runner.warm_up() == runner._kernels
    graphs.clear()
    check = checker(runner, references)
    check([None, None])
    check(["two", None])
    runner.load_adapter("all", str(folder / "all"))
    check(["all", "two"])
    check([None, None])
    runner.unload_adapter("two")
    check([None, None])
    check(["all", None])
    assert graphs.count("some") == (6 if runner._kernels else 0), "bare forwards are compiled, before and after"
    runner.close()


@pytest.mark.parametrize("expected", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_compiled_forward_serves_adapters_that_come_and_go(
    folder: Path, references: dict[str | None, Any], graphs: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled before there was an adapter, or for the first one; nothing of an adapter may be compiled in."""
    runner = make_runner(folder, (), adapters=expected)
    if not runner._kernels:
        pytest.skip("no C++ compiler")
    assert runner.warm_up()
    assert ("adapted" in graphs) == expected
    assert not runner.loras.adapters
    assert not any(module._forward_hooks for module in runner.loras.linears.values()), "nothing is left behind"
    pool = [layer.keys for layer in runner.layers]
    blocks = [keys.clone() for keys in pool]

    check = checker(runner, references)
    runner.load_adapter("middle", str(folder / "middle"))  # the narrowest: one layer of three
    for keys, layer, before in zip(pool, runner.layers, blocks, strict=True):
        assert layer.keys is keys, "compiling has a pool of its own"
        assert torch.equal(keys, before)
    with monkeypatch.context() as patch:  # from here on every forward of few tokens is the graphs'
        patch.setattr(runner, "_packed", None)
        graphs.clear()
        check(["middle", None])
        check(["middle"], 1)
        for name in ADAPTERS:
            runner.load_adapter(name, str(folder / name))
        check([*list(ADAPTERS)[:4], None], 8)
        check([*list(ADAPTERS)[4:], None], 8)
        check(["down"], 1)
        for name in list(ADAPTERS)[:-2]:
            runner.unload_adapter(name)
        check([None, *list(ADAPTERS)[-2:], None], 3)
        runner.load_adapter("linear", str(folder / "two"))  # other weights, on other layers, under a known id
        check(["regex", None], 5)
        ids = ids_of(9, 6)
        got = runner.forward([SpanInput(ids, 0, [0], range(6), "linear")]).logits
        torch.testing.assert_close(got, own_logits(references["two"], ids), atol=1e-5, rtol=1e-5)
    assert set(graphs) == {"adapted", "some"}
    runner.close()


def test_a_forward_that_compiles_wrongly_for_adapters_is_not_used(
    folder: Path, references: dict[str | None, Any], graphs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bare one stays; what the graph made of an adapter is compared before it serves."""
    run = CompiledForward._run

    def wrong(self: CompiledForward, name: str, *rest: Any) -> Any:
        logits, hidden = run(self, name, *rest)
        return logits + (0.1 if name == "adapted" else 0), hidden

    monkeypatch.setattr(CompiledForward, "_run", wrong)
    runner = make_runner(folder, ["all"])
    if not runner._kernels:
        pytest.skip("no C++ compiler")
    assert runner.warm_up()
    graphs.clear()
    check = checker(runner, references)
    check(["all", None])
    check([None, None])
    assert graphs == ["some", "some"]
    runner.close()


@pytest.mark.parametrize(
    ("arch", "targets"),
    [("gpt2", ["c_attn", "c_proj", "c_fc"]), ("qwen2_moe", ["q_proj", "shared_expert.up_proj"])],
)
def test_other_layers_than_llamas(tmp_path: Path, arch: str, targets: list[str]) -> None:
    """GPT-2's transposed layers; a mixture of experts with a dense expert beside the routed ones."""
    path = make_adapter(tmp_path, tiny_model(arch), 0, r=4, lora_alpha=8, target_modules=targets)
    want = PeftModel.from_pretrained(tiny_model(arch), path).eval()
    runner = Runner(tiny_model(arch), "base")
    runner.allocate(8, 16)
    runner.load_adapter("tuned", str(path))
    ids = [i % 96 for i in ids_of(5, 10)]
    rows = runner.forward([SpanInput(ids, 0, [0], [9]), SpanInput(ids, 0, [1], [9], "tuned")]).logits
    torch.testing.assert_close(rows[0], own_logits(tiny_model(arch), ids)[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows[1], own_logits(want, ids)[-1], atol=1e-5, rtol=1e-5)
    assert (rows[0] - rows[1]).abs().max() > 0.01
    runner.close()


def test_eight_adapters_take_less_than_a_third_of_a_model(tmp_path: Path) -> None:
    """r = 8 on every linear layer of a mid-size base, counted in tensors."""
    size = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "vocab_size": 4096}
    base = tiny_model("llama", **size)
    path = make_adapter(tmp_path, tiny_model("llama", **size), 0, r=8, lora_alpha=8, target_modules=EVERY)
    runner = Runner(base, "base")
    weights = sum(p.nbytes for p in base.parameters())
    infos = [runner.load_adapter(f"a{i}", str(path)) for i in range(8)]
    held = runner.loras.bytes()
    assert held == 4 * sum(info.parameters for info in infos), "no padding, no second copy"
    assert weights + held < 1.3 * weights
    runner.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "size", "width", "ranks"),
    [(1, 1, 1, [1]), (3, 17, 65, [3]), (16, 64, 64, [8] * 8), (64, 200, 130, [1, 16, 2]), (5, 300, 1000, [40, 7])],
)
def test_the_kernel_against_its_formula(
    tokens: int, size: int, width: int, ranks: list[int], dtype: torch.dtype
) -> None:
    """fp64 on the same inputs. fp32: rounding of sums; bf16: fp32 sums and one rounding of y, half an eps."""
    if not load_kernels():
        pytest.skip("no C++ compiler")
    noise = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise).to(dtype)

    x, y = draw(tokens, size), draw(tokens, width)
    down, up = draw(sum(ranks), size), draw(sum(ranks), width)
    parts = list(zip(down.split(ranks), up.split(ranks)))
    rows = [[a.data_ptr(), b.data_ptr(), len(a)] for a, b in parts] + [[0, 0, 0]]  # the last one is not on this layer
    table = torch.stack([torch.zeros(len(rows), 3, dtype=torch.int64), torch.tensor(rows)])  # [2 linears, places, 3]
    owners = torch.arange(tokens) % (len(rows) + 1) - 1
    want = y.double()
    for t, owner in enumerate(owners.tolist()):
        if 0 <= owner < len(parts):
            a, b = parts[owner]
            want[t] += (x[t].double() @ a.double().T) @ b.double()
    before = y.clone()
    torch.ops.trimtab.lora(x, y, table, 0, owners)
    assert torch.equal(y, before), "no adapter on this layer"
    torch.ops.trimtab.lora(x, y, table, 1, owners)
    eps = torch.finfo(torch.float32).eps * size**0.5 * 4 + (torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0)
    scale = (1 + size**0.5 * max(ranks)) if dtype == torch.float32 else want.abs().max()
    assert float((y.double() - want).abs().max()) <= eps * float(scale)


# -- the engine -------------------------------------------------------------------------------------------------------


def specs(folder: Path, names: Any = tuple(ADAPTERS)) -> list[ModelSpec]:
    adapters = [ModelSpec(name, str(folder / name), kind="adapter", of="base") for name in names]
    return [*adapters, ModelSpec("base", str(folder / "base"))]  # an adapter may stand before its base


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    engine = Engine(load_models(specs(folder)), EngineConfig(kv_memory=1 << 22))
    yield engine
    engine.check()
    assert all(pool.used == 0 for pool in engine.pools.values())
    engine.runners["base"].close()  # type: ignore[attr-defined]


def make_request(engine: Engine, program: Program | str, prompt: tuple[int, ...], length: int = 12) -> Request:
    if isinstance(program, str):
        program = Program("plain", Policy((Term("base", Role(program)),)))
    catalog = {info.id: Entry(engine.hosted[info.id].text, info) for info in engine.models}
    return prepare(program, prompt, Sampling(temperature=0.0, max_tokens=length, ignore_eos=True), catalog)


@torch.no_grad()
def greedy(model: Any, prompt: tuple[int, ...], length: int = 12) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length,
        min_new_tokens=length, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in out[0, len(prompt) :]]


def test_greedy_text_is_pefts_own(engine: Engine, references: dict[str | None, Any]) -> None:
    """All at once, over one prompt: an adapter's keys and values must not be another's."""
    prompt = tuple(ids_of(7, 40))
    names = [*ADAPTERS, "base"]
    requests = [make_request(engine, name, prompt) for name in names]
    for request in requests:
        engine.submit(request)
    done = collect(engine.step, requests)
    for name, completion in zip(names, done, strict=True):
        model = references[None if name == "base" else name]
        assert completion.token_ids == greedy(model, prompt), name
    assert engine.stats().models[0].id == "base"
    assert len(engine.stats().models) == 1, "adapters have no pool and no forward of their own"
    assert {dict(c.usage.forwards).keys() == {"base"} for c in done if c.usage} == {True}


def test_a_role_may_name_the_adapter_itself(engine: Engine) -> None:
    prompt = tuple(ids_of(8, 20))
    (by_id,) = engine.generate(prompt, "all", Sampling(temperature=0.0, max_tokens=8))
    role = Program("plain", Policy((Term("base", Role("base", adapter="all")),)))
    (by_role,) = engine.generate(prompt, role, Sampling(temperature=0.0, max_tokens=8))
    assert by_id.token_ids == by_role.token_ids
    assert by_role.usage is not None
    assert by_role.usage.cached_tokens == 16, "the same track, whatever it is called"
    for wrong in (Role("base", adapter="gone"), Role("base", adapter="base"), Role("two", adapter="all")):
        with pytest.raises(BadRequest, match="No adapter"):
            engine.generate(prompt, Program("plain", Policy((Term("base", wrong),))))
    with pytest.raises(UnknownModel):
        engine.generate(prompt, "gone")


def test_an_adapter_as_expert_and_its_base_as_anti(engine: Engine, references: dict[str | None, Any]) -> None:
    strategy = STRATEGIES["proxy_tuning"]
    program = strategy.build(strategy.params(expert="all", anti="base", alpha=0.7), "two")
    prompt = tuple(ids_of(9, 30))
    request = make_request(engine, program, prompt)
    engine.submit(request)
    (completion,) = collect(engine.step, [request])
    out: list[int] = []
    for _ in range(12):
        ids = [*prompt, *out]
        base, expert, anti = (own_logits(references[name], ids)[-1] for name in ("two", "all", None))
        out.append(int((base + 0.7 * (expert - anti)).argmax()))
    assert completion.token_ids == out


def test_load_reload_and_unload_while_others_run(folder: Path, references: dict[str | None, Any]) -> None:
    engine = Engine(load_models(specs(folder, ["two"])), EngineConfig(kv_memory=1 << 22))
    prompt = tuple(ids_of(10, 40))
    running = [make_request(engine, name, prompt, 30) for name in ("base", "two")]
    events: list[Event] = []
    for request in running:
        engine.submit(request)
    for _ in range(8):
        events += engine.step()
    with pytest.raises(ModelLoadError, match="'two' is in use by 1 requests"):
        engine.unload_adapter("two")
    with pytest.raises(ModelLoadError, match="'two' is in use"):
        engine.load_adapter(ModelSpec("two", str(folder / "all"), kind="adapter", of="base"))
    engine.load_adapter(ModelSpec("new", str(folder / "all"), kind="adapter", of="base"))
    assert [info.of for info in engine.models] == ["base", None, "base"]
    late = make_request(engine, "new", prompt)
    engine.submit(late)
    while engine.has_work():
        events += engine.step()

    def tokens(request: Request) -> list[int]:
        mine = [e for e in events if isinstance(e, Delta) and e.request_id == request.id]
        return [token for event in mine for token in event.token_ids]

    assert tokens(running[0]) == greedy(references[None], prompt, 30)
    assert tokens(running[1]) == greedy(references["two"], prompt, 30)
    assert tokens(late) == greedy(references["all"], prompt)

    # Other weights under the same id: nothing of the old ones may be hit.
    engine.load_adapter(ModelSpec("new", str(folder / "down"), kind="adapter", of="base"))
    (again,) = engine.generate(prompt, "new", Sampling(temperature=0.0, max_tokens=12, ignore_eos=True))
    assert again.token_ids == greedy(references["down"], prompt)
    assert again.usage is not None
    assert again.usage.cached_tokens == 0
    engine.unload_adapter("new")
    with pytest.raises(UnknownModel):
        engine.generate(prompt, "new")
    for wrong in ("new", "base"):
        with pytest.raises(UnknownModel):
            engine.unload_adapter(wrong)
    for id, of, message in (("x", "two", "no model that is served"), ("base", "base", "'base' is taken")):
        with pytest.raises(ModelLoadError, match=message):
            engine.load_adapter(ModelSpec(id, str(folder / "all"), kind="adapter", of=of))
    engine.check()


def test_an_adapter_that_drafts_is_in_use(folder: Path, references: dict[str | None, Any]) -> None:
    engine = Engine(load_models(specs(folder, ["two"])), EngineConfig(kv_memory=1 << 22))
    policy = Policy((Term("base", Role("base")),))
    drafted = Program("plain", policy, speculation=Speculation(draft="two", tokens=2))
    prompt = tuple(ids_of(12, 20))
    engine.submit(make_request(engine, drafted, prompt))
    events = engine.step()
    with pytest.raises(AdapterInUse, match="'two' is in use by 1 requests"):
        engine.unload_adapter("two")
    while engine.has_work():
        events += engine.step()
    tokens = [token for event in events if isinstance(event, Delta) for token in event.token_ids]
    assert tokens == greedy(references[None], prompt)
    engine.unload_adapter("two")
    engine.check()


def test_an_adapter_of_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="'two' is of 'gone', which is no model that is served"):
        load_models([ModelSpec("two", str(folder / "two"), kind="adapter", of="gone")])


def test_the_text_side_is_the_bases_unless_the_directory_has_one(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(folder / "two", own)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.save_pretrained(own)
    entries = [
        ModelSpec("base", str(folder / "base")),
        ModelSpec("shares", str(folder / "two"), kind="adapter", of="base"),
        ModelSpec("own", str(own), kind="adapter", of="base"),
        ModelSpec("plain", str(folder / "two"), kind="adapter", of="base", plain_template="{{ messages|length }}"),
    ]
    texts = load_texts(entries)
    assert texts["shares"] is texts["base"]
    assert isinstance(texts["own"], TextModel)
    assert texts["own"].has_chat_template
    assert not texts["base"].has_chat_template
    assert texts["own"].max_length == texts["base"].max_length
    assert texts["plain"].render(View("plain"), _chat()) == texts["base"].encode("1")


def _chat() -> Any:
    from decoding.text import Chat

    return Chat(({"role": "user", "content": "x"},))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "two", tmp_path / "copy"))


@pytest.fixture(scope="module")
def bare(folder: Path) -> Iterator[Runner]:
    runner = make_runner(folder, ())
    yield runner
    runner.close()


def refused(runner: Runner, path: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        runner.load_adapter("x", str(path))
    assert not runner.loras.adapters
    message = str(caught.value)
    assert message.startswith("Adapter 'x' of 'base': ")
    assert "\n" not in message
    return message


def change(path: Path, **fields: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "type IA3; only LORA is served"),
        ({"use_dora": True}, "uses DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"trainable_token_indices": [1]}, "trained token embeddings"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "not linear layers"),
        ({"layer_replication": [[0, 2]]}, "replicated layers"),
        ({"lora_bias": True}, "biases of its own"),
        ({"bias": "lora_only"}, "bias 'lora_only'; only 'none'"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"target_modules": None}, "names no target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "w_proj"]}, "target module 'w_proj' is no linear layer"),
        ({"target_modules": ["q_proj"]}, "has tensors for .*v_proj, which its adapter_config.json does not mean"),
        ({"target_modules": EVERY}, "has no tensors for .*, which its adapter_config.json means"),
        ({"r": 4}, "where rank 4 on the base needs"),
        ({"r": None}, "no r of at least 1"),
        ({"lora_alpha": float("nan")}, "no finite lora_alpha"),
        ({"peft_type": None}, "type None"),
    ],
)
def test_configurations_that_are_refused(bare: Runner, copy: Path, fields: dict[str, Any], message: str) -> None:
    change(copy, **fields)
    assert re.search(message, refused(bare, copy))


def test_directories_that_are_refused(bare: Runner, copy: Path) -> None:
    assert "is not a directory" in refused(bare, copy / "gone")
    weights = copy / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:50])
    assert "is not a safetensors file" in refused(bare, copy)
    weights.unlink()
    assert "only safetensors are loaded" in refused(bare, copy)
    (copy / "adapter_model.bin").write_bytes(b"")
    assert "Convert its pickled weights" in refused(bare, copy)
    (copy / "adapter_config.json").write_text("{")
    assert "is not valid JSON" in refused(bare, copy)
    (copy / "adapter_config.json").write_text("[]")
    assert "names no peft_type" in refused(bare, copy)
    (copy / "adapter_config.json").unlink()
    assert "has no adapter_config.json" in refused(bare, copy)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        (FIRST, None, "only one of the two LoRA matrices for model.layers.0.self_attn.q_proj"),
        (FIRST, torch.full((8, 32), float("nan")), "hold NaN"),
        (FIRST, torch.zeros(8, 33), "is it an adapter of another model?"),
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", torch.zeros(8, 32), "only one"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(8, 32), "is an embedding"),
        ("base_model.model.lm_head.weight", torch.zeros(8, 32), "is no LoRA matrix"),
    ],
)
def test_tensors_that_are_refused(
    bare: Runner, copy: Path, key: str, tensor: torch.Tensor | None, message: str
) -> None:
    tensors = load_file(copy / "adapter_model.safetensors")
    tensors.pop(key, None)
    if tensor is not None:
        tensors[key] = tensor
    save_file(tensors, copy / "adapter_model.safetensors")
    assert message in refused(bare, copy)


def test_an_adapter_of_another_model(bare: Runner, tmp_path: Path) -> None:
    wide = tiny_model("llama", **(LLAMA | {"hidden_size": 48}))
    path = make_adapter(tmp_path / "wide", wide, 0, r=4, lora_alpha=4, target_modules=["q_proj"])
    assert "is it an adapter of another model?" in refused(bare, path)
    path = make_adapter(tmp_path / "gpt2", tiny_model("gpt2"), 0, r=4, lora_alpha=4, target_modules=["c_attn"])
    assert "adapts transformer.h.0.attn.c_attn, which is no linear layer of the base" in refused(bare, path)
    head = make_adapter(tmp_path / "head", tiny_model("llama", **LLAMA), 0, r=4, target_modules=["lm_head"])
    assert "lm_head" in refused(bare, head)
