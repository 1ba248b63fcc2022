"""Scorers with heads: rows of packed, ragged chunks against transformers' own forward; refusals; the engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from decoding.core import BadRequest, EngineConfig, ModelLoadError, ModelSpec, Program, Sampling, SearchPlan
from decoding.engine import Engine
from decoding.generate import load_models
from decoding.heads import HeadModel
from decoding.hosting import SpanInput
from decoding.models import load_model
from decoding.selfcheck import randomize
from tests.fakes import byte_tokenizer
from tests.tiny import COMMON, SERVED, tiny_directory

SIZES = COMMON | {"vocab_size": 257, "pad_token_id": 256, "eos_token_id": 256}


def config_of(arch: str, **changes: Any) -> Any:
    return AutoConfig.for_model(arch, **(SIZES | SERVED.get(arch, {}) | changes))


def classifier(path: Path, arch: str, auto: Any = AutoModelForSequenceClassification, **changes: Any) -> Any:
    """A tiny classifier, saved under `path` with a byte tokenizer; returns transformers' model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = auto.from_config(config_of(arch, **changes), attn_implementation="eager")
    model = randomize(model.eval().float(), 1)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return model


def custom(path: Path, arch: str, name: str, heads: dict[str, torch.Tensor], prefix: str = "", **extra: Any) -> Any:
    """A decoder with tensors beside it, as published models with code of their own lay them out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        backbone = AutoModel.from_config(config_of(arch), attn_implementation="eager")
    backbone = randomize(backbone.eval().float(), 2)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {f"{prefix}model.{key}": value.contiguous() for key, value in backbone.state_dict().items()}
    save_file(tensors | heads, path / "model.safetensors", metadata={"format": "pt"})
    values = backbone.config.to_dict() | {"architectures": [name], "dtype": "float32"} | extra
    (path / "config.json").write_text(json.dumps(values))
    byte_tokenizer().save_pretrained(path)
    return backbone


def rows_in_chunks(spec: ModelSpec, texts: list[list[int]]) -> list[torch.Tensor]:
    """Every position's outputs of `texts`, computed in ragged chunks of two streams at a time."""
    runner = load_model(spec)
    runner.allocate(64, 4)
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    starts = [0] * len(texts)
    sizes = iter([3, 1, 7, 2, 5, 4, 6, 1, 9] * 20)
    while any(start < len(text) for start, text in zip(starts, texts)):
        spans, owners = [], []
        for i, text in enumerate(texts):
            size = min(next(sizes), len(text) - starts[i])
            if size > 0:
                ids = text[starts[i] : starts[i] + size]
                spans.append(SpanInput(ids, starts[i], range(16 * i, 16 * i + 16), range(size)))
                owners.append((i, size))
                starts[i] += size
        rows = list(runner.forward(spans).logits)
        for i, size in owners:
            found[i] += rows[:size]
            del rows[:size]
    runner.close()
    return [torch.stack(rows) for rows in found]


TEXTS = [[(7 * i + 3 * j + 11) % 256 for i in range(20 + 13 * j)] for j in range(3)]


