"""Dataclasses of `decoding` as strict pydantic models, which check requests and describe themselves."""

from __future__ import annotations

import typing
from dataclasses import MISSING, fields
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model


def params_model(name: str, params: type[Any]) -> type[BaseModel]:
    """A strict pydantic model with the fields of the dataclass `params`."""
    hints = typing.get_type_hints(params)
    definitions: dict[str, Any] = {}
    for each in fields(params):
        described: dict[str, Any] = {"description": each.metadata.get("description")}
        if each.default_factory is not MISSING:
            described["default_factory"] = each.default_factory
        elif each.default is not MISSING:
            described["default"] = each.default
        definitions[each.name] = (hints[each.name], Field(**described))
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    return create_model(name, __config__=config, **definitions)
