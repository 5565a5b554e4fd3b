"""Where the arithmetic runs, in which precision, and how little stands in its way: shared by training and sampling."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
COMPILE = ("auto", "on", "off")


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`, such as "cpu" or "cuda:1"; "auto" is CUDA when there is one, else MPS, else the CPU.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # asks for a value, so that "meta", which has none, fails too
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"no device {name!r} on this machine; choose one of {', '.join(DEVICES)}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """"bf16", "fp16" or "fp32"; "auto" is bfloat16 where the device computes in it, else float32.

    It is the precision of convolutions and matrix products. Weights and optimizer stay in float32.
    """
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}: choose one of {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        # An emulated bfloat16 is slower than float32, so a processor without the instructions stays with the latter.
        # PyTorch tells of them in functions that may yet be renamed.
        asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return "bf16" if any(getattr(torch.cpu, ask, lambda: False)() for ask in asks) else "fp32"
    return "fp32"


def use_fast_kernels() -> None:
    """Let CUDA round the inputs of float32 products to TF32, and choose convolutions by trying them."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which convolutions and matrix products run in the `precision` that `pick_precision` gave."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    # No cache of weights that were already converted: each is used once a pass, and a recorded pass must convert anew.
    return torch.autocast(device.type, dtype, enabled=precision != "fp32", cache_enabled=False)


def memory_format(device: torch.device, training: bool = False) -> torch.memory_format:
    """The order of a network's and its images' numbers in memory that suits the device: mostly channels last.

    A CPU trains on planes: with channels last its convolutions gain 10 %, but the backward pass of the group
    normalisation takes six times as long. Forward passes alone are 10 % faster with channels last.
    """
    planes = device.type == "mps" or (device.type == "cpu" and training)
    return torch.contiguous_format if planes else torch.channels_last


def peak_memory() -> int:
    """The most memory that this process has had at a time, in bytes: what PyTorch took of the GPU where it uses CUDA,
    else all of its own; 0 where the system does not tell (Windows)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(device: torch.device) -> str:
    """The device in words, as "cuda (NVIDIA H200)" or "cpu (2 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


class Recorded:
    """A function of CUDA tensors that is recorded as a CUDA graph and then repeated by the GPU, without Python.

    A small network's pass is hundreds of kernels of some microseconds each, which Python cannot launch as fast as the
    GPU ends them. The function must be the same work each time: no wait for the GPU, no shape that depends on a value.
    Its first calls run as usual, for libraries choose and load kernels then. Inputs of other shapes than the recorded
    ones run as usual, and so does everything where recording fails, which is said in one line.
    """

    ORDINARY_CALLS = 4

    def __init__(self, function: Callable[..., torch.Tensor | None]):
        self.function, self.calls, self.graph, self.side = function, 0, None, torch.cuda.Stream()

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor | None:
        self.calls += 1
        if self.calls <= self.ORDINARY_CALLS:
            return self._on_a_side_stream(*inputs)
        if self.graph is None and self.calls == self.ORDINARY_CALLS + 1:
            self._record(*inputs)
        if self.graph is None or [x.shape for x in inputs] != [mine.shape for mine in self.inputs]:
            return self.function(*inputs)
        for mine, new in zip(self.inputs, inputs):
            mine.copy_(new)
        self.graph.replay()
        return None if self.output is None else self.output.clone()  # the next call writes to the same place

    def _on_a_side_stream(self, *inputs: torch.Tensor) -> torch.Tensor | None:
        """As recording will run: what autograd remembers of a stream must not be of the one in use outside."""
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            output = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.side)
        return output

    def _record(self, *inputs: torch.Tensor) -> None:
        graph = torch.cuda.CUDAGraph()
        self.inputs = [x.clone() for x in inputs]
        try:
            # Only this thread is watched for calls that a graph cannot hold: the one that pins memory may go on. The
            # outer context brings the stream back where an older PyTorch would not after a failure.
            with (torch.cuda.stream(torch.cuda.current_stream()),
                  torch.cuda.graph(graph, capture_error_mode="thread_local")):
                self.output = self.function(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            print(f"note: no CUDA graph of this ({first_line(error)}); it runs step by step")


def first_line(error: BaseException) -> str:
    """What went wrong, in one line without control characters, at most 200 characters of it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "".join(filter(str.isprintable, lines[0]))[:200] if lines else type(error).__name__
