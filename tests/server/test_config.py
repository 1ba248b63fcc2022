"""Flags over environment over YAML; errors that name the key; the embedded family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.__main__ import command, run
from server.config import Config, ConfigError, load_config

YAML = """
models:
  big: {path: /models/big, kv-memory: 2GiB}
  small: {path: /models/small, dtype: float32, max_model_len: 99, plain_template: "x"}
presets:
  big@cold: {model: big, decoding: {strategy: plain}}
defaults: {model: big@cold}
port: 1000
host: 0.0.0.0
max-num-seqs: 3
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "trimtab.yaml"
    path.write_text(YAML.replace("kv-memory", "kv_memory"))
    return str(path)


def load(*args: Any, **kwargs: Any) -> Config:
    return load_config(*args, **({"environment": {}} | kwargs))


def test_flag_over_environment_over_yaml(file: str) -> None:
    environment = {"TRIMTAB_PORT": "2000", "TRIMTAB_HOST": "1.1.1.1", "TRIMTAB_API_KEY": "a, b", "PATH": "x"}
    config = load({"port": 3000, "dtype": None, "api_key": []}, file=file, environment=environment)
    assert (config.port, config.host, config.max_num_seqs, config.dtype) == (3000, "1.1.1.1", 3, "auto")
    assert config.api_key == ["a", "b"]
    assert load(file=file).port == 1000


def test_entries_become_specs(file: str) -> None:
    config = load({"dtype": "bfloat16", "max_model_len": 50, "enforce_eager": True, "kv_memory": "1.5GB"}, file=file)
    big, small = config.specs()
    assert (big.id, big.path, big.dtype, big.max_model_len, big.kv_memory) == (
        "big",
        "/models/big",
        "bfloat16",
        50,
        2**31,
    )
    assert (small.dtype, small.max_model_len, small.plain_template) == ("float32", 99, "x")
    assert (config.engine().compile, config.engine().max_num_seqs, config.engine().kv_memory) == (
        False,
        3,
        1_500_000_000,
    )
    assert config.default_model == "big@cold"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 5", "Unknown key 'prot' .* Did you mean 'port'"),
        ("models: {a: {paht: x}}", "Unknown key 'models.a.paht' .* Did you mean 'path'"),
        ("models: {a: {}}", r"models\.a\.path: Field required"),
        ("models: {auto: {path: x}}", "'auto' is reserved"),
        ("models: {a: {path: x}}\nport: high", "port: .*integer"),
        ("models: {a: {path: x}}\nport: 70000", "port: .*65535"),
        ("models: {a: {path: x}}\nkv_memory: much", "kv_memory"),
        ("models: {a: {path: x}}\nnegative_weights: all", "negative_weights: .*'definition' or 'any'"),
        ("models: {a: {path: x}}\npresets: {p: {model: b}}", r"presets\.p\.model: 'b' is not served"),
        ("models: {a: {path: x}}\npresets: {a: {model: a}}", "the name 'a' is taken"),
        ("models: {a: {path: x}}\ndefaults: {model: b}", r"defaults\.model: 'b' is not served"),
        ("- a list", "must be a mapping"),
        ("a: [", "Cannot read"),
    ],
)
def test_bad_configurations_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(file=str(path))


def test_unknown_environment_variables_are_ignored(file: str, caplog: pytest.LogCaptureFixture) -> None:
    """Kubernetes puts TRIMTAB_SERVICE_HOST and the like into every container beside a service of that name."""
    load(file=file, environment={"TRIMTAB_SERVICE_HOST": "10.0.0.1"})
    assert "TRIMTAB_SERVICE_HOST" in caplog.text
    with pytest.raises(ConfigError, match="port"):
        load(file=file, environment={"TRIMTAB_PORT": "tcp://10.0.0.1:8000"})


def test_one_model_under_its_names(tmp_path: Path) -> None:
    assert list(load(model=str(tmp_path)).models) == [tmp_path.name]
    assert list(load(model="org/name").models) == ["org/name"]
    named = load({"served_model_name": ["a", "b"]}, model="org/name")
    assert (list(named.models), list(named.presets), named.default_model) == (["a"], ["b"], "a")
    assert named.presets["b"].model == "a"


