"""Saving and loading, safely: a checkpoint is one file that is whole or not there, and is data, never code.

    save_checkpoint("checkpoints/latest.pt", model=model.state_dict(), config=...)
    model, scheduler, config = load_model("checkpoints/critters.pt", device)
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from forward_diffusion import NoiseScheduler
from unet import UNet, UNetConfig

FORMAT = "PokeDiff checkpoint 1"


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged or not one of ours; the message is one line: what, where, what to do."""


def save_checkpoint(path: str | Path, **content: Any) -> None:
    """Write tensors and plain values to `path`; a kill or a full disk at any moment leaves the old file or the new one.

    Raises:
        OSError: if the file cannot be written; whatever stood at `path` is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # beside the target: only within one file system is a rename atomic
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk before the name points at them
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch's own writer reports a full disk as the latter
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OSError(f"could not write {path} ({reason}); what stood there before is untouched") from error
        raise
    if os.name == "posix":  # so that the rename survives a power cut, the folder is synced too
        with contextlib.suppress(OSError):  # some network file systems cannot; the file itself is safe by now
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, its tensors on the CPU. No code in the file is ever run.

    Raises:
        CheckpointError: if it is missing, truncated or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; `python train.py --preset quick` trains one in minutes")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        raise CheckpointError(f"{path} is truncated or not a PokeDiff checkpoint; choose another file") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not made by this PokeDiff (expected '{FORMAT}'); choose another file")
    return content


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[UNet, NoiseScheduler, dict[str, Any]]:
    """From a checkpoint: the network with its averaged weights, ready to sample; its scheduler; its configuration.

    The configuration has the training's flags, among them "prediction" and "image_size", and "types": the names of
    the types that the network can be asked for, in the order of its inputs; none for an unconditional one.
    """
    content = load_checkpoint(path)
    try:
        model = UNet(UNetConfig(**content["unet"]))
        model.load_state_dict(content["ema"])
        scheduler = NoiseScheduler(**content["scheduler"])
        config = content["config"]
        config["prediction"], config["image_size"]
        config["types"] = tuple(content.get("types", ()))
        if len(config["types"]) != model.config.num_types:
            raise ValueError("types without names")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} is incomplete or of another version of PokeDiff; choose another file") from error
    return model.to(device).eval(), scheduler, config


def newest_checkpoint(folder: str | Path = "checkpoints") -> Path:
    """The checkpoint that was written last, at any depth below `folder`."""
    found = [path for path in Path(folder).rglob("*.pt") if path.is_file() and not path.name.startswith(".")]
    if not found:
        raise CheckpointError(f"no checkpoint in {folder}/; `python train.py --preset quick` trains one in minutes")
    return max(found, key=lambda path: path.stat().st_mtime)
