"""Every GPU kernel against its reference, against torch.compile of that, and against what memory allows.

    python -m benchmarks.kernels                    all kernels on the GPU, minutes; writes results/kernels.json
    python -m benchmarks.kernels --kernel mix       one of them (may be given again)
    python -m benchmarks.kernels --quick            tiny shapes anywhere, once, to see that it works

Times are CUDA events around one call, medians of 30, the three sides taking turns; before each call the L2 cache is
flushed by reading, for lines that wait to be written back would be charged to the call. A call is a replay of its CUDA
graph, as in the engine, where it can be captured: references that look at the data cannot, and their launches then
count ("launched"). The bound is the kernel's bytes (see `benchmarks.cases`) over the bandwidth of copying 1 GiB on this
device, measured first; nothing is faster than the floor, an empty kernel timed in the same way.

With `--quick` on a CPU the references run; with TRITON_INTERPRET=1 the kernels do as well, and are compared with them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cases import FULL, QUICK, Case, Tensor
from benchmarks.cases_layers import LAYERS
from benchmarks.cases_rows import ROWS

KERNELS = LAYERS | ROWS
REPETITIONS = 30
WARM_UP = 3
COPIED = 1 << 30
Call = Callable[[], Any]


def available(kernel: str) -> bool:
    """Whether `triton_kernels` has what the name says: files, joined by plus signs."""
    return all(importlib.util.find_spec(f"triton_kernels.{part}") is not None for part in kernel.split(" + "))


def bound_us(moved: int, bandwidth: float) -> float:
    """Microseconds for so many bytes at `bandwidth` bytes a second."""
    return 1e6 * moved / bandwidth


def bandwidth_of(copied: int, seconds: float) -> float:
    """Bytes a second of a copy of `copied` bytes, each of which is read and written."""
    return 2 * copied / seconds


class Timer:
    """Times calls on a CUDA device, with an L2 cache that holds nothing of theirs."""

    def __init__(self, device: torch.device) -> None:
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20)
        self._other = torch.ones(max(256 << 20, 4 * size) // 4, device=device)
        self._sum = torch.empty((), device=device)

    def flush(self) -> None:
        """Fill the cache with clean lines; the host queues the call meanwhile."""
        torch.sum(self._other, dim=0, out=self._sum)

    def medians(self, sides: dict[str, Call]) -> dict[str, float]:
        """Microseconds of each side, which take turns."""
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in sides}
        for _ in range(REPETITIONS):
            for name, call in sides.items():
                began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self.flush()
                began.record()
                call()
                ended.record()
                events[name].append((began, ended))
            torch.cuda.synchronize()
        return {
            name: 1e3 * statistics.median(began.elapsed_time(ended) for began, ended in pairs)
            for name, pairs in events.items()
        }

    def bandwidth(self) -> float:
        """Bytes a second that a copy of 1 GiB reads and writes."""
        source = torch.ones(COPIED // 4, device=self._other.device)
        target = torch.empty_like(source)
        call = captured(lambda: target.copy_(source))[0]
        return bandwidth_of(COPIED, 1e-6 * self.medians({"copy": call})["copy"])

    def floor(self) -> float:
        """Microseconds of a kernel that does nothing to speak of."""
        one = torch.zeros(1, device=self._other.device)
        return self.medians({"floor": captured(lambda: one.zero_())[0]})["floor"]


def captured(call: Call) -> tuple[Call, bool]:
    """(a replay of `call` as a CUDA graph, True), or (`call`, False) where it cannot be captured; warmed up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = call()  # outputs must live as long as the graph
    except Exception:
        torch.cuda.synchronize()
        return call, False
    return lambda: (graph.replay(), kept), True


def tensors(found: Any) -> Iterator[Tensor]:
    """Every tensor of a nest of tuples and lists, in order."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, tuple | list):
        for each in found:
            yield from tensors(each)


def difference(found: Any, wanted: Any) -> float:
    """The largest relative L2 difference of the outputs; tokens and counts by the share that differs."""
    worst = 0.0
    for got, want in zip(tensors(found), tensors(wanted), strict=True):
        if not want.is_floating_point():
            worst = max(worst, float((got != want).float().mean()))
            continue
        finite = got.isfinite() & want.isfinite()
        if not bool((finite | (got == want)).all()):  # infinities must be the same ones; NaN never is
            return float("inf")
        got, want = torch.where(finite, got.double(), 0.0), torch.where(finite, want.double(), 0.0)
        worst = max(worst, float((got - want).norm() / want.norm().clamp_min(1e-12)))
    return worst


def inputs(case: Case, device: torch.device) -> tuple[Any, ...]:
    """The case's inputs, the same every time."""
    torch.manual_seed(0)
    return case.make(device)