def test_a_model_and_a_configuration_with_models_exclude_each_other(file: str) -> None:
    with pytest.raises(ConfigError, match="not both"):
        load(model="x", file=file)


def test_the_embedded_family(tmp_path: Path) -> None:
    members = {name: {"kind": "pretrained"} for name in ("base", "expert", "base-small")}
    members["base"]["plain_template"] = "own"
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"plain_template": "shared", "members": members}))
    config = load(family=manifest)
    assert (config.default_model, list(config.models)) == ("base@chat", ["base", "expert", "base-small"])
    assert config.presets["base@chat"].decoding["anti"] == "base-small"
    assert config.models["expert"].path == str(tmp_path / "expert")
    assert (config.models["base"].plain_template, config.models["expert"].plain_template) == ("own", "shared")
    with pytest.raises(ConfigError, match="python -m training demo"):
        load(family=tmp_path / "missing.json")


def test_the_command_line_has_a_flag_for_every_setting() -> None:
    flags = set(command.__annotations__) - {"model", "config", "return"}
    assert flags == set(Config.model_fields) - {"models", "presets", "remotes", "defaults"}


def test_a_bad_configuration_is_exit_code_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(None, str(tmp_path / "no.yaml"), {}) == 2
    assert capsys.readouterr().err.startswith("error: Cannot read the configuration")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"TRIMTAB_PRESETS": "[a, b]"}, "presets must be a mapping"),
        ({"TRIMTAB_MODELS": "{a: ["}, "TRIMTAB_MODELS is not YAML"),
        ({"TRIMTAB_API_KEY": ""}, "is empty"),
    ],
)
def test_a_broken_environment_is_a_sentence(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(environment=environment)


def test_presets_of_a_file_stay_with_a_model_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "presets.yaml"
    path.write_text("presets: {cold: {model: m, decoding: {strategy: plain}}}")
    config = load({"served_model_name": ["m", "alias"]}, model="org/m", file=str(path))
    assert list(config.presets) == ["alias", "cold"]
    path.write_text("presets: [a]")
    with pytest.raises(ConfigError, match="presets must be a mapping"):
        load(model="org/m", file=str(path))


def test_a_directory_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(ConfigError, match="no directory '/no/such'"):
        load(model="/no/such")


def test_the_kernels_cache_is_no_setting(caplog: pytest.LogCaptureFixture) -> None:
    load(environment={"TRIMTAB_CACHE": "/x", "TRIMTAB_PROT": "1"})
    assert "TRIMTAB_PROT" in caplog.text
    assert "TRIMTAB_CACHE" not in caplog.text


JUDGED = """
models:
  a: {path: x}
  b: {path: y}
  tuned: {path: z, kind: adapter, of: a}
  j: {path: w, kind: judge, of: a}
presets:
  p: {model: %s, decoding: {%sspeculation: {draft: ngram, accept: judge}}}
defaults: {model: p}
"""


@pytest.mark.parametrize(
    ("model", "policy", "lacking"),
    [("b", "", "b"), ("tuned", "", "tuned"), ("a", "policy: {terms: [{model: b}, {model: a}]}, ", "b")],
)
def test_a_preset_that_wants_a_judge_needs_its_head(tmp_path: Path, model: str, policy: str, lacking: str) -> None:
    """Its head is that of the first model of its policy; an adapter has none."""
    path = tmp_path / "judged.yaml"
    path.write_text(JUDGED % (model, policy))
    message = rf"presets\.p\.decoding\.speculation\.accept: 'judge' .* of '{lacking}'.* Models that have one: a\."
    with pytest.raises(ConfigError, match=message):
        load(file=str(path))
    path.write_text((JUDGED % (model, policy)).replace("kind: judge", "kind: adapter"))
    with pytest.raises(ConfigError, match="Models that have one: none"):
        load(file=str(path))


@pytest.mark.parametrize("policy", ["", "policy: {terms: [{}, {model: b}]}, ", "policy: 5, ", "policy: {terms: [5]}, "])
def test_a_preset_whose_judge_is_there_is_taken(tmp_path: Path, policy: str) -> None:
    """What else is wrong with it is said where presets are resolved."""
    path = tmp_path / "judged.yaml"
    path.write_text(JUDGED % ("a", policy))
    assert load(file=str(path)).default_model == "p"
