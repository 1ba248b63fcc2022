"""What a configuration alone says against serving a model: each refusal is a sentence with the model's type.

The probe and the self-check find out the rest from the running model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from decoding.core import ModelLoadError

log = logging.getLogger(__name__)
# What a checkpoint's class says it does instead of predicting the next token, and the kind of entry that it is, if any.
OTHER_HEADS = {
    "ForSequenceClassification": ("has a head that scores whole texts", "reward"),
    "ForTokenClassification": ("has a head that labels tokens", "prm"),
    "ForProcessRewardModel": ("has a head that scores steps", "prm"),
    "ForPrmModel": ("has a head that scores steps", "prm"),
    "ForRewardModelWithGating": ("has a head that scores whole texts", "reward"),
    "RewardModel": ("has a head that scores whole texts", "reward"),
    "ForQuestionAnswering": ("has a head that marks spans", None),
    "ForMultipleChoice": ("has a head that scores whole texts", None),
    "ForMaskedLM": ("is an encoder that fills gaps", None),
    "Model": ("has no head at all (encoders and embedding models are of this kind)", None),
}
LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def causal_class(config: Any, scores: bool = False, wanted: str = "causal") -> type[PreTrainedModel]:
    """The causal LM class of `config`. Raises ModelLoadError when there is none, or none that can be served.

    scores: the checkpoint may have a head that scores texts. wanted: the kind that its entry says.
    """
    kind = str(config.model_type)
    if not scores:
        _check_head(config, wanted)
    known = AutoModelForCausalLM._model_mapping
    if getattr(config, "is_encoder_decoder", False):
        raise ModelLoadError(f"{kind} is an encoder-decoder; only decoder-only language models are served.")
    if type(config) not in known:
        hosted = "; only causal decoders are hosted" if scores else ""
        raise ModelLoadError(f"{kind} has no causal language model in transformers{hosted}.")
    if scores and type(config) in AutoModelForMaskedLM._model_mapping:
        raise ModelLoadError(f"{kind} is an encoder, whose tokens see what follows; only causal decoders are hosted.")
    found: type[PreTrainedModel] = known[type(config)]
    if getattr(found, "_is_stateful", False):
        raise ModelLoadError(f"{kind} keeps a recurrent state (state-space or linear attention), which is not served.")
    _check_layer_types(kind, config)
    if not found._can_set_attn_implementation():  # the flag _supports_attention_backend misses stablelm
        raise ModelLoadError(f"{kind} does not use transformers' attention interface, so its KV cannot be paged.")
    if config.get_text_config() is not config:
        raise ModelLoadError(f"{kind} is multimodal; only text models are served (look for its text-only checkpoint).")
    return found


def other_head(name: str) -> tuple[str, str | None]:
    """What a checkpoint's class does instead of predicting the next token, and its kind; "" if that is not known."""
    return next((told for ending, told in OTHER_HEADS.items() if name.endswith(ending)), ("", None))


def _check_head(config: Any, wanted: str) -> None:
    """The checkpoint is of a causal LM: transformers would make one of any, with a head of random or tied weights."""
    encoder = type(config) in AutoModelForMaskedLM._model_mapping
    for name in getattr(config, "architectures", None) or ():
        if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            return
        what, kind = other_head(name)
        if what:
            its = f"its kind is {kind}, not {wanted}" if kind and not encoder else "no kind of entry serves it"
            raise ModelLoadError(
                f"it is a {name}, which {what} and gives no next-token distribution: {its}. A causal language "
                "model is needed here; to steer every token by a reward, an autoregressive reward model is one."
            )


def _check_layer_types(kind: str, config: Any) -> None:
    types: Any = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    unknown = sorted(set(map(str, types)) - LAYER_TYPES)
    if unknown:
        raise ModelLoadError(f"{kind} has layers of type {', '.join(unknown)}, which are not served.")


def context_limit(config: Any, wanted: int | None) -> int | None:
    """The context length to serve, None for the model's own.

    Raises ModelLoadError for rotary embeddings whose frequencies depend on the longest sequence of the batch:
    packed requests would change each other. Longrope is exact below its original length, so it is cut to that.
    """
    limit = wanted
    for rope in _ropes(config):
        rope_type = str(rope.get("rope_type", "default"))
        if "dynamic" in rope_type:
            raise ModelLoadError(
                f"{config.model_type} with rope type '{rope_type}' computes its frequencies from the longest sequence "
                "of a batch, so requests would change each other; set another rope type in its config.json."
            )
        if rope_type == "longrope":
            original = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
            if wanted is not None and wanted > original:
                raise ModelLoadError(
                    f"{config.model_type} with longrope switches its frequencies after {original} positions, in the "
                    f"middle of a text; set max_model_len to at most {original}."
                )
            if wanted is None:
                log.warning("%s: longrope, so the context is limited to %d positions.", config.model_type, original)
            limit = original if limit is None else min(limit, original)
    return limit


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Every set of rotary parameters: one for the model, or one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, Mapping):
        return
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or [parameters]