def compiled(case: Case, given: tuple[Any, ...]) -> Call | None:
    """The reference under torch.compile, None where that fails."""
    torch._dynamo.reset()
    call = torch.compile(case.reference, dynamic=False)
    try:
        call(*given)
    except Exception:
        return None
    return lambda: call(*given)


def measure(case: Case, timer: Timer, bandwidth: float, device: torch.device) -> dict[str, Any]:
    """Times of one case, in microseconds, and how far its result is from the reference's."""
    gap = difference(case.call(*inputs(case, device)), case.reference(*inputs(case, device)))
    sides: dict[str, Call] = {}
    launched: list[str] = []
    given = {name: inputs(case, device) for name in ("kernel", "reference", "compiled")}
    calls: dict[str, Call | None] = {
        "kernel": lambda: case.call(*given["kernel"]),
        "reference": lambda: case.reference(*given["reference"]),
        "compiled": compiled(case, given["compiled"]),
    }
    for name, call in calls.items():
        if call is not None:
            sides[name], whole = captured(call)
            if not whole:
                launched.append(name)
    times = timer.medians(sides)
    bound = None if case.bytes is None else bound_us(case.bytes, bandwidth)
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "bytes": case.bytes,
        "bound_us": bound,
        "us": times,
        "launched": launched,
        "over_bound": None if bound is None else times["kernel"] / bound,
        "over_reference": times["reference"] / times["kernel"],
        "over_compiled": times["compiled"] / times["kernel"] if "compiled" in times else None,
        "difference": gap,
    }


def try_out(case: Case) -> dict[str, Any]:
    """The case once on this CPU: the reference, and the kernel in the interpreter if it is asked for."""
    device = torch.device("cpu")
    wanted = case.reference(*inputs(case, device))
    row: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape, "bytes": case.bytes, "difference": None}
    if os.environ.get("TRITON_INTERPRET") == "1":
        row["difference"] = difference(case.call(*inputs(case, device)), wanted)
    return row


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """One table."""

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    table = Table("kernel", "shape", "us", "bound, us", "over bound", "over reference", "over compiled", "difference")
    for row in rows:
        ratios = [
            cell(row[name], 2) + ("*" if name.removeprefix("over_") in row["launched"] else "")
            for name in ("over_reference", "over_compiled")
        ]
        figures = [cell(row["us"]["kernel"], 1), cell(row["bound_us"], 1), cell(row["over_bound"], 2)]
        table.add_row(row["kernel"], row["shape"], *figures, *ratios, f"{row['difference']:.1e}")
    console.print(table, "Over the reference and over its compiled form: speed-ups; * launched, not replayed.")


def main() -> None:
    """Measure, print a table, write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=list(KERNELS), action="append", help="only this one (may be given again)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, once, on the CPU: no times, no file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    args = parser.parse_args()
    console = Console()
    named = args.kernel or list(KERNELS)
    missing = [name for name in named if not available(name)]
    if missing:
        console.print(f"Not in this tree: {', '.join(missing)}.")
    cases = [case for name in named if name not in missing for case in KERNELS[name](QUICK if args.quick else FULL)]
    if args.quick:
        title = "tried on the CPU in fp32, nothing measured"
        table = Table("kernel", "shape", "bytes in bf16", "kernel against reference", title=title)
        for case in track(cases, description="cases", transient=True):
            row = try_out(case)
            gap = "reference only" if row["difference"] is None else f"{row['difference']:.1e}"
            table.add_row(row["kernel"], row["shape"], str(row["bytes"] or "-"), gap)
        console.print(table)
        return
    if not torch.cuda.is_available():
        parser.error("Times need a CUDA device; --quick tries the cases on this CPU.")
    device = torch.device("cuda")
    timer = Timer(device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "copy_bytes_per_second": timer.bandwidth(),
        "floor_us": timer.floor(),
        "missing": missing,
        "cases": [],
        "failed": [],
    }
    for case in track(cases, description="cases", transient=True):
        try:
            result["cases"].append(measure(case, timer, result["copy_bytes_per_second"], device))
        except Exception as error:  # the others are still worth having
            result["failed"].append({"kernel": case.kernel, "shape": case.shape, "error": str(error)[:500]})
    show(console, result["cases"])
    console.print(f"Copies: {result['copy_bytes_per_second'] / 1e12:.2f} TB/s; floor: {result['floor_us']:.1f} us.")
    for failure in result["failed"]:
        console.print(f"{failure['kernel']}, {failure['shape']}: {failure['error']}", style="red", markup=False)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
