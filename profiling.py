"""Where the time of a piece of work goes, and the least that it could take on this machine.

    rates = machine_rates(device, "bf16")
    for row in profile(step, device, rates):      # step() does the work, once a call
        print(row)

The floor of a kind of operation is the larger of two times: its arithmetic at the rate of a large matrix product, and
the bytes that its operations read and write at the rate of a large copy, both measured here. Data that are still in a
cache, or operations merged into one, can go below it.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

KINDS = {  # in this order: what comes first wins
    "optimizer and average": "adam|foreach",
    "convolutions": "conv",
    "matrix products and attention": r"mm|linear|attention|flash|gemm",
    "group normalisation": "norm",
    "compiled": "fused|triton|graph_",
    "silu": "silu",
    "resize, pool, concatenate": "upsample|pool|cat|slice_backward",
    "copies and conversions": "copy|_to_|clone|contiguous|fill|zero|empty",
}
OTHERS = "additions, products, sums"


@dataclass
class Rates:
    """What the machine can do: floating-point operations and bytes a second, as measured."""

    flops: float
    bytes: float


@dataclass
class Row:
    """A kind of operation: seconds a call, operations, bytes, and the least seconds that these would take."""

    kind: str
    seconds: float
    flops: float
    bytes: float
    floor: float


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def machine_rates(device: torch.device, precision: str) -> Rates:
    """The best of several large matrix products in this precision, and of several large copies."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[precision]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return Rates(2 * n**3 / _least_seconds(lambda: a @ b, device),
                 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), device))


def _least_seconds(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    best = float("inf")
    for _ in range(times):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def kind_of(operation: str) -> str:
    """The kind of an operation of PyTorch, by its name."""
    name = operation.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHERS)


class CountBytes(TorchDispatchMode):
    """Adds up, by kind, the bytes of the tensors that operations read and write; views of tensors move none."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            moved = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.bytes[kind_of(function.__name__)] += sum(x.nbytes for x in moved)
        return result


def profile(work: Callable[[], object], device: torch.device, rates: Rates, calls: int = 3) -> list[Row]:
    """The time of `work()`, which has been called before, by kind of operation; the most expensive kind first."""
    with FlopCounterMode(display=False) as flop_counter, CountBytes() as byte_counter:
        work()
    flops: Counter[str] = Counter()
    for operation, count in flop_counter.get_flop_counts().get("Global", {}).items():
        flops[kind_of(str(operation))] += count

    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            work()
        synchronize(device)
    seconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel of the GPU, whose time the operation that launched it has already
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent:
            seconds[kind_of(event.key)] += spent / 1e6 / calls
    rows = [Row(kind, seconds[kind], flops[kind], byte_counter.bytes[kind],
                max(flops[kind] / rates.flops, byte_counter.bytes[kind] / rates.bytes))
            for kind in seconds | byte_counter.bytes]
    return sorted(rows, key=lambda row: -row.seconds)


def as_table(rows: list[Row]) -> str:
    """The rows and their sum, in Markdown."""
    total = Row("all", *(sum(getattr(row, name) for row in rows) for name in ("seconds", "flops", "bytes", "floor")))
    lines = ["| | ms | share | GFLOP | GB | floor, ms |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [f"| {row.kind} | {1e3 * row.seconds:,.1f} | {row.seconds / total.seconds:.0%} | {row.flops / 1e9:,.0f} | "
              f"{row.bytes / 1e9:,.2f} | {1e3 * row.floor:,.1f} |" for row in [*rows, total]]
    return "\n".join(lines)
