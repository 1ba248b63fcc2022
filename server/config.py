"""What the server is told: flags over environment (`TRIMTAB_*`) over YAML, all under the same names.

`load_config` merges the three and checks them; `ConfigError` carries the sentence for the operator. A configuration
without models is the embedded family.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from decoding.core import SCORERS, EngineConfig, ModelLoadError, ModelSpec
from decoding.rules import RULES
from decoding.scorers.remote import RemoteSpec
from server.errors import nearest
from server.family import FAMILY, embedded_family

logger = logging.getLogger("trimtab.server")

PARTS = ("adapter", "judge")  # kinds of entries that belong to another one
RESERVED = ("auto", "ngram", "prediction")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


CACHE_VARIABLE = "TRIMTAB_CACHE"  # where compiled kernels are kept; not a setting of the server


class ConfigError(Exception):
    """The configuration cannot be used; the message names the key and what it may be."""


def _to_bytes(value: Any) -> Any:
    """Sizes may be written as 8GiB, 500MB or a number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", value.lower()) if isinstance(value, str) else None
    return int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else value


def _to_list(value: Any) -> Any:
    """Lists may be written with commas, so that they fit into the environment."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(_to_bytes), Field(ge=0)]
Names = Annotated[list[str], BeforeValidator(_to_list)]
Positive = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """Unknown keys are errors, and a configuration does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelEntry(Strict):
    """One entry under `models`. An adapter is a PEFT LoRA directory `of` another entry, a judge a judge head of one."""

    path: str
    kind: Literal["causal", "reward", "prm", "guard", "self_eval", "adapter", "judge"] = "causal"
    of: str | None = None
    dtype: str | None = None
    device: str | None = None
    max_model_len: Positive | None = None
    kv_memory: Bytes | None = None
    plain_template: str | None = None
    view: Literal["auto", "plain", "chat"] | None = None
    step_marker: Annotated[str, Field(min_length=1)] | None = None
    score_tokens: Names | None = None
    rendering: str | None = None


class RemoteEntry(Strict):
    """One entry under `remotes`: a scorer on another server; see docs/scorers.md."""

    url: str
    kind: Literal["pooling", "score", "classify", "openai"] = "pooling"
    model: str = ""
    api_key_env: str | None = None
    timeout: Annotated[float, Field(gt=0)] = 60.0
    label: int = -1
    step_marker: str | None = None
    question: str | None = None


class Preset(Strict):
    """A name for a model with a `decoding` field; listed as a model."""

    model: str
    decoding: dict[str, Any] = Field(default_factory=dict)


class Defaults(Strict):
    """What a request means that does not say."""

    model: str | None = None


