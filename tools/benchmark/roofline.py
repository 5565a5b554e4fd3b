"""Roofline: where the time of some work goes, and the least that it could take on this machine.

    rates = machine_rates(device, "bf16")
    for row in profile(step, device, rates):      # each call of step() does the work once
        print(row)

The floor of a kind of operation is the larger of two times: its arithmetic at the rate of a large matrix product, and
the bytes that it reads and writes at the rate of a large copy, both measured here. Data still in a cache, and fused
operations, can go below it.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

KINDS = {  # pattern in the name of an operation; the first that matches decides
    "optimizer and EMA": "adam|foreach",
    "convolutions": "conv",
    "matrix products and attention": r"mm|linear|attention|flash|gemm",
    "group normalisation": "norm",
    "compiled": "fused|triton|graph_",
    "SiLU": "silu",
    "resize, pool, concatenate": "upsample|pool|cat|slice_backward",
    "copies and conversions": "copy|_to_|clone|contiguous|fill|zero|empty",
}
OTHER = "additions, products, sums"
DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)


@dataclass
class Rates:
    """What the machine achieves: floating-point operations per second, and bytes per second."""

    flops: float
    bytes: float


@dataclass
class Row:
    """A kind of operation: seconds per call of the work, operations, bytes, and the least seconds for these."""

    kind: str
    seconds: float
    flops: float
    bytes: float
    floor: float


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what it was given."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def machine_rates(device: torch.device, precision: str) -> Rates:
    """Measure the best of several large matrix products in this precision, and of several large copies."""
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 2048
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[precision]) for _ in range(2))
    source = torch.ones(2**28 if on_gpu else 2**26, device=device)
    target = torch.empty_like(source)
    return Rates(flops=2 * n**3 / _least_seconds(lambda: a @ b, device),
                 bytes=2 * source.nbytes / _least_seconds(lambda: target.copy_(source), device))


def _least_seconds(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    least = float("inf")
    for _ in range(times):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        least = min(least, time.perf_counter() - started)
    return least


def kind_of(operation: str) -> str:
    """Return the kind of an operation of PyTorch from its name."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, operation.lower()):
            return kind
    return OTHER


class CountBytes(TorchDispatchMode):
    """Add up, by kind, the bytes of the tensors that operations read and write; views move none."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.bytes[kind_of(function.__name__)] += sum(x.nbytes for x in tensors)
        return result


def profile(work: Callable[[], object], device: torch.device, rates: Rates, calls: int = 3) -> list[Row]:
    """Return the time of `work()`, which has warmed up already, by kind of operation, the most expensive first."""
    # Count operations and bytes.
    with FlopCounterMode(display=False) as flop_counter, CountBytes() as byte_counter:
        work()
    flops: Counter[str] = Counter()
    for operation, count in flop_counter.get_flop_counts().get("Global", {}).items():
        flops[kind_of(str(operation))] += count

    # Time.
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            work()
        synchronize(device)
    seconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel of the GPU, whose time counts for the operation that launched it
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds:
            seconds[kind_of(event.key)] += microseconds / 1e6 / calls

    rows = [Row(kind, seconds[kind], flops[kind], byte_counter.bytes[kind],
                floor=max(flops[kind] / rates.flops, byte_counter.bytes[kind] / rates.bytes))
            for kind in seconds | byte_counter.bytes]
    return sorted(rows, key=lambda row: -row.seconds)
