"""Checkpoint files: written atomically, loaded without running code. models/pipeline.py gives them meaning.

    save_checkpoint("checkpoints/latest.pt", ema=net.state_dict(), config=...)
    content = load_checkpoint("checkpoints/latest.pt")

A file that ends in .safetensors holds the same content: its tensors by dotted names, such as `ema.conv_in.weight`, and
the plain values as JSON in its metadata, at "pokediff".
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.errors import UserError
from utils.files import WriteError, naming, replacing
from utils.packages import optional_package

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
        raise WriteError(f"could not write {path} ({reason}); what stood there before is untouched") from error


def save_safetensors(path: str | Path, **content: Any) -> None:
    """Write tensors and plain values to a .safetensors file, which `load_checkpoint` reads; tuples become lists.

    The file is read back and compared with the content, to the last bit, before it takes its place.

    Raises:
        OSError: if the file cannot be written or reads back as something else; what stood at `path` is still there.
        UserError: if the package safetensors is missing.
    """
    package = _safetensors("a .safetensors file")
    tensors: dict[str, torch.Tensor] = {}
    described = _take_tensors({"format": FORMAT, **content}, "", tensors)
    metadata = {"format": "pt", "pokediff": json.dumps(described, allow_nan=False)}
    with naming(path), replacing(path, sync=True) as temporary:
        temporary.write_bytes(package.save(tensors, metadata))
        if not _equal({"format": FORMAT, **content}, _read_safetensors(temporary, package)):
            raise OSError("what was written reads back as something else")


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint, its tensors on the CPU. Code in the file is never run.

    Args:
        mmap: leave the tensors in the file until they are used.

    Raises:
        CheckpointError: if it is missing, truncated or not one of ours.
        UserError: for a .safetensors file without that package.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; `python train.py --preset quick` trains one in minutes")
    package = _safetensors(f"{path}") if path.suffix.lower() == ".safetensors" else None
    try:
        content = _read_archive(path, mmap) if package is None else _read_safetensors(path, package)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        raise CheckpointError(f"{path} is truncated or not a PokeDiff checkpoint; choose another file") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not made by this PokeDiff (expected '{FORMAT}'); choose another file")
    return _upgrade(content)


def _read_archive(path: Path, mmap: bool) -> Any:
    """Read what torch.save wrote."""
    with zipfile.ZipFile(path) as archive:  # torch.save does not compress: a file that swells is a trap
        if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
            raise ValueError("compressed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about formats that are refused
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _read_safetensors(path: Path, package: Any) -> Any:
    """Read what `save_safetensors` wrote."""
    with package.safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["pokediff"])
        return _give_tensors(described, "", {name: file.get_tensor(name) for name in file.keys()})


def _safetensors(purpose: str) -> Any:
    optional_package("safetensors", purpose, "requirements-export.txt")
    return optional_package("safetensors.torch", purpose, "requirements-export.txt")


def _take_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move the tensors of nested dicts to `tensors`, by dotted names; return the rest."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().clone().contiguous()  # the format knows no shared memory
        return {"tensor": True}
    if isinstance(value, dict):
        return {key: _take_tensors(part, f"{name}.{key}" if name else key, tensors) for key, part in value.items()}
    return value


def _give_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Undo `_take_tensors`."""
    if value == {"tensor": True}:
        return tensors[name]
    if isinstance(value, dict):
        return {key: _give_tensors(part, f"{name}.{key}" if name else key, tensors) for key, part in value.items()}
    return value


def _equal(content: Any, read: Any) -> bool:
    """Return whether a content came back as it was, but with lists for tuples."""
    if isinstance(content, torch.Tensor):
        is_alike = isinstance(read, torch.Tensor) and read.shape == content.shape and read.dtype == content.dtype
        return is_alike and torch.equal(_bytes(content), _bytes(read))  # as numbers, NaN would differ from itself
    if isinstance(content, dict):
        return isinstance(read, dict) and content.keys() == read.keys() and all(
            _equal(part, read[key]) for key, part in content.items())
    return json.loads(json.dumps(content)) == read


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Bring the content of an older checkpoint up to date; here, and nowhere else, old keys are known."""
    if "unet" in content:
        content["network"] = dict(kind="unet", config=content.pop("unet"))
    if isinstance(content.get("tally"), torch.Tensor) and content["tally"].shape == (4,):
        names = ("loss_sum", "skipped", "skipped_in_a_row", "last_loss")
        content["stats"] = dict(zip(names, content.pop("tally").tolist()))
    autoencoder = content.get("autoencoder")
    for settings in (content.get("config"), content.get("next_config"),
                     autoencoder.get("config") if isinstance(autoencoder, dict) else None):
        if not isinstance(settings, dict):
            continue
        for name in ("gaps", "anchor", "huber"):
            settings.pop(name, None)  # of tuning as it was when it compared neighbouring timesteps
        if settings.get("colour_shortcut") is False:
            del settings["colour_shortcut"]  # what it was when it was True cannot be had any more
        if "seed" in settings:
            settings.setdefault("data_seed", settings["seed"])  # critters were drawn from the training's own seed
        if settings.get("compile") == "auto":
            settings["compile"] = "off"
        if "labels" in settings:
            settings.setdefault("label_column", ())
        if settings.get("data", "critters") != "critters" and "splits" not in settings:
            settings["splits"] = "none"  # neither splits nor Hugging Face's metadata were read
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
