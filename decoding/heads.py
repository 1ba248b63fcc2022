"""Reward models and PRMs with a classification head: a decoder whose kept rows go through the head, not an LM's.

The classes' own `forward` pools the last token of each row of a padded batch, which is wrong for a packed one, so only
their parts are used. Layouts that transformers knows (`*ForSequenceClassification`, `*ForTokenClassification`) and
those of published models with code of their own, which is never run: Qwen2.5-Math's reward models and PRMs (a small
MLP as head), Skywork-o1's PRMs (one linear output beside an unused LM head), ArmoRM (objectives and a gating network).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from decoding.core import ModelLoadError, ModelSpec
from decoding.host_gate import other_head
from decoding.judge import local_directory
from decoding.weights import read_weights

CLASSES: Mapping[str, Any] = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
LINEAR_HEADS = ("score", "classifier", "v_head.summary", "regression_layer")  # where a linear head's tensors are
MLP_HEAD = ("score.0", "score.2")
VALUE_HEAD = "v_head.summary.weight"
WRAPPER = "pretrained_model."  # what stands before the decoder's tensors in some checkpoints


@dataclass(frozen=True, eq=False)
class Gate:
    """ArmoRM's gating network: hidden states [n, H] at the end of the prompt -> weights of the objectives [n, O].

    softmax(MLP(h) / temperature) times a scale; ReLU between the layers (Wang et al. 2024, arXiv:2406.12845).
    """

    layers: tuple[tuple[Tensor, Tensor | None], ...]
    temperature: float
    scale: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, O], fp32."""
        x = hidden.float()
        for i, (weight, bias) in enumerate(self.layers):
            x = nn.functional.linear(x, weight.float(), None if bias is None else bias.float())
            x = torch.relu(x) if i + 1 < len(self.layers) else x
        return torch.softmax(x / self.temperature, 1) * self.scale


@dataclass(frozen=True, eq=False)
class Head:
    """What is told of a classification head: its number of outputs, their names, ArmoRM's gate and transform [O, O]."""

    outputs: int
    labels: tuple[str, ...] = ()
    gate: Gate | None = None
    transform: Tensor | None = None

    def to(self, device: torch.device) -> Head:
        """The same on `device`."""
        if self.gate is None:
            return self
        layers = tuple((w.to(device), None if b is None else b.to(device)) for w, b in self.gate.layers)
        transform = None if self.transform is None else self.transform.to(device)
        return replace(self, gate=replace(self.gate, layers=layers), transform=transform)


class HeadModel(nn.Module):
    """A decoder and a head, looking like a causal LM to a runner: `logits` [1, T or kept rows, outputs]."""

    def __init__(self, backbone: PreTrainedModel, head: nn.Module, about: Head) -> None:
        super().__init__()
        self.backbone, self.head, self.about = backbone, head, about

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To another device the gate and the transform go along: they are no parameters."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.about = self.about.to(self.device)
        return self

    @property
    def config(self) -> Any:
        """The decoder's."""
        return self.backbone.config

    @property
    def dtype(self) -> torch.dtype:
        """The decoder's."""
        found: torch.dtype = self.backbone.dtype
        return found

    @property
    def device(self) -> torch.device:
        """The decoder's."""
        found: torch.device = self.backbone.device
        return found

    def set_attn_implementation(self, name: str) -> None:
        """As transformers' models do."""
        self.backbone.set_attn_implementation(name)

    def get_output_embeddings(self) -> nn.Module:
        """The head: what goes into it are the kept rows' hidden states."""
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        return_dict: bool = True,
        logits_to_keep: Tensor | int = 0,
    ) -> CausalLMOutput:
        """ids [n, T] -> logits [n, T, outputs], or of the positions `logits_to_keep` [R] only."""
        made = self.backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True)
        hidden = made.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        return CausalLMOutput(logits=self.head(hidden))


