"""Weights and configuration as one safetensors file, which every command that takes a checkpoint reads.

    write_safetensors(Path("checkpoints/critters.pt"), Path("outputs/critters.safetensors"))
"""

from __future__ import annotations

from pathlib import Path

from utils.checkpoint import load_checkpoint, save_safetensors

# What drawing and evaluating need; what only a training needs to go on stays behind.
CONTENT = ("network", "ema", "autoencoder", "scheduler", "config", "types", "held_out", "step", "epoch")


def write_safetensors(checkpoint: Path, path: Path) -> None:
    """Write the model of a checkpoint, and check that the file reads back as the same, to the last bit.

    Raises:
        UserError: if the package safetensors is missing.
        OSError: if the file cannot be written, or reads back as something else.
    """
    content = load_checkpoint(checkpoint)
    save_safetensors(path, **{name: content[name] for name in CONTENT if name in content})
    print("the file reads back as the checkpoint, to the last bit")
