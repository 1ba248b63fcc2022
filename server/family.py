"""The embedded family as a configuration: what is served when no model is named.

The weights lie in the folder of the same name, with a manifest that lists the members. The default is a preset, so
that the first answer a newcomer gets is a large untuned model's, steered by two small ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FAMILY = Path(__file__).parent / "family" / "manifest.json"
DEFAULT = "base@chat"
PRESETS = {
    DEFAULT: {
        "model": "base",
        "decoding": {"strategy": "proxy_tuning", "expert": "expert", "anti": "base-small", "alpha": 0.7},
    }
}


def embedded_family(manifest: Path = FAMILY) -> dict[str, Any]:
    """Models, presets and defaults from a manifest. Raises OSError, ValueError and KeyError for one that is not there.

    `members`: name to entry, with `path` (default: the name) and `plain_template` (default: the manifest's own);
    `judges`: name to entry, with `target` and `path`.
    """
    described = json.loads(manifest.read_text(encoding="utf-8"))
    shared = described.get("plain_template")
    models = {
        name: {
            "path": str(manifest.parent / member.get("path", name)),
            "plain_template": member.get("plain_template", shared),
        }
        for name, member in described["members"].items()
    }
    for name, judge in described.get("judges", {}).items():
        models[name] = {"path": str(manifest.parent / judge.get("path", name)), "kind": "judge", "of": judge["target"]}
    return {"models": models, "presets": dict(PRESETS), "defaults": {"model": DEFAULT}}
