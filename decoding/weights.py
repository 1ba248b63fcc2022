"""Weights from safetensors, all of them or none."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from decoding.core import ModelLoadError, ModelSpec


def read_weights(
    spec: ModelSpec, kind: Any, config: Any, dtype: torch.dtype, prefix: str = "", trust: bool | None = None
) -> PreTrainedModel:
    """The model with every weight from safetensors. Raises ModelLoadError when one is missing or does not fit.

    kind: the model's class. prefix: what the directory's names have before the model's own. trust: whether code in the
    directory may run, as the spec says unless given.
    """
    more: dict[str, Any] = {"key_mapping": {"^" + prefix.replace(".", r"\."): ""}} if prefix else {}
    try:
        model, info = kind.from_pretrained(
            spec.path,
            config=copy.deepcopy(config),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code if trust is None else trust,
            attn_implementation="eager",
            output_loading_info=True,
            **more,
        )
    except Exception as error:
        raise ModelLoadError(f"the weights in {spec.path} cannot be loaded: {first_line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            some = ", ".join(sorted(str(key) for key in info[problem])[:4])
            raise ModelLoadError(f"{len(info[problem])} {problem.replace('_', ' ')} in its safetensors: {some}.")
    loaded: PreTrainedModel = model
    return loaded


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