@pytest.mark.parametrize(
    ("arch", "labels"), [("llama", 1), ("llama", 3), ("qwen2", 1), ("mistral", 1), ("gemma2", 2), ("qwen3", 1)]
)
def test_a_sequence_classifiers_own_forward_is_our_last_row(tmp_path: Path, arch: str, labels: int) -> None:
    model = classifier(tmp_path / "m", arch, num_labels=labels)
    found = rows_in_chunks(ModelSpec("rm", str(tmp_path / "m"), kind="reward"), TEXTS)
    for text, rows in zip(TEXTS, found, strict=True):
        assert rows.shape == (len(text), labels)
        for end in (1, len(text) // 2, len(text)):
            with torch.no_grad():
                want = model(input_ids=torch.tensor([text[:end]])).logits[0]
            assert torch.allclose(rows[end - 1], want, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_token_classifiers_own_forward_is_our_rows(tmp_path: Path, arch: str) -> None:
    model = classifier(tmp_path / "m", arch, AutoModelForTokenClassification, num_labels=2)
    for text, rows in zip(TEXTS, rows_in_chunks(ModelSpec("prm", str(tmp_path / "m"), kind="prm"), TEXTS)):
        with torch.no_grad():
            assert torch.allclose(rows, model(input_ids=torch.tensor([text])).logits[0], atol=1e-5)


H = 32


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def mlp(outputs: int) -> dict[str, torch.Tensor]:
    first = {"score.0.weight": tensor(H, H), "score.0.bias": tensor(H)}
    return first | {"score.2.weight": tensor(outputs, H), "score.2.bias": tensor(outputs)}


LAYOUTS: dict[str, tuple[str, dict[str, torch.Tensor], str]] = {
    "Qwen2ForProcessRewardModel": (
        "qwen2",
        {
            "score.0.weight": tensor(H, H),
            "score.0.bias": tensor(H),
            "score.2.weight": tensor(2, H),
            "score.2.bias": tensor(2),
        },
        "",
    ),
    "Qwen2ForRewardModel": (
        "qwen2",
        {
            "score.0.weight": tensor(H, H),
            "score.0.bias": tensor(H),
            "score.2.weight": tensor(1, H),
            "score.2.bias": tensor(1),
        },
        "",
    ),
    "Qwen2ForPrmModel": (
        "qwen2",
        {"v_head.summary.weight": tensor(1, H), "v_head.summary.bias": tensor(1)},
        "pretrained_model.",
    ),
    "LlamaForRewardModelWithGating": (
        "llama",
        {
            "regression_layer.weight": tensor(5, H),
            "reward_transform_matrix": tensor(5, 5),
            "gating.layers.0.weight": tensor(16, H),
            "gating.layers.0.bias": tensor(16),
            "gating.layers.1.weight": tensor(5, 16),
            "gating.logit_scale": torch.tensor([1.5]),
        },
        "",
    ),
}


STEPS = ("Qwen2ForProcessRewardModel", "Qwen2ForPrmModel")


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_published_layouts_are_backbone_and_head(tmp_path: Path, name: str) -> None:
    arch, heads, prefix = LAYOUTS[name]
    backbone = custom(tmp_path / "m", arch, name, heads, prefix, gating_temperature=2.0)
    spec = ModelSpec("rm", str(tmp_path / "m"), kind="prm" if name in STEPS else "reward")
    for text, rows in zip(TEXTS, rows_in_chunks(spec, TEXTS)):
        with torch.no_grad():
            hidden = backbone(input_ids=torch.tensor([text])).last_hidden_state[0]
        if "score.0.weight" in heads:
            hidden = torch.relu(hidden @ heads["score.0.weight"].T + heads["score.0.bias"])
            want = hidden @ heads["score.2.weight"].T + heads["score.2.bias"]
        elif "v_head.summary.weight" in heads:
            want = hidden @ heads["v_head.summary.weight"].T + heads["v_head.summary.bias"]
        else:
            want = hidden @ heads["regression_layer.weight"].T
        assert torch.allclose(rows, want, atol=1e-4)


def test_the_gate_is_a_softmax_of_an_mlp(tmp_path: Path) -> None:
    arch, heads, _ = LAYOUTS["LlamaForRewardModelWithGating"]
    custom(tmp_path / "m", arch, "LlamaForRewardModelWithGating", heads, gating_temperature=2.0)
    runner = load_model(ModelSpec("rm", str(tmp_path / "m"), kind="reward"))
    assert runner.head is not None
    assert runner.head.gate is not None
    assert runner.head.transform is not None
    hidden = tensor(3, H)
    inner = torch.relu(hidden @ heads["gating.layers.0.weight"].T + heads["gating.layers.0.bias"])
    want = torch.softmax(inner @ heads["gating.layers.1.weight"].T / 2.0, 1) * 1.5
    assert torch.allclose(runner.head.gate(hidden), want, atol=1e-6)
    assert torch.equal(runner.head.transform, heads["reward_transform_matrix"])
    assert (runner.width, runner.head.outputs) == (5, 5)
    moved = runner.model.to(torch.device("meta")).about  # type: ignore[arg-type]
    weights = [each for layer in moved.gate.layers for each in layer if each is not None]
    assert {each.device.type for each in (*weights, moved.transform)} == {"meta"}


def test_wanted_rows_and_hidden_states_go_together(tmp_path: Path) -> None:
    weight = classifier(tmp_path / "m", "llama", num_labels=2).score.weight.detach()
    runner = load_model(ModelSpec("rm", str(tmp_path / "m"), kind="reward"))
    runner.allocate(8, 16)
    rows = runner.forward([SpanInput(TEXTS[0], 0, [0, 1], [4, 9, 19])], want_hidden=True)
    assert rows.logits.shape == (3, 2)
    assert rows.hidden is not None
    assert torch.allclose(rows.hidden @ weight.T, rows.logits, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("score")},
            "without a head that is known",
        ),
        (lambda tensors: {k: v for k, v in tensors.items() if "layers.1.mlp" not in k}, "missing keys"),
        (lambda tensors: tensors | {"score.weight": torch.zeros(1, 31)}, "its head reads 31 numbers"),
    ],
)
def test_tensors_that_are_missing_or_do_not_fit_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    classifier(tmp_path / "m", "llama", num_labels=1)
    file = tmp_path / "m" / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=words):
        load_model(ModelSpec("rm", str(tmp_path / "m"), kind="reward"))


