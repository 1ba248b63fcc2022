"""Adapters that come and go while the server runs: what may be loaded, from where, and when one may go.

Nothing here is open by default. The operator names a folder and a key; only directories under that folder are read, and
what they hold may not lead out of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from decoding.core import AdapterInUse, BadRequest, ModelSpec, UnknownModel
from decoding.prepare import Entry
from decoding.texts import own_text
from server.catalog import Served
from server.config import RESERVED
from server.errors import ApiError

if TYPE_CHECKING:
    from server.state import Services


class Admin:
    """Loads and unloads adapters, one at a time. `bases`: the models of the configuration that are no adapters."""

    def __init__(self, root: str, bases: Mapping[str, ModelSpec]) -> None:
        self.root = Path(root).expanduser().resolve()
        # The operator's trust in the code of a base is none in that of what comes to lie in the folder.
        self._bases = {id: replace(base, trust_remote_code=False) for id, base in bases.items()}
        self._lock = asyncio.Lock()

    async def load(self, services: Services, id: str, path: str, of: str) -> None:
        """Serve the directory `path` as the adapter `id` of the model `of` from now on.

        An adapter of that id and model which no request uses is replaced. Raises ApiError, BadRequest, ModelLoadError,
        AdapterInUse; then nothing has changed.
        """
        async with self._lock:
            _check_id(services.served, id, of)
            if of not in self._bases:
                raise UnknownModel(of, tuple(self._bases), param="of")
            folder = await asyncio.to_thread(self._folder, path)
            spec = ModelSpec(id, str(folder), kind="adapter", of=of)
            text = await asyncio.to_thread(own_text, spec, self._bases[of])
            await services.bridge.load_adapter(spec, self._bases[of])
            info = next(info for info in services.bridge.models if info.id == id)
            catalog = services.served.catalog
            services.served = services.served.with_catalog({**catalog, id: Entry(text or catalog[of].text, info)})

    async def unload(self, services: Services, id: str) -> None:
        """Stop serving the adapter `id`. Raises UnknownModel, and AdapterInUse while something uses it."""
        async with self._lock:
            catalog = services.served.catalog
            adapters = [name for name, entry in catalog.items() if entry.info.of is not None]
            if id not in adapters:
                raise UnknownModel(id, adapters)
            for user in services.served.users(id):
                raise AdapterInUse(f"The adapter '{id}' is in use: it is {user} of the server's configuration.")
            await services.bridge.unload_adapter(id)
            services.served = services.served.with_catalog({k: v for k, v in catalog.items() if k != id})

    def _folder(self, path: str) -> Path:
        """The directory that is meant, absolute or relative to the root. Raises BadRequest if it leads elsewhere."""
        try:
            folder = (self.root / path).resolve()
            inside = folder.is_relative_to(self.root)
            # What is outside is not looked at: the answer would tell what exists there.
            files = list(folder.rglob("*")) if inside and folder.is_dir() else []
            # Links to directories are not followed, by anyone who reads the files: there is nothing behind them.
            inside = inside and all(
                file.resolve().is_relative_to(self.root) and not (file.is_symlink() and file.is_dir()) for file in files
            )
        except (OSError, ValueError, RuntimeError) as error:  # a name too long, a null byte, a loop of links
            raise BadRequest("path is no path of a directory.", "path") from error
        if not inside:
            raise BadRequest(
                "path must lie under the server's --admin-root, with all that its links lead to, and hold no links to "
                "directories.",
                "path",
            )
        return folder


def _check_id(served: Served, id: str, of: str) -> None:
    if not id or not id.isprintable() or id != id.strip() or len(id) > 256:
        raise BadRequest("id must be a name of 1 to 256 printable characters.", "id")
    held = served.catalog.get(id)
    if id in RESERVED or id in served.presets or (held is not None and held.info.of != of):
        raise ApiError(409, f"The id '{id}' is taken.", "id", "id_taken")
