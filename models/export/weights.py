"""Weights and configuration as one file that every command that takes a checkpoint reads.

    write_safetensors(Path("checkpoints/critters.pt"), Path("outputs/critters.safetensors"))
    write_half(Path("checkpoints/mine/final_model.pt"), Path("outputs/mine.pt"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.checkpoint import load_checkpoint, save_checkpoint, save_safetensors

# What drawing and evaluating need; what only a training needs to go on stays behind.
CONTENT = ("network", "ema", "earlier", "autoencoder", "scheduler", "config", "types", "held_out", "step", "epoch")


def write_safetensors(checkpoint: Path, path: Path, earlier: nn.Module | None = None) -> None:
    """Write the model of a checkpoint, and check that the file reads back as what was written, to the last bit.

    Args:
        earlier: takes the place of the checkpoint's earlier network.

    Raises:
        UserError: if the package safetensors is missing.
        OSError: if the file cannot be written, or reads back as something else.
    """
    save_safetensors(path, **_content(checkpoint, earlier))
    print("the file reads back as what was written, to the last bit")


def write_half(checkpoint: Path, path: Path, earlier: nn.Module | None = None) -> None:
    """Write a checkpoint whose weights are float16; they become float32 again when it is loaded.

    Args:
        earlier: takes the place of the checkpoint's earlier network.

    Raises:
        OSError: if the file cannot be written.
    """
    save_checkpoint(path, **_halved(_content(checkpoint, earlier)))


def _content(checkpoint: Path, earlier: nn.Module | None) -> dict[str, Any]:
    content = load_checkpoint(checkpoint)
    if earlier is not None:
        content["earlier"] = earlier.state_dict()
    return {name: content[name] for name in CONTENT if name in content}


def _halved(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _halved(part) for key, part in value.items()}
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    if value.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError("a weight is too large for float16; give --to safetensors")
    return value.half()
