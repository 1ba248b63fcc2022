"""Loads a causal LM, or a scorer with a head of its own, and decides whether it can be served exactly.

Refuses with a sentence otherwise.

In order: the configuration (`host_gate`), a tiny twin of the model (`selfcheck`), the weights (safetensors only), the
attention calls of the real model (`host_probe`), its logits on two short prompts (`selfcheck`).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from decoding.core import SCORERS, ModelLoadError, ModelSpec
from decoding.heads import HeadModel, has_head, read_head_model
from decoding.host_gate import causal_class, context_limit
from decoding.runner import Runner
from decoding.selfcheck import check_head, check_twin, check_weights, own_logits
from decoding.streams import use_device
from decoding.weights import first_line, read_weights

log = logging.getLogger(__name__)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
KINDS = ("causal", "reward", "prm", "guard", "self_eval")
PROMPT_TOKENS = 16


def load_model(spec: ModelSpec, *, compile: bool = True, self_check: bool = True, adapters: bool = False) -> Runner:
    """Load, gate and check one model. With `compile`, `Runner.warm_up` will compile; nothing is compiled here.

    `adapters`: some may be loaded later, so that compiling for them is part of the warm-up.
    Raises ModelLoadError, with a sentence that says what is wrong, for anything that would not be served exactly.
    """
    try:
        return _load(spec, compile, self_check, adapters)
    except ModelLoadError as error:
        message = str(error)
        raise error if message.startswith("Model '") else ModelLoadError(f"Model '{spec.id}': {message}") from error


def _load(spec: ModelSpec, compile: bool, self_check: bool, adapters: bool) -> Runner:
    if spec.kind not in KINDS:
        raise ModelLoadError(f"kind '{spec.kind}' is not one of {', '.join(KINDS)}.")
    config = read_config(spec)
    scores = spec.kind in SCORERS and has_head(spec, config)
    kind = causal_class(config, scores, spec.kind)
    length = context_limit(config, spec.max_model_len)
    device = _device(spec)
    use_device(device)
    dtype = _dtype(spec, config, device)
    if self_check:
        check_twin(kind, config, True, device)
    model: Any = read_head_model(spec, config, dtype) if scores else read_weights(spec, kind, config, dtype)
    return host_model(
        model.eval().to(device), spec.id, length, compile=compile, self_check=self_check, adapters=adapters
    )


def host_model(
    model: Any,
    id: str,
    max_model_len: int | None = None,
    *,
    compile: bool = True,
    self_check: bool = True,
    adapters: bool = False,
) -> Runner:
    """A runner of a model that is in memory, on its device and in its dtype; it takes the model over.

    model: a PreTrainedModel or HeadModel. With `self_check`, its logits are compared with its own forward first. Raises
    ModelLoadError when they differ or its attention cannot be hosted.
    """
    ids = torch.arange(2 * PROMPT_TOKENS, device=model.device).view(2, -1) * 7919 % int(model.config.vocab_size)
    expected = own_logits(model, ids) if self_check else None
    if expected is not None and isinstance(model, HeadModel):
        check_head(model, expected, ids)
    runner = Runner(model, id, max_model_len, compile=compile, adapters=adapters)
    if expected is not None:
        runner.allocate(2, PROMPT_TOKENS)
        try:
            check_weights(runner, expected, ids.tolist())
        except ModelLoadError:
            runner.close()
            raise
        runner.release()
    return runner


def read_config(spec: ModelSpec) -> Any:
    """The model's configuration. Raises ModelLoadError when there is none, or it is not one."""
    path = Path(spec.path)
    if path.exists():
        file = path / "config.json"
        if not path.is_dir():
            raise ModelLoadError(f"{spec.path} is not a directory; give a model directory or a hub id.")
        if not file.is_file():
            raise ModelLoadError(f"{spec.path} has no config.json, so it is not a model directory.")
        try:
            values = json.loads(file.read_text())
        except ValueError as error:
            raise ModelLoadError(f"{file} is not valid JSON: {error}.") from error
        if not isinstance(values, dict) or "model_type" not in values:
            raise ModelLoadError(f"{file} names no model_type.")
        _find_weights(path)
    elif spec.path.startswith(("/", "./", "../", "~")) or spec.path.count("/") > 1:
        raise ModelLoadError(f"the directory {spec.path} does not exist.")
    try:
        return AutoConfig.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise ModelLoadError(f"the configuration of {spec.path} cannot be read: {first_line(error)}") from error


def _find_weights(path: Path) -> None:
    """Refuse a directory without complete safetensors before transformers looks for anything else."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{index} is not a safetensors index: {first_line(error)}") from error
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise ModelLoadError(f"{path} lacks {', '.join(missing)}, which its safetensors index names.")
    elif not (path / "model.safetensors").is_file():
        pickles = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        hint = " Convert its pickled weights with save_pretrained(safe_serialization=True)." if pickles else ""
        raise ModelLoadError(f"{path} has no model.safetensors; only safetensors are loaded.{hint}")


def _device(spec: ModelSpec) -> torch.device:
    if spec.device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(spec.device)
    except RuntimeError as error:
        raise ModelLoadError(f"device '{spec.device}' is not known: {first_line(error)}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(f"device '{spec.device}' was asked for, but there is no CUDA device.")
    return torch.device("cuda:0") if spec.device == "cuda" else device


def _dtype(spec: ModelSpec, config: Any, device: torch.device) -> torch.dtype:
    if spec.dtype != "auto" and spec.dtype not in DTYPES:
        raise ModelLoadError(f"dtype '{spec.dtype}' is not one of auto, {', '.join(DTYPES)}.")
    own = getattr(config, "dtype", None) or torch.float32
    dtype = DTYPES.get(str(own).removeprefix("torch."), torch.float32) if spec.dtype == "auto" else DTYPES[spec.dtype]
    if dtype == torch.float16 and device.type == "cpu":
        log.warning("Model '%s': float16 runs as float32 on a CPU; dtype bfloat16 is faster.", spec.id)
        return torch.float32
    return dtype