def has_head(spec: ModelSpec, config: Any) -> bool:
    """Whether the checkpoint has a scoring head: one in place of an LM's, or a value head beside it."""
    name = _architecture(config)
    if name and not name.endswith(("ForCausalLM", "LMHeadModel")):
        return True
    return Path(spec.path).is_dir() and _Tensors(spec).has(VALUE_HEAD)


def own_classifier(model: HeadModel) -> PreTrainedModel | None:
    """Transformers' own class around the same decoder and head, None for layouts that it does not know."""
    name = _architecture(model.config)
    auto = next((auto for ending, auto in CLASSES.items() if name.endswith(ending)), None)
    kind = None if auto is None else auto._model_mapping.get(type(model.config), None)
    if kind is None or kind.__name__ != name:
        return None
    config = copy.deepcopy(model.config)
    config.pad_token_id = None  # of a single prompt the last token is always meant
    with torch.device("meta"):
        own: PreTrainedModel = kind(config)
    setattr(own, own.base_model_prefix, model.backbone)
    setattr(own, "score" if hasattr(own, "score") else "classifier", model.head)
    return own.eval()


def read_head_model(spec: ModelSpec, config: Any, dtype: torch.dtype) -> HeadModel:
    """The decoder and head in a directory. Raises ModelLoadError for tensors that are missing or do not fit."""
    tensors = _Tensors(spec)
    backbone = _backbone(spec, config, dtype, tensors)
    head, about = _head(tensors, config, dtype)
    _check_sizes(head, about, config)
    _check_kind(spec, about, config)
    return HeadModel(backbone, head, about)