class Config(Strict):
    """Every setting; the names are those of the flags (with `-`), the YAML keys and, upper case, the environment."""

    models: dict[str, ModelEntry] = Field(default_factory=dict)
    presets: dict[str, Preset] = Field(default_factory=dict)
    remotes: dict[str, RemoteEntry] = Field(default_factory=dict)
    defaults: Defaults = Defaults()
    served_model_name: Names = []
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: Names = []
    admin_key: Annotated[str, Field(min_length=1)] | None = None
    admin_root: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: Positive | None = None
    max_num_seqs: Positive = 64
    max_num_batched_tokens: Positive = 1024
    max_logit_rows: Positive = 512
    max_search_tokens: Positive | None = None
    max_queue: Positive = 1024
    kv_memory: Bytes | None = None
    block_size: Positive = 16
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    compile_from: Annotated[int, Field(ge=0)] = 10_000_000
    batch_invariant: bool = False
    self_check: bool = True
    threads: Positive | None = None
    trust_remote_code: bool = False
    negative_weights: Literal["definition", "any"] = "definition"
    chat_template_kwargs: Names = ["enable_thinking"]
    shutdown_timeout: Annotated[float, Field(ge=0)] = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    max_body_size: Bytes = 8 * 2**20
    max_n: Positive = 64
    max_candidates: Positive = 64
    max_scored_texts: Positive = 256
    max_logprobs: Annotated[int, Field(ge=0)] = 20
    max_prompt_logprobs: Positive = 2**20
    max_logit_bias: Positive = 1024
    max_stop: Positive = 16
    max_stop_length: Positive = 1024

    @field_validator("models")
    @classmethod
    def _ids_are_free(cls, models: dict[str, ModelEntry]) -> dict[str, ModelEntry]:
        for name in models:
            if name in RESERVED:
                raise ValueError(f"'{name}' is reserved; give the model another id")
        return models

    @property
    def default_model(self) -> str:
        """The id that a request without `model` means."""
        entries = self.models.items()
        writers = [name for name, entry in entries if entry.kind not in ("judge", *SCORERS)]
        return self.defaults.model or next(iter(writers), next(name for name, e in entries if e.kind != "judge"))

    def specs(self) -> tuple[ModelSpec, ...]:
        """What the engine loads: an entry's own setting, else the server's."""
        return tuple(
            ModelSpec(
                id=name,
                path=entry.path,
                kind=entry.kind,
                of=entry.of,
                dtype=entry.dtype or self.dtype,
                device=entry.device or self.device,
                max_model_len=entry.max_model_len or self.max_model_len,
                kv_memory=entry.kv_memory,
                plain_template=entry.plain_template,
                view=entry.view,
                trust_remote_code=self.trust_remote_code,
                step_marker=entry.step_marker,
                score_tokens=None if entry.score_tokens is None else tuple(entry.score_tokens),
                rendering=entry.rendering,
            )
            for name, entry in self.models.items()
        )

    def remote_specs(self) -> tuple[RemoteSpec, ...]:
        """Scorers elsewhere. Raises ConfigError for an entry that cannot be used."""
        made = []
        for name, entry in self.remotes.items():
            values = {key: value for key, value in entry.model_dump().items() if value is not None}
            try:
                made.append(RemoteSpec(name, **values))
            except ModelLoadError as error:
                raise ConfigError(f"remotes.{name}: {error}") from error
        return tuple(made)

    def engine(self) -> EngineConfig:
        """The engine's own settings."""
        return EngineConfig(
            kv_memory=self.kv_memory,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_logit_rows=self.max_logit_rows,
            max_search_tokens=self.max_search_tokens,
            max_queue=self.max_queue,
            prefix_cache=self.enable_prefix_caching,
            compile=not self.enforce_eager,
            compile_from=self.compile_from,
            batch_invariant=self.batch_invariant,
            self_check=self.self_check,
            threads=self.threads,
            adapters=self.admin_key is not None,
        )


