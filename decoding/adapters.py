"""Reads a PEFT LoRA directory for a model that is already hosted: configuration, tensors, shapes.

PEFT's own tensor names and rules are followed (peft 0.21, `tuners/lora`): which modules are meant, rank and alpha
patterns, rank-stabilised scaling. What would change the base's weights, or is not a plain LoRA on a linear layer, is
refused with a sentence; so is a directory that PEFT would load only in part.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from decoding.core import ModelLoadError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Fields that change what the adapter computes in a way that is not served; empty or false means it is not used.
REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "biases of its own",
    "modules_to_save": "whole modules beside the LoRA (modules_to_save)",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "replicated layers",
    "target_parameters": "parameters that are not linear layers (target_parameters)",
    "alora_invocation_tokens": "invocation tokens (aLoRA)",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron layers",
}
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others (PiSSA, ...) also change the base


@dataclass(frozen=True, slots=True)
class Lora:
    """One adapter on one linear layer: y += (x down^T) up, the scale folded into `up`. down [r, in], up [r, out]."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA for one model. `generation` is a digest of its files: two that differ share no cached prefix."""

    modules: Mapping[str, Lora]
    generation: str

    @property
    def parameters(self) -> int:
        """Elements of all its matrices."""
        return sum(lora.down.numel() + lora.up.numel() for lora in self.modules.values())


def read_adapter(path: str, linears: Mapping[str, tuple[int, int]], like: torch.Tensor) -> Adapter:
    """The adapter in directory `path`, on the device and in the dtype of `like`.

    linears: module name to (in, out) of every layer of the base that may be adapted. Raises ModelLoadError.
    """
    folder = Path(path)
    config, config_bytes = _read_config(folder)
    _refuse(config)
    file = folder / WEIGHTS
    if not file.is_file():
        pickles = any(folder.glob("adapter_model.bin"))
        hint = " Convert its pickled weights with save_pretrained(safe_serialization=True)." if pickles else ""
        raise ModelLoadError(f"{folder} has no {WEIGHTS}; only safetensors are loaded.{hint}")
    content = file.read_bytes()
    try:
        tensors = load(content)
    except (SafetensorError, ValueError) as error:
        raise ModelLoadError(f"{file} is not a safetensors file: {str(error).splitlines()[0]}") from error
    pairs = _pairs(tensors)
    _check_targets(config, pairs, linears)
    modules = {}
    for name, (down, up) in pairs.items():
        _check_shapes(config, name, down, up, linears[name])
        scaled = up.T.float() * _scale(config, name, down.shape[0])
        if not (down.isfinite().all() and scaled.isfinite().all()):
            raise ModelLoadError(f"its tensors for {name} hold NaN or infinity.")
        modules[name] = Lora(down.to(like).contiguous(), scaled.to(like).contiguous())
    return Adapter(modules, hashlib.sha256(config_bytes + content).hexdigest())


def _read_config(folder: Path) -> tuple[dict[str, Any], bytes]:
    if not folder.is_dir():
        raise ModelLoadError(f"{folder} is not a directory; an adapter is a local PEFT directory.")
    file = folder / CONFIG
    if not file.is_file():
        raise ModelLoadError(f"{folder} has no {CONFIG}, so it is not a PEFT directory.")
    content = file.read_bytes()
    try:
        config = json.loads(content)
    except ValueError as error:
        raise ModelLoadError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ModelLoadError(f"{file} names no peft_type.")
    return config, content


def _refuse(config: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise ModelLoadError(f"it is a PEFT adapter of type {config['peft_type']}; only LORA is served.")
    for field, what in REFUSED.items():
        if config.get(field):
            raise ModelLoadError(f"it uses {what}, which is not served.")
    if config.get("bias", "none") != "none":
        raise ModelLoadError(f"it was trained with bias '{config['bias']}'; only 'none' is served.")
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise ModelLoadError(f"it starts from '{start}', which changes the base's weights; convert it to a plain LoRA.")
    if not isinstance(config.get("target_modules"), str | list):
        raise ModelLoadError(f"its {CONFIG} names no target_modules.")
    patterns = [config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}]
    numbers: list[Any] = [config.get("r"), config.get("lora_alpha"), *patterns[0].values(), *patterns[1].values()]
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers) or numbers[0] < 1:
        raise ModelLoadError(f"its {CONFIG} gives no r of at least 1 or no finite lora_alpha.")


def _pairs(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name to (A [r, in], B [out, r])."""
    names: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None:
            kind = "an embedding" if "lora_embedding" in key else "no LoRA matrix of a linear layer"
            raise ModelLoadError(f"its tensor {key} is {kind}, which is not served.")
        names.setdefault(match[1], {})[match[2]] = tensor
    if not names:
        raise ModelLoadError("it has no tensors.")
    for name, both in names.items():
        if len(both) < 2:
            raise ModelLoadError(f"it has only one of the two LoRA matrices for {name}.")
    return {name: (both["A"], both["B"]) for name, both in names.items()}


def _check_targets(config: Mapping[str, Any], adapted: Iterable[str], linears: Mapping[str, tuple[int, int]]) -> None:
    """The tensors are for exactly the layers of the base that the configuration means."""
    wrong = sorted(set(adapted) - set(linears))
    if wrong:
        raise ModelLoadError(
            f"it adapts {wrong[0]}, which is no linear layer of the base that can be adapted (the output head and "
            "routed experts cannot); is it an adapter of another model?"
        )
    targets = config["target_modules"]
    if isinstance(targets, list):
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in linears):
                raise ModelLoadError(f"its target module '{target}' is no linear layer of the base.")
    meant = {name for name in linears if _is_target(config, name)}
    odd = sorted(meant ^ set(adapted))
    if odd:
        has = "has no tensors for" if odd[0] in meant else "has tensors for"
        aim = "means" if odd[0] in meant else "does not mean"
        raise ModelLoadError(f"it {has} {odd[0]}, which its {CONFIG} {aim}.")


def _is_target(config: Mapping[str, Any], name: str) -> bool:
    """PEFT's `check_target_module_exists`."""
    excluded, targets = config.get("exclude_modules"), config["target_modules"]
    if excluded and _named(excluded, name):
        return False
    if targets == "all-linear":
        return True
    if not _named(targets, name) or isinstance(targets, str):
        return _named(targets, name)
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if match:
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _named(targets: str | list[str], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or any(name.endswith(f".{target}") for target in targets)


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: float) -> float:
    """The value of the first pattern that matches the end of `name`."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return float(next(found, default))


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_shapes(
    config: Mapping[str, Any], name: str, down: torch.Tensor, up: torch.Tensor, size: tuple[int, int]
) -> None:
    rank = int(_pattern(config.get("rank_pattern"), name, config["r"]))
    got, want = (tuple(down.shape), tuple(up.shape)), ((rank, size[0]), (size[1], rank))
    if got != want:
        raise ModelLoadError(
            f"its matrices for {name} have shapes {list(got[0])} and {list(got[1])}, where rank {rank} on the base "
            f"needs {list(want[0])} and {list(want[1])}; is it an adapter of another model?"
        )
