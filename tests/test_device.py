"""Device, precision and memory format."""

from __future__ import annotations

import pytest
import torch

from utils.device import describe_device, memory_format, pick_device, pick_precision


@pytest.mark.parametrize("device, training, channels_last", [
    ("cuda", True, True), ("cpu", True, False), ("cpu", False, True), ("mps", False, False),
])
def test_memory_format(device, training, channels_last):
    expected = torch.channels_last if channels_last else torch.contiguous_format
    assert memory_format(torch.device(device), training) == expected


@pytest.mark.parametrize("name", ["nosuch", "meta", "cpu:99:1"])
def test_a_device_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match=f"no device '{name}' on this machine"):
        pick_device(name)


def test_the_cpu_is_picked_where_there_is_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == pick_device("cpu") == torch.device("cpu")
    assert describe_device(torch.device("cpu")).startswith("cpu (")


@pytest.mark.parametrize("name, current", [("auto", None), ("cuda", None), ("cuda:1", 1)])
def test_a_gpu_is_picked_and_becomes_current_if_it_has_a_number(monkeypatch, name, current):
    """As on a machine with GPUs: `set_device` refuses a device without a number."""
    made_current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda size, device: torch.zeros(size))
    monkeypatch.setattr(torch._C, "_cuda_setDevice", made_current.append, raising=False)
    assert pick_device(name) == torch.device("cuda" if name == "auto" else name)
    assert made_current == ([] if current is None else [current])


def test_precision_is_bfloat16_where_the_device_computes_in_it(monkeypatch):
    cpu = torch.device("cpu")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert pick_precision("auto", cpu) == "fp32"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert pick_precision("auto", cpu) == "bf16"
    assert pick_precision("auto", torch.device("mps")) == "fp32" and pick_precision("fp16", cpu) == "fp16"
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        pick_precision("fp8", cpu)
