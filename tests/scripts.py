"""Helpers for the tests of the commands: calling a command line, and reading the files that it wrote."""

from __future__ import annotations

import csv
import hashlib
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training.config import MAY_CHANGE_ON_RESUME

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--data critters --num_critters 8 --image_size 16 --width 8 --groups 4 --multipliers 1 2 --blocks 1 --epochs 3 "
        "--batch_size 4 --num_samples 4 --sample_steps 2 --timesteps 50 --device cpu --precision fp32").split()
TINY_AUTOENCODER = ("--data critters --num_critters 8 --image_size 16 --width 8 --epochs 4 --batch_size 4 "
                    "--num_samples 2 --sample_every 2 --device cpu --precision fp32 --lr 1e-2 --warmup_steps 0").split()
FEW_STEPS = "--device cpu --precision fp32 --sampler ddpm --steps 3".split()


def call(module: ModuleType, *flags: Any) -> int | str | None:
    """Run the command in `module`, in this process, with these flags.

    Returns:
        What the command exits with: a status, or the line that Python prints to stderr for status 1.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        try:
            module.main()
        except SystemExit as stopped:
            return stopped.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0


def call_in(folder: Path, script, *flags) -> Path:
    """Run a command that must succeed in a folder, and return the folder; for fixtures that live longer than a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(script, *flags) == 0
    return folder


def assert_one_line(code: int | str | None, capsys: pytest.CaptureFixture, *words: str) -> None:
    """Check that a command ended with one line on stderr, which begins with "error:" and holds these words."""
    assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code, code
    assert all(word in code for word in words), code
    assert capsys.readouterr().err == ""  # Python prints the code; nothing else was


def metrics(name: str = "metrics.csv") -> list[dict]:
    """Return the rows of a metrics.csv in outputs/."""
    with Path("outputs", name).open(newline="") as file:
        return list(csv.DictReader(file))


def same(ours: Any, theirs: Any) -> bool:
    """Return whether two contents of checkpoints are equal, to the last bit."""
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and ours.equal(theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def assert_same_run(ours: dict, theirs: dict) -> None:
    """Check that two checkpoints are of one training: equal but for settings that may change on resume."""
    for name in theirs:
        if name != "config":
            assert same(ours[name], theirs[name]), f"{name} differs"
    settings = {name for name in theirs["config"] if ours["config"][name] != theirs["config"][name]}
    assert settings <= MAY_CHANGE_ON_RESUME, settings - MAY_CHANGE_ON_RESUME


def tree(folder: Path = Path()) -> dict[str, str]:
    """Return a hash of every file below a folder, and the target of every link."""
    content = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            content[str(path)] = "-> " + os.readlink(path)
        elif path.is_file():
            content[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return content


def pictures(folder: str | Path) -> dict[str, np.ndarray]:
    """Return the images in a folder, int [H, W, 3] each, by their names."""
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(Path(folder).iterdir())}
