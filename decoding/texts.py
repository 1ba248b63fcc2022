"""The text sides of all models of a configuration: an adapter has its model's, unless its directory says otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from decoding.core import ModelLoadError, ModelSpec
from decoding.text import TextModel

PARTS = ("adapter", "judge")  # kinds that belong to another model
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def load_texts(specs: Iterable[ModelSpec]) -> dict[str, TextModel]:
    """Tokenizers and templates by model id, in the order of `specs`; judge heads have none. Raises ModelLoadError."""
    specs = tuple(spec for spec in specs if spec.kind != "judge")
    bases = base_specs(specs)
    texts = {spec.id: TextModel.load(spec) for spec in bases.values()}
    for spec in specs:
        if spec.kind == "adapter":
            base = bases[spec.of or ""]
            texts[spec.id] = adapter_text(spec, base, texts[base.id])
    return {spec.id: texts[spec.id] for spec in specs}


def adapter_text(spec: ModelSpec, base: ModelSpec, text: TextModel) -> TextModel:
    """The base's `text` itself, or a text side of its own for an adapter with tokenizer files or templates."""
    return own_text(spec, base) or text


def own_text(spec: ModelSpec, base: ModelSpec) -> TextModel | None:
    """The text side of an adapter with tokenizer files or templates, None for others. Raises ModelLoadError."""
    own = any((Path(spec.path) / name).is_file() for name in _TOKENIZER)
    if not own and spec.plain_template is None and spec.view is None:
        return None
    merged = replace(
        base,
        id=spec.id,
        plain_template=spec.plain_template or base.plain_template,
        view=spec.view or base.view,
    )
    return TextModel.load(merged, spec.path if own else None)


def base_specs(specs: Iterable[ModelSpec]) -> Mapping[str, ModelSpec]:
    """What has weights of its own to run, by id. Raises ModelLoadError for a wrong `of`."""
    specs = tuple(specs)
    bases = {spec.id: spec for spec in specs if spec.kind not in PARTS}
    for spec in specs:
        if spec.kind in PARTS and spec.of not in bases:
            whose = (
                f"is of '{spec.of}', which is no model that is served" if spec.of else "names no model that it is of"
            )
            raise ModelLoadError(f"The {spec.kind} '{spec.id}' {whose}.")
        if spec.kind not in PARTS and spec.of is not None:
            raise ModelLoadError(
                f"Model '{spec.id}' of kind {spec.kind} has weights of its own: only kinds {' and '.join(PARTS)} are "
                f"of another model, so leave out 'of' ('{spec.of}')."
            )
    return bases