class _Tensors:
    """The tensors of a directory's safetensors files, by name, read when they are asked for."""

    def __init__(self, spec: ModelSpec) -> None:
        self._files: dict[str, str] = {}
        for path in sorted(local_directory(spec.path).glob("*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), str(path))

    @property
    def names(self) -> Iterable[str]:
        return self._files

    def has(self, name: str) -> bool:
        """Whether there is a tensor `name`, under the wrapper's name too."""
        return name in self._files or WRAPPER + name in self._files

    def need(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor `name`. Raises ModelLoadError if there is none."""
        found = self.get(name, dtype)
        if found is None:
            raise ModelLoadError(f"its head lacks the tensor {name} in its safetensors.")
        return found

    def get(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """The tensor `name`, under the wrapper's name too; None if there is none."""
        for full in (name, WRAPPER + name):
            if full in self._files:
                with safe_open(self._files[full], framework="pt") as file:
                    found: Tensor = file.get_tensor(full).to(dtype)
                    return found
        return None


def _architecture(config: Any) -> str:
    return str((getattr(config, "architectures", None) or ("",))[0])


def _backbone(spec: ModelSpec, config: Any, dtype: torch.dtype, tensors: _Tensors) -> PreTrainedModel:
    wrapped = any(name.startswith(WRAPPER) for name in tensors.names)
    reports = logging.getLogger("transformers.modeling_utils")
    level = reports.level
    reports.setLevel(logging.ERROR)  # of tensors that are not the decoder's: the head's
    try:
        kind = AutoModel._model_mapping[type(config)]
        return read_weights(spec, kind, config, dtype, WRAPPER if wrapped else "", trust=False)
    finally:
        reports.setLevel(level)


def _head(tensors: _Tensors, config: Any, dtype: torch.dtype) -> tuple[nn.Module, Head]:
    if any(tensors.has(f"{name}.weight") for name in MLP_HEAD):
        first, second = (
            _as_linear(name, tensors.need(f"{name}.weight", dtype), tensors.need(f"{name}.bias", dtype))
            for name in MLP_HEAD
        )
        if first.out_features != second.in_features:
            raise ModelLoadError(
                f"its head's layers do not fit: {first.out_features} numbers into {second.in_features}."
            )
        return nn.Sequential(first, nn.ReLU(), second), Head(second.out_features)
    for name in LINEAR_HEADS:
        head = _linear(tensors, name, dtype)
        if head is not None:
            labels = _labels(config, head.out_features)
            gate = _gate(tensors, config)
            transform = None if gate is None else tensors.need("reward_transform_matrix", torch.float32)
            return head, Head(head.out_features, labels, gate, transform)
    raise ModelLoadError(
        f"a {_architecture(config)} without a head that is known: none of {', '.join(LINEAR_HEADS)} is in its "
        "safetensors."
    )


def _linear(tensors: _Tensors, name: str, dtype: torch.dtype) -> nn.Linear | None:
    weight = tensors.get(f"{name}.weight", dtype)
    if weight is None or weight.dim() != 2:
        return None
    return _as_linear(name, weight, tensors.get(f"{name}.bias", dtype))


def _as_linear(name: str, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = [list(each.shape) for each in (weight, bias) if each is not None]
        raise ModelLoadError(f"its head's {name} has tensors of shapes {shapes}, which are no linear layer's.")
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def _labels(config: Any, outputs: int) -> tuple[str, ...]:
    named: Mapping[int, str] = getattr(config, "id2label", None) or {}
    labels = tuple(str(named.get(i, "")) for i in range(outputs))
    default = tuple(f"LABEL_{i}" for i in range(outputs))
    return labels if all(labels) and labels != default else ()


def _gate(tensors: _Tensors, config: Any) -> Gate | None:
    count = sum("gating.layers." in name and name.endswith(".weight") for name in tensors.names)
    if not count and not _architecture(config).endswith("WithGating"):
        return None
    layers: list[tuple[Tensor, Tensor | None]] = []
    for name in (f"gating.layers.{i}" for i in range(max(count, 1))):
        weight, bias = tensors.need(f"{name}.weight", torch.float32), tensors.get(f"{name}.bias", torch.float32)
        _as_linear(name, weight, bias)
        layers.append((weight, bias))
    scale = tensors.need("gating.logit_scale", torch.float32)
    return Gate(tuple(layers), float(getattr(config, "gating_temperature", 10.0)), float(scale.flatten()[0]))


def _check_kind(spec: ModelSpec, about: Head, config: Any) -> None:
    """Raises ModelLoadError for labels of tokens as a reward, and for more outputs than score a step as a PRM.

    One output can be read as either.
    """
    name = _architecture(config)
    what, its = other_head(name)
    found = f"it is a {name}, which {what or 'has a head'} ({about.outputs} outputs):"
    if spec.kind == "reward" and its == "prm" and about.outputs != 1:
        raise ModelLoadError(f"{found} its kind is prm, not reward.")
    if spec.kind == "prm" and about.outputs > 2:
        right = "its kind is reward, not prm." if its == "reward" else "a prm has 1 or 2 outputs."
        raise ModelLoadError(f"{found} {right}")


def _check_sizes(head: nn.Module, about: Head, config: Any) -> None:
    """Raises ModelLoadError unless head, gate and transform fit the decoder, each other and what the config says."""
    width = next(each.shape[-1] for each in head.parameters() if each.dim() == 2)
    if width != config.hidden_size:
        raise ModelLoadError(f"its head reads {width} numbers, and its decoder gives {config.hidden_size}.")
    outputs = about.outputs
    stated = config.num_labels if _architecture(config).endswith(tuple(CLASSES)) else None
    if stated is not None and stated != outputs:
        raise ModelLoadError(f"its head has {outputs} outputs, and its config.json names {stated} labels.")
    if about.gate is not None:
        sizes = [width, *(weight.shape[0] for weight, _ in about.gate.layers)]
        reads = [weight.shape[1] for weight, _ in about.gate.layers]
        if reads != sizes[:-1] or sizes[-1] != outputs:
            raise ModelLoadError(f"its gate's layers do not lead from {width} numbers to its {outputs} objectives.")
    if about.transform is not None and about.transform.shape != (outputs, outputs):
        shape = list(about.transform.shape)
        raise ModelLoadError(f"its reward_transform_matrix is {shape}, not [{outputs}, {outputs}].")
