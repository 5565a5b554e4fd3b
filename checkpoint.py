"""Saving and loading, safely: a checkpoint is one file that is whole or not there, and is data, never code.

    save_checkpoint("checkpoints/latest.pt", model=model.state_dict(), config=...)
    model, scheduler, codec, config = load_model("checkpoints/critters.pt", device)
"""

from __future__ import annotations

import contextlib
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from devices import memory_format
from forward_diffusion import PREDICTIONS, NoiseScheduler
from latents import Autoencoder, Pixels, make_codec
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


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, its tensors on the CPU; with `mmap` they stay in the file until they are looked at.
    No code in the file is ever run.

    Raises:
        CheckpointError: if it is missing, truncated or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; `python train.py --preset quick` trains one in minutes")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save compresses nothing; what swells is a trap
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise ValueError("compressed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that are refused here anyway
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        raise CheckpointError(f"{path} is truncated or not a PokeDiff checkpoint; choose another file") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not made by this PokeDiff (expected '{FORMAT}'); choose another file")
    return content


def load_model(path: str | Path, device: str | torch.device = "cpu"
               ) -> tuple[UNet, NoiseScheduler, Pixels | Autoencoder, dict[str, Any]]:
    """From a checkpoint: the network with its averaged weights, ready to sample; its scheduler; the space it works in,
    pixels or the latents of the autoencoder that came with it; its configuration.

    The configuration has the training's flags, among them "prediction" and "image_size", and "types": the names of
    the types that the network can be asked for, in the order of its inputs; none for an unconditional one.

    Raises:
        CheckpointError: as `load_checkpoint` does, and if the parts do not fit each other or a weight is not finite.
    """
    content = load_checkpoint(path)
    if "unet" not in content:
        raise CheckpointError(f"{path} holds no diffusion model; choose the checkpoint of a train.py run")
    try:
        unet, config = UNetConfig(**content["unet"]), content["config"]
        if unet.blocks * len(unet.multipliers) > len(content["ema"]):
            raise ValueError("a network that would take for ever to build")
        with torch.device("meta"):  # shapes without memory: a made-up width must not fill the machine's
            shapes = {name: p.shape for name, p in UNet(unet).state_dict().items()}
        if shapes != {name: p.shape for name, p in content["ema"].items()}:
            raise ValueError("weights of another network")
        model = UNet(unet)
        model.load_state_dict(content["ema"])
        scheduler = NoiseScheduler(**content["scheduler"])
        size, codec = config["image_size"], make_codec(content.get("autoencoder"), device)
        if unet.channels != codec.channels:
            raise ValueError("an autoencoder of another network")
        if config["prediction"] not in PREDICTIONS or type(size) is not int or not 0 < size <= 4096 or (
                size % (unet.size_multiple * codec.factor)):
            raise ValueError("a prediction or an image size that there is not")
        config["types"] = tuple(content.get("types", ()))
        if len(config["types"]) != unet.num_types or not all(type(name) is str for name in config["types"]):
            raise ValueError("types without names")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} is incomplete or of another version of PokeDiff; choose another file") from error
    check_finite(path, model)
    return model.to(device, memory_format=memory_format(torch.device(device))).eval(), scheduler, codec, config


def load_codec(path: str | Path, device: str | torch.device = "cpu") -> Pixels | Autoencoder:
    """The autoencoder in a checkpoint of autoencoder.py, or in that of a model of its latents; pixels for no path.

    Raises:
        CheckpointError: as `load_checkpoint` does, and if there is no autoencoder in it, or one in parts.
    """
    if not path:
        return make_codec(None)
    if not Path(path).is_file():
        raise CheckpointError(f"no autoencoder at {path}; train one with autoencoder.py (for critters: python "
                              f"autoencoder.py --preset quick)")
    content = load_checkpoint(path)
    if not isinstance(content.get("autoencoder"), dict):
        raise CheckpointError(f"{path} holds no autoencoder; choose the checkpoint of an autoencoder.py run")
    # In its own checkpoint its weights are the averaged ones of the training.
    return codec_in(path, {"weights": content.get("ema"), **content["autoencoder"]}, device)


def codec_in(path: str | Path, saved: dict[str, Any] | None, device: str | torch.device = "cpu"
             ) -> Pixels | Autoencoder:
    """What the checkpoint at `path` holds at "autoencoder". Raises CheckpointError if its parts do not fit."""
    try:
        return make_codec(saved, device)
    except ValueError as error:
        raise CheckpointError(f"{path} has an autoencoder that cannot be used ({error}); choose another") from error


def restore(path: str | Path, content: dict[str, Any], optimizer: torch.optim.Adam, scaler: torch.amp.GradScaler,
            **modules: nn.Module) -> None:
    """Put a training's state back: `content[name]` into each of `modules`, "optimizer" and "scaler" into theirs.

    Raises:
        CheckpointError: if the state does not fit them, or a weight is not a finite number.
    """
    try:
        for name, module in modules.items():
            module.load_state_dict(content[name])
        now = optimizer.state_dict()["param_groups"]  # the optimizer's settings are the code's; the file has its memory
        memory = content["optimizer"]["state"]
        if memory.keys() != {i for group in now for i in group["params"]}:
            raise ValueError("the memory of another number of weights")
        optimizer.load_state_dict(dict(state=memory, param_groups=now))
        for parameter, state in optimizer.state.items():  # torch looks at neither names nor shapes
            shapes = {name: value.shape for name, value in state.items()}
            if shapes != dict(step=torch.Size([]), exp_avg=parameter.shape, exp_avg_sq=parameter.shape):
                raise ValueError("the memory of other weights")
            for name in ("exp_avg", "exp_avg_sq"):  # in the weights' own order of memory, on which fused Adam relies:
                state[name] = torch.empty_like(parameter).copy_(state[name])  # another device has another
        if scaler.is_enabled() and content["scaler"]:  # else this run, or the one before, has no use for one
            scaler.load_state_dict(content["scaler"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit the network that its own settings describe; choose another "
                              f"file") from error
    check_finite(path, *modules.values())


def check_finite(path: str | Path, *modules: nn.Module) -> None:
    """Refuse weights that would make every picture black. Raises CheckpointError."""
    for module in modules:
        if not all(torch.isfinite(p).all() for p in module.parameters()):
            raise CheckpointError(f"{path} has weights that are not finite numbers: its training had gone wrong; "
                                  f"choose an earlier checkpoint")


def newest_checkpoint(folder: str | Path = "checkpoints") -> Path:
    """The checkpoint of a diffusion model that was written last, at any depth below `folder`."""
    found = [path for path in Path(folder).rglob("*.pt") if path.is_file() and not path.name.startswith(".")]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            if "unet" in load_checkpoint(path, mmap=True):
                return path
        except CheckpointError:
            return path  # whoever loads it will say what is wrong with it
    raise CheckpointError(f"no checkpoint in {folder}/; `python train.py --preset quick` trains one in minutes")
