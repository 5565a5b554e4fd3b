"""Checkpoint files: written atomically, loaded without running code. models/pipeline.py gives them meaning.

    save_checkpoint("checkpoints/latest.pt", ema=net.state_dict(), config=...)
    content = load_checkpoint("checkpoints/latest.pt")
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.errors import UserError
from utils.files import replacing

FORMAT = "PokeDiff checkpoint 1"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or not one of ours."""


def save_checkpoint(path: str | Path, **content: Any) -> None:
    """Write tensors and plain values to `path`; a kill or a full disk leaves the old file or the new one.

    Raises:
        OSError: if the file cannot be written; whatever stood at `path` is still there.
    """
    try:
        with replacing(path, sync=True) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as the latter
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"could not write {path} ({reason}); what stood there before is untouched") from error


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint, its tensors on the CPU. Code in the file is never run.

    Args:
        mmap: leave the tensors in the file until they are used.

    Raises:
        CheckpointError: if it is missing, truncated or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; `python train.py --preset quick` trains one in minutes")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save does not compress: a file that swells is a trap
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise ValueError("compressed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that are refused below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        raise CheckpointError(f"{path} is truncated or not a PokeDiff checkpoint; choose another file") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not made by this PokeDiff (expected '{FORMAT}'); choose another file")
    return _upgrade(content)


def _upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Bring the content of an older checkpoint up to date; here, and nowhere else, old keys are known."""
    if "unet" in content:
        content["network"] = dict(kind="unet", config=content.pop("unet"))
    if isinstance(content.get("tally"), torch.Tensor) and content["tally"].shape == (4,):
        names = ("loss_sum", "skipped", "skipped_in_a_row", "last_loss")
        content["stats"] = dict(zip(names, content.pop("tally").tolist()))
    for settings in (content.get("config"), content.get("next_config")):
        if not isinstance(settings, dict):
            continue
        if "seed" in settings:
            settings.setdefault("data_seed", settings["seed"])  # critters were drawn from the training's own seed
        if settings.get("compile") == "auto":
            settings["compile"] = "off"
        if "data" in settings and "splits" not in settings:  # neither splits nor Hugging Face's metadata were read
            settings["splits"] = "none"
            if settings.get("labels") == "auto":
                settings["labels"] = "csv_or_folders"  # training.labels.BEFORE_METADATA
    return content


def build_module(build: Callable[[], nn.Module], weights: dict[str, torch.Tensor], kind: str) -> nn.Module:
    """Build a module on the CPU and load its weights.

    Args:
        kind: of module, for the message.

    Raises:
        ValueError: for weights of other names or shapes.
    """
    with torch.device("meta"):  # shapes without memory: an invented width must not fill the machine's
        shapes = {name: part.shape for name, part in build().state_dict().items()}
    if shapes != {name: part.shape for name, part in weights.items()}:
        raise ValueError(f"weights of another {kind}")
    module = build()
    module.load_state_dict(weights)
    return module


def check_finite(path: str | Path, *modules: nn.Module) -> None:
    """Raise CheckpointError for weights that are not finite, which would make every image black."""
    for module in modules:
        if not all(torch.isfinite(p).all() for p in module.parameters()):
            raise CheckpointError(f"{path} has weights that are not finite numbers: its training had gone wrong; "
                                  f"choose an earlier checkpoint")