MLP, GATED = "Qwen2ForProcessRewardModel", "LlamaForRewardModelWithGating"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (MLP, {"score.2.weight": tensor(2, 30)}, "layers do not fit: 32 numbers into 30"),
        (MLP, {"score.2.bias": tensor(3)}, "no linear layer's"),
        (MLP, {"score.0.bias": None}, "lacks the tensor score.0.bias"),
        (MLP, {"score.2.weight": None}, "lacks the tensor score.2.weight"),
        (GATED, {"gating.layers.0.weight": None}, "lacks the tensor gating.layers.0"),
        (GATED, {"gating.layers.0.weight": None, "gating.layers.1.weight": None}, "lacks the tensor gating.layers.0"),
        (GATED, {"gating.layers.0.weight": tensor(16, 31)}, "do not lead from 32 numbers to its 5 objectives"),
        (GATED, {"gating.layers.1.weight": tensor(4, 16)}, "do not lead from 32 numbers to its 5 objectives"),
        (GATED, {"gating.logit_scale": None}, "lacks the tensor gating.logit_scale"),
        (GATED, {"reward_transform_matrix": tensor(4, 4)}, "not .5, 5."),
        (GATED, {"reward_transform_matrix": None}, "lacks the tensor reward_transform_matrix"),
    ],
)
def test_parts_of_published_heads_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, changes: dict[str, torch.Tensor | None], words: str
) -> None:
    arch, heads, _ = LAYOUTS[name]
    tensors = {key: value for key, value in (heads | changes).items() if value is not None}
    custom(tmp_path / "m", arch, name, tensors)
    with pytest.raises(ModelLoadError, match=words):
        load_model(ModelSpec("rm", str(tmp_path / "m"), kind="reward"))


def test_a_head_has_as_many_outputs_as_there_are_labels(tmp_path: Path) -> None:
    classifier(tmp_path / "m", "llama", num_labels=1)
    file = tmp_path / "m" / "config.json"
    names = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    file.write_text(json.dumps(json.loads(file.read_text()) | names))
    with pytest.raises(ModelLoadError, match=r"1 outputs, and its config\.json names 2 labels"):
        load_model(ModelSpec("rm", str(tmp_path / "m"), kind="reward"))


