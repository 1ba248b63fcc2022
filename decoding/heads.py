"""Reward models and PRMs with a classification head: a decoder whose kept rows go through the head, not an LM's.

The classes' own `forward` pools the last token of each row of a padded batch, which is wrong for a packed one, so only
their parts are used. Layouts that transformers knows (`*ForSequenceClassification`, `*ForTokenClassification`) and
those of published models with code of their own, which is never run: Qwen2.5-Math's reward models and PRMs (a small
MLP as head), Skywork-o1's PRMs (one linear output beside an unused LM head), ArmoRM (objectives and a gating network).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from decoding.core import ModelLoadError, ModelSpec
from decoding.judge import local_directory

CLASSES = ("ForSequenceClassification", "ForTokenClassification")
LINEAR_HEADS = ("score", "classifier", "v_head.summary", "regression_layer")  # where a linear head's tensors are
MLP_HEAD = ("score.0", "score.2")
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


class HeadModel(nn.Module):
    """A decoder and a head, looking like a causal LM to a runner: `logits` [1, T or kept rows, outputs]."""

    def __init__(self, backbone: PreTrainedModel, head: nn.Module, about: Head) -> None:
        super().__init__()
        self.backbone, self.head, self.about = backbone, head, about

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
    ) -> SimpleNamespace:
        """ids [n, T] -> logits [n, T, outputs], or of the positions `logits_to_keep` [R] only."""
        made = self.backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True)
        hidden = made.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        return SimpleNamespace(logits=self.head(hidden))


def has_head(config: Any) -> bool:
    """Whether the checkpoint has a classification head in place of an LM's."""
    return bool(_architecture(config)) and not _architecture(config).endswith(("ForCausalLM", "LMHeadModel"))


def read_head_model(spec: ModelSpec, config: Any, dtype: torch.dtype) -> HeadModel:
    """The decoder and head in a directory. Raises ModelLoadError for tensors that are missing or do not fit."""
    tensors = _Tensors(spec)
    backbone = _backbone(spec, config, dtype, tensors)
    head, about = _head(tensors, config, dtype)
    width = next(each.shape[-1] for each in head.parameters() if each.dim() == 2)
    if width != config.hidden_size:
        raise ModelLoadError(f"its head reads {width} numbers, and its decoder gives {config.hidden_size}.")
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
    kind = AutoModel._model_mapping[type(config)]
    wrapped = any(name.startswith(WRAPPER) for name in tensors.names)
    renamed: dict[str, Any] = {"key_mapping": {"^" + WRAPPER.replace(".", r"\."): ""}} if wrapped else {}
    reports = logging.getLogger("transformers.modeling_utils")
    level = reports.level
    reports.setLevel(logging.ERROR)  # of tensors that are not the decoder's: the head's
    try:
        model, info = kind.from_pretrained(
            spec.path,
            config=copy.deepcopy(config),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="eager",
            output_loading_info=True,
            **renamed,
        )
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ModelLoadError(f"the weights in {spec.path} cannot be loaded: {line}") from error
    finally:
        reports.setLevel(level)
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            some = ", ".join(sorted(str(key) for key in info[problem])[:4])
            raise ModelLoadError(f"{len(info[problem])} {problem.replace('_', ' ')} in its safetensors: {some}.")
    loaded: PreTrainedModel = model
    return loaded


def _head(tensors: _Tensors, config: Any, dtype: torch.dtype) -> tuple[nn.Module, Head]:
    if all(f"{name}.weight" in tensors.names for name in MLP_HEAD):
        first, second = (_linear(tensors, name, dtype) for name in MLP_HEAD)
        assert first is not None
        assert second is not None
        return nn.Sequential(first, nn.ReLU(), second), Head(second.out_features)
    for name in LINEAR_HEADS:
        head = _linear(tensors, name, dtype)
        if head is not None:
            labels = _labels(config, head.out_features)
            gate, transform = _gate(tensors, config), tensors.get("reward_transform_matrix", torch.float32)
            return head, Head(head.out_features, labels, gate, transform)
    raise ModelLoadError(
        f"a {_architecture(config)} without a head that is known: none of {', '.join(LINEAR_HEADS)} is in its "
        "safetensors."
    )


def _linear(tensors: _Tensors, name: str, dtype: torch.dtype) -> nn.Linear | None:
    weight, bias = tensors.get(f"{name}.weight", dtype), tensors.get(f"{name}.bias", dtype)
    if weight is None or weight.dim() != 2:
        return None
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
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
    layers: list[tuple[Tensor, Tensor | None]] = []
    while (weight := tensors.get(f"gating.layers.{len(layers)}.weight", torch.float32)) is not None:
        layers.append((weight, tensors.get(f"gating.layers.{len(layers)}.bias", torch.float32)))
    if not layers:
        return None
    scale = tensors.get("gating.logit_scale", torch.float32)
    return Gate(
        tuple(layers),
        float(getattr(config, "gating_temperature", 10.0)),
        1.0 if scale is None else float(scale.flatten()[0]),
    )