def load_config(
    flags: Mapping[str, Any] | None = None,
    *,
    model: str | None = None,
    file: str | None = None,
    environment: Mapping[str, str] | None = None,
    family: Path = FAMILY,
) -> Config:
    """Merges flags (None is absent) over environment over a YAML file; `model` is a directory or hub id to serve alone.

    Without models anywhere, the embedded family. Raises ConfigError.
    """
    values = _read_yaml(file) if file else {}
    values |= _from_environment(os.environ if environment is None else environment)
    values |= {key: value for key, value in (flags or {}).items() if value not in (None, [], ())}
    for key in values:
        if key not in Config.model_fields:
            raise ConfigError(f"Unknown key '{key}' in the configuration.{_hint(key)}")
    if model is not None:
        if values.get("models"):
            raise ConfigError(f"Give either a model ('{model}') or a configuration with 'models', not both.")
        alone = _alone(model, _to_list(values.get("served_model_name", [])))
        values |= alone | {"presets": alone["presets"] | _mapping(values, "presets")}
    if not values.get("models"):
        embedded = _embedded(family)
        embedded["presets"] |= _mapping(values, "presets")
        values.pop("presets", None)
        values = embedded | {key: value for key, value in values.items() if key != "models"}
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error
    _check_references(config)
    return config


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read the configuration {file}: {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"The configuration {file} must be a mapping of keys to values.")
    return {str(key).replace("-", "_"): value for key, value in (loaded or {}).items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Only a warning for an unknown name: clusters put variables named after their services into every process."""
    values = {}
    for name, value in environment.items():
        if not name.startswith("TRIMTAB_"):
            continue
        key = name.removeprefix("TRIMTAB_").lower()
        if name == CACHE_VARIABLE:
            continue
        if key not in Config.model_fields:
            logger.warning("The environment variable %s is not known and is ignored.%s", name, _hint(key))
        else:
            values[key] = value
            if key in ("models", "presets", "remotes", "defaults"):
                try:
                    values[key] = yaml.safe_load(value)
                except yaml.YAMLError as error:
                    raise ConfigError(f"The environment variable {name} is not YAML: {error}") from error
            if key in ("api_key", "admin_key") and not value.strip():
                raise ConfigError(f"The environment variable {name} is empty: unset it, or give a key.")
    return values


def _mapping(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key} must be a mapping of names to entries (it is {value!r}).")
    return value


def _hint(key: str) -> str:
    return nearest(key, Config.model_fields)


def _alone(path: str, names: Sequence[str]) -> dict[str, Any]:
    """One model, under its own name or the names it was given; those after the first are presets that add nothing."""
    if path.startswith(("/", "./", "../", "~")) and not Path(path).expanduser().exists():
        raise ConfigError(f"There is no directory '{path}'.")
    own, *aliases = names or [Path(path).resolve().name if Path(path).is_dir() else path]
    return {"models": {own: {"path": path}}, "presets": {alias: {"model": own} for alias in aliases}}


def _embedded(manifest: Path) -> dict[str, Any]:
    try:
        return embedded_family(manifest)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "No model is named and the embedded family is not there: name a model directory or hub id, "
            f"or make the family with 'python -m training demo'. ({error})"
        ) from error


def _check_part(config: Config, name: str, entry: ModelEntry) -> None:
    """An adapter and a judge head belong to a model and have what that has."""
    if entry.kind not in PARTS:
        if entry.of is not None:
            raise ConfigError(f"models.{name}.of: only {' and '.join(PARTS)} are of another model (kind: adapter).")
        return
    bases = [each for each, model in config.models.items() if model.kind not in PARTS]
    if entry.of not in bases:
        raise ConfigError(
            f"models.{name}.of: name the model that the {entry.kind} is of: {', '.join(bases) or 'none'}."
        )
    for key in ("dtype", "device", "max_model_len", "kv_memory"):
        if getattr(entry, key) is not None:
            raise ConfigError(f"models.{name}.{key}: the {entry.kind} has that of its model '{entry.of}'.")


def _check_admin(config: Config) -> None:
    if (config.admin_key is None) != (config.admin_root is None):
        given, lacking = ("admin_key", "admin_root") if config.admin_key is not None else ("admin_root", "admin_key")
        raise ConfigError(f"{lacking}: {given} needs it beside it; adapters are then loaded over HTTP.")
    if config.admin_key in config.api_key:
        raise ConfigError("admin_key: it must be another key than those of api_key.")
    if config.admin_root is not None and not Path(config.admin_root).expanduser().is_dir():
        raise ConfigError(f"admin_root: there is no directory '{config.admin_root}'.")


def _check_judged(config: Config, name: str, preset: Preset) -> None:
    """A rule that asks a judge head needs that of the model whose tokens are drafted: the policy's first one."""
    speculation = preset.decoding.get("speculation")
    accept = speculation.get("accept") if isinstance(speculation, dict) else None
    if not isinstance(accept, str) or accept not in RULES or not RULES[accept].judges:
        return
    model = preset.model
    match preset.decoding.get("policy"):
        case {"terms": [{"model": str(first)}, *_]}:
            model = first
    judged = [entry.of for entry in config.models.values() if entry.kind == "judge" and entry.of is not None]
    if model not in judged:
        raise ConfigError(
            f"presets.{name}.decoding.speculation.accept: '{accept}' needs a judge head of '{model}', a model entry of "
            f"kind 'judge'. Models that have one: {', '.join(judged) or 'none'}."
        )


def _check_references(config: Config) -> None:
    _check_admin(config)
    config.remote_specs()
    for name in config.remotes:
        if name in config.models or name in RESERVED:
            raise ConfigError(f"remotes: the name '{name}' is taken.")
    models = [name for name, entry in config.models.items() if entry.kind != "judge"]
    names = [*models, *config.presets]
    for name, entry in config.models.items():
        _check_part(config, name, entry)
    for name, preset in config.presets.items():
        if name in config.models or name in RESERVED or name in config.remotes:
            raise ConfigError(f"presets: the name '{name}' is taken.")
        if preset.model not in models:
            raise ConfigError(f"presets.{name}.model: '{preset.model}' is not served.{nearest(preset.model, models)}")
        _check_judged(config, name, preset)
    if config.defaults.model is not None and config.defaults.model not in names:
        raise ConfigError(
            f"defaults.model: '{config.defaults.model}' is not served.{nearest(config.defaults.model, names)}"
        )


def _explain(error: ValidationError) -> str:
    found = error.errors(include_url=False)
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])  # a typo explains the rest
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        sections: dict[str, type[Strict]] = {
            "models": ModelEntry,
            "presets": Preset,
            "remotes": RemoteEntry,
            "defaults": Defaults,
        }
        return f"Unknown key '{key}' in the configuration.{nearest(path[-1], sections[path[0]].model_fields)}"
    return f"{key}: {first['msg'].removeprefix('Value error, ')} (it is {first.get('input')!r})."