@pytest.mark.parametrize("prefix", ["", "pretrained_model."])
def test_a_value_head_beside_an_lm_head_is_the_scorers(tmp_path: Path, prefix: str) -> None:
    """Whatever the class is called: read as a language model it would score by its vocabulary."""
    heads = {"v_head.summary.weight": tensor(1, H), "v_head.summary.bias": tensor(1)}
    custom(tmp_path / "m", "qwen2", "Qwen2ForCausalLM", heads | {f"{prefix}lm_head.weight": tensor(257, H)}, prefix)
    runner = load_model(ModelSpec("prm", str(tmp_path / "m"), kind="prm"))
    assert runner.head is not None
    assert runner.width == 1


def test_a_classifier_is_no_causal_model_and_an_encoder_no_scorer(tmp_path: Path) -> None:
    classifier(tmp_path / "rm", "llama", num_labels=1)
    with pytest.raises(ModelLoadError, match="its kind is reward, not causal"):
        load_model(ModelSpec("rm", str(tmp_path / "rm")))
    classifier(tmp_path / "bert", "bert", num_labels=1)
    with pytest.raises(ModelLoadError, match=r"bert is an encoder.* only causal decoders are hosted"):
        load_model(ModelSpec("bert", str(tmp_path / "bert"), kind="reward"))


def test_a_classifier_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    """One number a token can be read as either; labels of tokens are no reward, many outputs no step's score."""

    def load(path: str, kind: Any) -> Any:
        return load_model(ModelSpec("m", str(tmp_path / path), kind=kind)).head

    for auto, name in ((AutoModelForSequenceClassification, "seq"), (AutoModelForTokenClassification, "token")):
        for labels in (1, 2, 5):
            classifier(tmp_path / f"{name}{labels}", "llama", auto, num_labels=labels)
    for path, kind in (("token1", "reward"), ("token2", "prm"), ("seq1", "prm"), ("seq2", "prm"), ("seq5", "reward")):
        assert load(path, kind).outputs == int(path[-1])
    sentence = "it is a LlamaForTokenClassification, which has a head that labels tokens .2 outputs.: its kind is prm, "
    with pytest.raises(ModelLoadError, match=sentence + r"not reward\."):
        load("token2", "reward")
    sentence = "it is a LlamaForSequenceClassification, which has a head that scores whole texts .5 outputs.: its kind "
    with pytest.raises(ModelLoadError, match=sentence + r"is reward, not prm\."):
        load("seq5", "prm")
    with pytest.raises(ModelLoadError, match=r"LlamaForTokenClassification, .*5 outputs.: .*prm has 1 or 2 outputs\."):
        load("token5", "prm")
    arch, heads, _ = LAYOUTS["Qwen2ForProcessRewardModel"]
    custom(tmp_path / "steps", arch, "Qwen2ForProcessRewardModel", heads)
    with pytest.raises(ModelLoadError, match=r"Qwen2ForProcessRewardModel, .*scores steps .*kind is prm, not reward\."):
        load("steps", "reward")


