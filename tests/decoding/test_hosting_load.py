"""load_model: what is loaded, what is refused, and that the self-check catches a broken model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

import decoding.runner
from decoding.attention import HostedLayer
from decoding.core import EngineConfig, ModelLoadError, ModelSpec, Sampling
from decoding.engine import Engine
from decoding.generate import host, load_models
from decoding.host_gate import causal_class, context_limit
from decoding.hosting import SpanInput
from decoding.models import load_model
from decoding.selfcheck import check_twin, make_twin
from tests.fakes import EOS, byte_tokenizer
from tests.tiny import LONGROPE, tiny_config, tiny_directory, tiny_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_directory("llama", tmp_path / "llama")


def load(path: Path | str, **entry: Any) -> decoding.runner.Runner:
    return load_model(ModelSpec("m", str(path), **entry))


def refused(path: Path | str, **entry: Any) -> str:
    """The sentence with which `path` is refused."""
    with pytest.raises(ModelLoadError) as caught:
        load(path, **entry)
    message = str(caught.value)
    assert message.startswith("Model 'm': ")
    assert "\n" not in message
    return message


def test_a_model_in_memory_is_served_like_one_from_a_directory(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama", vocab_size=EOS + 1), byte_tokenizer()
    path = tiny_directory("llama", tmp_path / "llama", vocab_size=EOS + 1)
    tokenizer.save_pretrained(path)
    sampling = Sampling(temperature=0.0, max_tokens=6)
    found = []
    for models in ({"m": host("m", model, tokenizer)}, load_models({"m": str(path)})):
        assert models["m"].text.eos_ids == (0, tokenizer.eos_token_id)  # of the configuration, of the tokenizer
        engine = Engine(models, EngineConfig(kv_memory=1 << 20))
        found.append([each.token_ids for each in engine.generate([(1, 2, 3), (4, 5)], "m", sampling)])
    assert found[0] == found[1]
    headless = tiny_model("llama")
    headless.config.architectures = ["LlamaModel"]
    with pytest.raises(ModelLoadError, match="has no head at all"):
        host("m", headless, tokenizer)


def test_a_directory_is_loaded_and_checked(llama: Path) -> None:
    runner = load(llama)
    assert (runner.id, runner.width, runner.hidden_size, runner.max_model_len) == ("m", 96, 32, 128)
    assert runner.dtype == torch.float32
    assert runner.parameters == sum(p.numel() for p in tiny_model("llama").parameters())
    assert runner.cost > 0
    runner.allocate(4, 16)
    assert runner.forward([SpanInput([1, 2, 3], 0, [2], [2])]).logits.shape == (1, 96)
    runner.close()


@pytest.mark.parametrize(
    ("auto", "arch", "options", "message"),
    [
        (AutoModelForSequenceClassification, "llama", {"num_labels": 1}, "scores whole texts .* its kind is reward"),
        # With tied embeddings nothing would be missing: it would be served as a language model that it is not.
        (AutoModelForSequenceClassification, "qwen2", {"num_labels": 1, "tie_word_embeddings": True}, "kind is reward"),
        (AutoModelForTokenClassification, "llama", {"num_labels": 2}, "labels tokens .* its kind is prm"),
        (AutoModel, "llama", {"tie_word_embeddings": True}, "LlamaModel, which has no head"),
    ],
)
@pytest.mark.parametrize("entry", [{}, {"kind": "causal"}, {"kind": "guard"}, {"kind": "self_eval"}])
def test_what_is_no_language_model_is_refused_by_name(
    tmp_path: Path, auto: Any, arch: str, options: dict[str, Any], message: str, entry: dict[str, Any]
) -> None:
    auto.from_config(tiny_config(arch, **options)).save_pretrained(tmp_path)
    sentence = refused(tmp_path, **entry)
    assert re.search(message, sentence)
    assert "autoregressive reward model" in sentence
    if "its kind is" in sentence:
        assert f", not {entry.get('kind', 'causal')}." in sentence


def test_encoders_and_other_heads_are_refused_by_name() -> None:
    for name in ("BertForMaskedLM", "BertForSequenceClassification", "BertModel", "RobertaForQuestionAnswering"):
        config = AutoConfig.for_model("bert", architectures=[name])
        with pytest.raises(ModelLoadError, match=f"it is a {name}, which"):
            causal_class(config)
    with pytest.raises(ModelLoadError, match=r"BertForSequenceClassification, which .*: no kind of entry serves it"):
        causal_class(AutoConfig.for_model("bert", architectures=["BertForSequenceClassification"]))
    heads = {"Qwen2ForRewardModel": "reward", "Qwen2ForProcessRewardModel": "prm", "Qwen2ForPrmModel": "prm"}
    for name, kind in (heads | {"LlamaForRewardModelWithGating": "reward"}).items():
        with pytest.raises(ModelLoadError, match=f"it is a {name}, .* its kind is {kind}, not guard"):
            causal_class(tiny_config("qwen2", architectures=[name]), wanted="guard")
    for names in ([], None, ["LlamaForCausalLM"]):
        assert causal_class(tiny_config("llama", architectures=names)).__name__ == "LlamaForCausalLM"


def test_a_prm_may_be_a_language_model_that_answers_with_tokens(llama: Path) -> None:
    runner = load(llama, kind="prm")
    assert runner.head is None
    assert runner.width == 96
    runner.close()


def test_unknown_kinds_are_refused(llama: Path) -> None:
    assert "kind 'oracle' is not one of causal, reward, prm, guard, self_eval" in refused(llama, kind="oracle")


@pytest.mark.parametrize(("asked", "got"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_dtype_auto_is_the_checkpoints(tmp_path: Path, asked: str, got: torch.dtype) -> None:
    path = tiny_directory("qwen2", tmp_path, dtype=torch.bfloat16)
    runner = load(path, dtype=asked)
    assert runner.dtype == got
    runner.close()


@pytest.mark.parametrize("arch", ["gemma2", "gpt_oss", "minimax_m2", "deepseek_v3", "opt"])
def test_bfloat16_weights_pass_the_check(tmp_path: Path, arch: str) -> None:
    """Also mixtures of experts, where rounding sends tokens to other experts."""
    runner = load(tiny_directory(arch, tmp_path, dtype=torch.bfloat16))
    assert runner.dtype == torch.bfloat16
    runner.close()


def test_float16_runs_as_float32_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny_directory("llama", tmp_path, dtype=torch.float16)
    with caplog.at_level(logging.WARNING):
        runner = load(path)
    assert runner.dtype == torch.float32
    assert "float16 runs as float32" in caplog.text
    runner.close()


def test_sharded_safetensors_are_complete_or_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    load(tmp_path).close()
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    assert f"lacks {lost.name}" in refused(tmp_path)


# -- directories ---------------------------------------------------------------------------------------------------


def test_missing_directory(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")


def test_a_file_is_no_directory(llama: Path) -> None:
    assert "is not a directory" in refused(llama / "config.json")


def test_unknown_hub_id_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be read" in refused("nobody/no-such-model")


def test_no_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    assert "no config.json" in refused(llama)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "no_such_type"}'])
def test_bad_config(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    message = refused(llama)
    assert any(part in message for part in ("not valid JSON", "names no model_type", "cannot be read"))


def test_config_of_another_size(llama: Path) -> None:
    values = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(values | {"intermediate_size": 64}))
    assert "weights" in refused(llama) or "mismatched keys" in refused(llama)


def test_no_safetensors(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert "only safetensors are loaded" in refused(llama)


def test_pickles_are_not_loaded(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(weights, llama / "pytorch_model.bin")
    assert "Convert its pickled weights" in refused(llama)


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_corrupt_safetensors(llama: Path, keep: int) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "the weights in" in refused(llama)


def test_missing_weights(llama: Path) -> None:
    file = llama / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "1 missing keys in its safetensors: model.layers.1.mlp.up_proj.weight" in refused(llama)


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"dtype": "int3"}, "dtype 'int3'"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"max_model_len": 4096}, "exceeds the 128 positions"),
        ({"kind": "adapter"}, "kind 'adapter' is not one of"),
    ],
)
def test_bad_entry(llama: Path, entry: dict[str, Any], part: str) -> None:
    assert part in refused(llama, **entry)


# -- architectures -------------------------------------------------------------------------------------------------


REFUSED = {
    "mamba": "keeps a recurrent state",
    "mamba2": "keeps a recurrent state",
    "jamba": "keeps a recurrent state",
    "falcon_h1": "keeps a recurrent state",
    "qwen3_next": "keeps a recurrent state",
    "recurrent_gemma": "keeps a recurrent state",
    "rwkv": "keeps a recurrent state",
    "minimax": "layers of type linear_attention",
    "deepseek_v32": "layers of type indexed_attention",
    "bloom": "does not use transformers' attention interface",
    "mpt": "does not use transformers' attention interface",
    "falcon": "does not use transformers' attention interface",
    "gptj": "does not use transformers' attention interface",
    "bart": "encoder-decoder",
    "t5": "encoder-decoder",
    "vit": "no causal language model",
    "gemma3": "multimodal",
}


@pytest.mark.parametrize("arch", sorted(REFUSED))
def test_refused_by_its_configuration(arch: str) -> None:
    with pytest.raises(ModelLoadError, match=REFUSED[arch]) as caught:
        causal_class(AutoConfig.for_model(arch))
    assert str(caught.value).startswith(arch)


LATER = {
    "diffllama": ({}, "calls its attention more than once"),
    "bert": ({"num_key_value_heads": None}, "differs from Hugging Face's own|not causal"),
    "lfm2": ({"layer_types": ["full_attention", "conv", "full_attention"]}, "layers of type conv"),
    "doge": ({}, "attention masks of its own|takes"),
}


@pytest.mark.parametrize("arch", sorted(LATER))
def test_refused_by_probe_or_twin(arch: str) -> None:
    changes, reason = LATER[arch]
    config = tiny_config(arch, **changes)
    with pytest.raises(ModelLoadError, match=reason):
        check_twin(causal_class(config), config)


def test_refusal_is_a_sentence_of_load_model(tmp_path: Path) -> None:
    assert "diffllama: a layer calls its attention more than once" in refused(tiny_directory("diffllama", tmp_path))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_reads_the_batch(kind: str) -> None:
    if kind == "dynamic":
        config = tiny_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
        with pytest.raises(ModelLoadError, match="requests would change each other"):
            context_limit(config, None)
        return
    config = tiny_config("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64)
    assert context_limit(config, None) == 64  # exact up to where it switches
    assert context_limit(config, 32) == 32
    with pytest.raises(ModelLoadError, match="at most 64"):
        context_limit(config, 65)


# -- the self-check ------------------------------------------------------------------------------------------------


def test_twin_is_tiny_and_keeps_what_matters() -> None:
    config = tiny_config(
        "gemma2", num_hidden_layers=26, hidden_size=512, num_attention_heads=8, head_dim=64, sliding_window=4096,
        vocab_size=30000, layer_types=None,
    )  # fmt: skip
    twin = make_twin(causal_class(config), config)
    assert sum(p.numel() for p in twin.parameters()) < 400_000
    assert twin.config.layer_types.count("sliding_attention") >= 2
    assert twin.config.layer_types.count("full_attention") >= 2
    assert twin.config.sliding_window == 8
    assert twin.config.attn_logit_softcapping == config.attn_logit_softcapping
    assert twin.config.num_attention_heads == 2 * twin.config.num_key_value_heads


@pytest.mark.parametrize(
    ("arch", "broken"),
    [
        ("mistral", {"window": 0}),
        ("mistral", {"window": 9}),
        ("llama4_text", {"chunk": 0}),
        ("gemma2", {"softcap": 0.0}),
        ("llama", {"scale": 0.36}),  # 0.35 is right
        ("llama", {"window": 39}),  # one key of forty is missing, for the last token only
    ],
)
def test_twin_catches_broken_attention(monkeypatch: pytest.MonkeyPatch, arch: str, broken: dict[str, Any]) -> None:
    config = tiny_config(arch)
    check_twin(causal_class(config), config)
    honest = decoding.runner.attend_kernel

    def attend(q: Any, k: Any, v: Any, layer: HostedLayer, batch: Any, sinks: Any) -> torch.Tensor:
        names = layer.spec.__slots__
        spec = type(layer.spec)(**{name: broken.get(name, getattr(layer.spec, name)) for name in names})
        return honest(q, k, v, HostedLayer(spec, layer.keys, layer.values), batch, sinks)

    monkeypatch.setattr(decoding.runner, "attend_kernel", attend)
    with pytest.raises(ModelLoadError, match="differs from Hugging Face's own forward"):
        check_twin(causal_class(config), config)


def test_twin_catches_ignored_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("gpt_oss")
    honest = decoding.runner.attend_kernel
    monkeypatch.setattr(decoding.runner, "attend_kernel", lambda *args: honest(*args[:5], None))
    with pytest.raises(ModelLoadError, match="differs from Hugging Face's own forward"):
        check_twin(causal_class(config), config)


def test_twin_catches_blocks_that_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.runner.Runner, "copy_blocks", lambda *_: None)
    config = tiny_config("llama")
    with pytest.raises(ModelLoadError, match="differs from Hugging Face's own forward"):
        check_twin(causal_class(config), config)


def test_real_weights_are_compared_too(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    """A fault that only the loaded model shows: the twin passes, the two prompts do not."""
    monkeypatch.setattr("decoding.models.check_twin", lambda *_: None)
    honest = decoding.runner.attend_kernel
    monkeypatch.setattr(decoding.runner, "attend_kernel", lambda *args: honest(*args) * 0.9)
    assert "the loaded model's logits differ" in refused(llama)
    load_model(ModelSpec("m", str(llama)), self_check=False).close()
