"""Tensors in main memory that say they are elsewhere, and fail where CUDA's would; what would wait is written down.

Elsewhere is "meta": a torch without CUDA lets no tensor say "cuda".
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from decoding.hosting import Rows, SpanInput
from tests.fakes import TableModel

CUDA = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
WAITS = {
    aten.is_nonzero.default,
    aten.item.default,
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
SAME_DEVICE = ("gather", "scatter", "index_select", "index_copy", "index_add", "mm", "bmm", "searchsorted", "cat")


class OnCuda(torch.Tensor):
    """`host` holds the numbers."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> OnCuda:
        assert not isinstance(host, OnCuda)
        made: OnCuda = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, device=CUDA
        )
        made.host = host
        return made

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_indices(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_indices(key), value)

    def tolist(self) -> Any:
        """By a copy on the host, which waits."""
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnCuda({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside PretendCuda")


class PretendCuda(TorchDispatchMode):
    """`waits`: operations that would have the host wait for the device, in order, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __enter__(self) -> PretendCuda:
        self._made = torch.tensor
        torch.tensor = self._tensor
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.tensor = self._made

    def _tensor(self, data: Any, device: torch.device | None = None, **options: Any) -> torch.Tensor:
        """As CUDA's does, by a tensor of the host; one of "meta" would have no numbers."""
        made = self._made(data, **options)
        return made if device is None else made.to(device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten._pin_memory.default:
            pinned = args[0].clone()
            pinned.is_pinned_copy = True
            return pinned
        if func is aten.is_pinned.default:
            return hasattr(args[0], "is_pinned_copy")
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        ours = [x for x in given if isinstance(x, OnCuda)]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target)
        to_cuda = target is not None and target.type == CUDA.type
        assert all(isinstance(x, OnCuda) or x.device.type == "cpu" for x in given), "a tensor without numbers"
        if ours or to_cuda:
            self._look(func, args, kwargs, given, ours, target)
        if to_cuda:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        inner = {id(x.host): x for x in ours}
        found = func(*tree_map(_host, args), **tree_map(_host, kwargs))
        down = target is not None and target.type == "cpu"
        own = isinstance(args[0], OnCuda) if func is aten.copy_.default else bool(ours)
        if not (to_cuda or (own and not down)):
            return found
        if func is aten._to_copy.default and isinstance(found, torch.Tensor) and id(found) in inner:
            found = found.clone()
        return tree_map(lambda x: _labelled(x, inner), found)

    def _look(self, func: Any, args: Any, kwargs: Any, given: Any, ours: Any, target: Any) -> None:
        name = str(func)
        plain = [x for x in given if not isinstance(x, OnCuda)]
        if func in COPIES:
            crosses = bool(plain) if target is None else bool(plain) != (target.type == "cpu")
            if func is aten.copy_.default:
                crosses = bool(plain)
            pinned = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
            if crosses and not (pinned and plain and all(hasattr(x, "is_pinned_copy") for x in plain)):
                self.waits.append(f"{'up' if plain else 'down'} {tuple(given[-1].shape)}")
            return
        if func in WAITS:
            self.waits.append(name)
        if func in INDEXING:
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self.waits.append(name + " by mask")
            elif any(not isinstance(x, OnCuda) for x in indices):
                self.waits.append(name + " by host index")
            if not isinstance(args[0], OnCuda):
                raise RuntimeError(f"{name}: a tensor of the host is indexed by one of CUDA")
            plain = [x for x in args[2:] if isinstance(x, torch.Tensor) and not isinstance(x, OnCuda)]
            if plain:
                self.waits.append(name + " of a number")
        strict = any(part in name for part in SAME_DEVICE)
        if ours and any(x.dim() or strict for x in plain):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda and cpu")


def _indices(key: Any) -> Any:
    """Lists as CUDA takes them, copied up: of "meta" they would lose their numbers."""
    if isinstance(key, tuple):
        return tuple(_indices(each) for each in key)
    return torch.tensor(key, dtype=None if key else torch.int64, device=CUDA) if isinstance(key, list) else key


def _labelled(x: Any, inner: dict[int, OnCuda]) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return inner[id(x)] if id(x) in inner else OnCuda(x)


def _host(x: Any) -> Any:
    return x.host if isinstance(x, OnCuda) else x


class CudaTable:
    """A `TableModel` whose rows are elsewhere."""

    def __init__(self, table: TableModel) -> None:
        self._table = table
        self.device = torch.device("cpu")  # until the engine stands: there is no generator for CUDA

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def forward(self, spans: list[SpanInput], want_hidden: bool = False) -> Rows:
        rows = self._table.forward(spans, want_hidden)
        return Rows(OnCuda(rows.logits), None if rows.hidden is None else OnCuda(rows.hidden))


def on_cuda(models: dict[str, TableModel]) -> dict[str, Any]:
    """The same models with their rows elsewhere."""
    return {id: CudaTable(model) for id, model in models.items()}


def pretend(engine: Any) -> Any:
    """Have the engine decide on CUDA. Its generator stays the host's, which the mode puts up with."""
    engine._device = engine._decider._device = CUDA
    return engine