def test_the_self_check_compares_the_real_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that says something else in packed batches (which have positions of their own) is not served."""
    classifier(tmp_path / "m", "llama", num_labels=1)
    own = HeadModel.forward

    def wrong(self: HeadModel, *args: Any, **kwargs: Any) -> Any:
        made = own(self, *args, **kwargs)
        if kwargs.get("position_ids") is not None:
            made.logits = made.logits + 0.5
        return made

    spec = ModelSpec("rm", str(tmp_path / "m"), kind="reward")
    load_model(spec)
    monkeypatch.setattr(HeadModel, "forward", wrong)
    with pytest.raises(ModelLoadError, match="differ from Hugging Face's own"):
        load_model(spec)


@pytest.mark.parametrize(
    ("arch", "auto"), [("llama", AutoModelForSequenceClassification), ("qwen2", AutoModelForTokenClassification)]
)
def test_the_self_check_asks_transformers_own_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, auto: Any
) -> None:
    """A class that does more than decoder and head is not served without that."""
    kind = type(classifier(tmp_path / "m", arch, auto, num_labels=2))
    scores = "reward" if auto is AutoModelForSequenceClassification else "prm"
    spec, own = ModelSpec("rm", str(tmp_path / "m"), kind=scores), kind.forward

    def more(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = own(self, *args, **kwargs)
        made.logits = made.logits * 1.01
        return made

    load_model(spec)
    monkeypatch.setattr(kind, "forward", more)
    with pytest.raises(ModelLoadError, match=f"{kind.__name__}: its own forward differs"):
        load_model(spec)


def test_a_head_of_no_numbers_is_caught(tmp_path: Path) -> None:
    arch, heads, _ = LAYOUTS[MLP]
    custom(tmp_path / "m", arch, MLP, heads | {"score.2.weight": torch.full((2, H), float("nan"))})
    with pytest.raises(ModelLoadError, match="differ from Hugging Face's own"):
        load_model(ModelSpec("rm", str(tmp_path / "m"), kind="prm"))


@pytest.mark.parametrize("kind", ["reward", "self_eval", "causal"])
def test_a_model_with_weights_of_its_own_is_of_no_other(tmp_path: Path, kind: Any) -> None:
    """It must not be served by the other's weights."""
    specs = []
    for name in ("base", "other"):
        tiny_directory("llama", tmp_path / name, vocab_size=257, eos_token_id=256, pad_token_id=256)
        specs.append(ModelSpec(name, str(tmp_path / name)))
    with pytest.raises(ModelLoadError, match="has weights of its own"):
        load_models([specs[0], replace(specs[1], kind=kind, of="base")])


def test_a_scorer_is_compiled_like_any_model(tmp_path: Path) -> None:
    """`warm_up` compares the compiled forward with the eager one, and says False if either fails."""
    classifier(tmp_path / "m", "llama", num_labels=2)
    runner = load_model(ModelSpec("rm", str(tmp_path / "m"), kind="reward"))
    assert runner.warm_up() == runner._kernels
    runner.close()


def test_an_engine_of_a_policy_and_a_reward_model(tmp_path: Path) -> None:
    from decoding import search
    from decoding.scorers.spec import Hypothesis
    from decoding.search.spec import SearchKind
    from decoding.search.verbs import Candidate, Judge, Outcome, Run, Score, Until
    from tests.decoding.test_search_engine import PLAIN, Nothing

    model = classifier(tmp_path / "rm", "llama", num_labels=1)
    tiny_directory("llama", tmp_path / "base", vocab_size=257, eos_token_id=256, pad_token_id=256)
    byte_tokenizer().save_pretrained(tmp_path / "base")
    specs = [ModelSpec("base", str(tmp_path / "base")), ModelSpec("rm", str(tmp_path / "rm"), kind="reward")]
    engine = Engine(load_models(specs), EngineConfig(kv_memory=64 << 20))
    assert [(info.id, info.kind) for info in engine.models] == [("base", "causal"), ("rm", "reward")]
    with pytest.raises(BadRequest, match="scorer"):
        engine.generate("x", "rm")
    found: list[tuple[str, list[float]]] = []

    def run(it: Any, _: Any) -> Any:
        for _ in range(3):
            yield Run(it.root, Until(tokens=4))
            found.append((it.root.text, (yield Score(it.root, "rm"))))
        found.append(("one two", (yield Judge(Hypothesis("Q", ("one", " two")), "rm"))))
        return Outcome([Candidate(it.root)])

    search.HIDDEN["test"] = SearchKind("test", "", Nothing, run)
    try:
        program = Program("plain", PLAIN.policy, search=SearchPlan("test", Nothing()))
        engine.generate("Q", program, Sampling(max_tokens=12, temperature=0.0, allowed_token_ids=tuple(range(97, 123))))
    finally:
        del search.HIDDEN["test"]
    scorer: Any = engine.served.make_scorer("rm", "base")
    for text, values in found:
        ids = list(scorer.render(Hypothesis("Q", (text,))).ids)
        with torch.no_grad():
            want = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
        assert values == [pytest.approx(want, abs=1e-4)]
