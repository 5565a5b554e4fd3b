"""Device, precision and memory layout, for training and sampling."""

from __future__ import annotations

import sys

import torch

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name` ("cpu", "cuda:1", ...); "auto" is CUDA if there is one, else MPS, else the CPU.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # reads a value, so that "meta", which has none, fails too
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"no device {name!r} on this machine; choose one of {', '.join(DEVICES)}") from error
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # for CUDA graphs, which belong to the current device
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """Return "bf16", "fp16" or "fp32"; "auto" is bfloat16 where the device computes in it, else float32.

    It applies to convolutions and matrix products. Weights and optimizer state stay in float32.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}: choose one of {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        # Emulated bfloat16 is slower than float32. The functions that report the instructions are not public yet.
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return "bf16" if any(getattr(torch.cpu, check, lambda: False)() for check in checks) else "fp32"
    return "fp32"


def use_fast_kernels() -> None:
    """Allow TF32, 11 bits, in float32 products on CUDA, and let cuDNN choose convolutions by trying them."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which convolutions and matrix products run in `precision` (see `pick_precision`)."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    # No cache of converted weights: each is used once a pass, and a recorded pass must convert them anew.
    return torch.autocast(device.type, dtype, enabled=precision != "fp32", cache_enabled=False)


def memory_format(device: torch.device, training: bool = False) -> torch.memory_format:
    """Return the faster memory format for a network and its images: mostly channels last.

    Training on a CPU is the exception: channels last makes its convolutions 10 % faster, but the backward pass of group
    normalisation six times slower. Forward passes alone gain the 10 %.
    """
    contiguous = device.type == "mps" or (device.type == "cpu" and training)
    return torch.contiguous_format if contiguous else torch.channels_last


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: of the GPU if CUDA is in use, else of the process.

    0 where the system does not report it (Windows).
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe_device(device: torch.device) -> str:
    """Name the device, as "cuda (NVIDIA H200)" or "cpu (2 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
