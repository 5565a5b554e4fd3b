"""Where the arithmetic runs, and in which precision: shared by training and sampling."""

from __future__ import annotations

import torch

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")


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


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which convolutions and matrix products run in the `precision` that `pick_precision` gave."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def memory_format(device: torch.device) -> torch.memory_format:
    """The order of an image's numbers in memory that convolutions like best: channels last on a GPU.

    On a CPU bfloat16 convolutions take either, and the group normalisations are faster on planes.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def describe(device: torch.device) -> str:
    """The device in words, as "cuda (NVIDIA H200)" or "cpu (2 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
