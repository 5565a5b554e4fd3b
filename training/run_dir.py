"""Run management: folders, locking, checkpoints, metrics and signals.

A failed write (a full or failing disk) is reported once and retried; it does not stop training.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from training.event_log import EventLog
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.device import peak_memory
from utils.files import replacing
from utils.plots import result_plot

RETRY_SECONDS = 60  # after a save that failed
Errors = type[Exception] | tuple[type[Exception], ...]
WRITE_ERRORS = (OSError, torch.OutOfMemoryError)  # a full or failing disk; a grid that needs too much memory
FIRST_STAGE = "first_stage"  # sub-folder of a run that trains an autoencoder first

# What latest.pt holds besides the settings.
NEEDED_TO_RESUME = dict(model=dict, ema=dict, optimizer=dict, scaler=dict, step=int, stats=dict, history=list,
                        num_images=int, fingerprint=str, types=list, held_out=list)


# ---------------------------------------------------------------------------------------------------------------------
# folders


def run_folder(top: str, name: str) -> Path:
    """Return outputs/ or checkpoints/, or this run's sub-folder of it."""
    return Path(top) / name


def milestones(folder: Path) -> list[Path]:
    """Return the checkpoints epoch_0100.pt, ... of a folder, the oldest first."""
    numbered = [(milestone_epoch(path), path) for path in folder.glob("epoch_*.pt")]
    return [path for epoch, path in sorted(pair for pair in numbered if pair[0] is not None)]


def milestone_epoch(path: Path) -> int | None:
    """Return the epoch in the name of a milestone; None for other files."""
    match = re.fullmatch(r"epoch_(\d+)\.pt", path.name)
    return int(match[1]) if match else None


def refuse_to_overwrite(folder: Path) -> None:
    """Raise ValueError if a run has left its checkpoints in `folder`."""
    for path in (folder / "latest.pt", folder / "final_model.pt", *milestones(folder)):
        if path.exists():
            raise ValueError(f"{path} is from an earlier run; continue it with --resume, or keep it and give this one "
                             f"a folder of its own with --run_name NAME")


def find_run(run_name: str, config_class: type, resume: bool, as_stage: bool = False) -> dict[str, Any] | None:
    """Return the checkpoint to resume, or None for a new run, which may not overwrite another.

    With `as_stage`, the run is the first stage of a longer one, which alone may resume it. Settings that the checkpoint
    does not have yet take their defaults.

    Raises:
        ValueError: if a run stands where a new one would be.
        CheckpointError: if there is no checkpoint, or not the latest.pt of such a run.
    """
    folder = run_folder("checkpoints", run_name)
    if not resume:
        refuse_to_overwrite(folder)
        return None
    path = folder / "latest.pt"
    if not path.is_file():
        raise CheckpointError(f"no run to resume: there is no {path}; check --run_name, or leave --resume out")
    content = load_checkpoint(path)
    if "next_config" in content and not as_stage:
        raise CheckpointError(f"{path} is the first stage of a longer run; continue that one with python train.py "
                              f"--resume and its --run_name")
    if isinstance(content.get("config"), dict):
        content["config"] = _with_defaults(path, content["config"], config_class)
        if _complete(content, config_class):
            return content
    raise CheckpointError(f"{path} cannot be resumed: it is not the latest.pt of a run of this version")


def find_first_stage(run_name: str, config_class: type) -> dict[str, Any] | None:
    """Return the settings of a run that was stopped in, or right after, its first stage; None for any other run.

    Raises:
        CheckpointError: for settings that are unknown here.
    """
    folder = run_folder("checkpoints", run_name)
    if (folder / "latest.pt").exists():
        return None
    for path in (folder / FIRST_STAGE / "final_model.pt", folder / FIRST_STAGE / "latest.pt"):
        if path.exists():
            settings = load_checkpoint(path, mmap=True).get("next_config")
            return None if settings is None else _with_defaults(path, settings, config_class)
    return None


def _with_defaults(path: Path, settings: dict[str, Any], config_class: type) -> dict[str, Any]:
    """Complete the settings of a checkpoint. Raises CheckpointError for ones that are unknown here."""
    defaults = {declared.name: declared.default for declared in fields(config_class)} | config_class.BEFORE
    if settings.keys() - defaults.keys():
        unknown = ", ".join(sorted(map(str, settings.keys() - defaults.keys())))
        raise CheckpointError(f"{path} cannot be resumed: it is of another command or version, with settings that are "
                              f"unknown here ({unknown})")
    return {**defaults, **settings}


def _complete(content: dict[str, Any], config_class: type) -> bool:
    """Whether a latest.pt holds all that is needed to resume, of the right types."""
    for declared in fields(config_class):
        kind = type(declared.default)
        if type(content["config"][declared.name]) not in ((float, int) if kind is float else (kind,)):
            return False
    return (all(isinstance(content.get(name), kind) for name, kind in NEEDED_TO_RESUME.items())
            and content["step"] > 0 and all(isinstance(row, dict) for row in content["history"]))


def lock_folder(folder: Path) -> None:
    """Keep `folder` for this process until it ends, in whatever way. Raises ValueError if another one has it.

    The lock is the operating system's and goes with its process: a kill leaves nothing to clean up, and the file that
    stays behind means nothing. It is a record lock, which forked children do not share, so decoding processes that
    outlive a killed training by some seconds do not hold it. A file system without locks goes unlocked.
    """
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # never closed: that would unlock
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(file, 2**20, os.SEEK_SET)  # beyond the text, which others may read
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            os.lseek(file, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.lseek(file, 0, os.SEEK_SET)
        owner = os.read(file, 200).decode(errors="replace").strip()
        os.close(file)
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return
        raise ValueError(f"another training ({owner}) is at work in {folder}/: wait for it, or give this one a folder "
                         f"of its own with --run_name NAME") from error
    with contextlib.suppress(OSError):  # no room for a name is no reason to stop
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


# ---------------------------------------------------------------------------------------------------------------------
# one run


class RunDir:
    """A run's two folders, its metrics, and its stop signal.

    Args:
        config: a TrainingConfig.
        history: rows of metrics.csv so far.
        columns: of metrics.csv.
        new: this run does not resume another.
        is_main: otherwise nothing is written.
        step: steps that are done.

    Attributes:
        outputs, checkpoints: the folders.
        history: one row per epoch, as in metrics.csv.
        stop: true once SIGINT or SIGTERM came.
    """

    def __init__(self, config: Any, history: list[dict], columns: Sequence[str], new: bool, is_main: bool = True,
                 step: int = 0):
        self.outputs, self.checkpoints = (run_folder(top, config.run_name) for top in ("outputs", "checkpoints"))
        self.history, self.columns, self.is_main = history, list(columns), is_main
        self.batch_size, self.save_seconds = config.batch_size, 60 * config.save_every
        self.failing: set[Path] = set()  # files that could not be written the last time
        if is_main:
            for folder in (self.outputs, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            lock_folder(self.checkpoints)
            if new:
                refuse_to_overwrite(self.checkpoints)  # again: a run may have come and gone while images were read
            self.write("metrics.csv", self._write_metrics)
        self.events = None
        if is_main and config.log == "tensorboard":
            self.events = EventLog(self.outputs, asdict(config), self.history, self.columns, step)
            self._log_event(self.events.rewrite)
        self.began, self.spent, self.peak = time.monotonic(), 0.0, 0
        if not new:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # then the count starts anew
                cost = json.loads((self.outputs / "cost.json").read_text())
                self.spent, self.peak = float(cost["seconds"]), int(cost["peak_memory"])
        self.stop = StopOnSignal()
        self.next_save = time.monotonic() + self.save_seconds

    def save_due(self) -> bool:
        """Whether it is time to save latest.pt again."""
        return time.monotonic() >= self.next_save

    def save(self, name: str, **content: Any) -> bool:
        """Write a checkpoint; return False, after a warning, if that failed. See save_checkpoint."""
        path = self.checkpoints / name
        saved = self._try(path, lambda: save_checkpoint(path, **content))
        if saved and name in ("latest.pt", "final_model.pt"):
            self.write("cost.json", lambda path: path.write_text(json.dumps(self.cost(content["step"])) + "\n"))
        if name == "latest.pt":
            self.next_save = time.monotonic() + (self.save_seconds if saved else min(RETRY_SECONDS, self.save_seconds))
        return saved

    def prune_milestones(self, number: int, named: Sequence[int]) -> None:
        """Delete the oldest milestones until `number` are left besides those of the epochs `named`; 0 keeps all."""
        if self.is_main and number:
            unnamed = [path for path in milestones(self.checkpoints) if milestone_epoch(path) not in named]
            for path in unnamed[:-number]:
                with contextlib.suppress(OSError):
                    path.unlink()

    def log(self, row: dict) -> None:
        """Add an epoch to the history and to metrics.csv."""
        self.history.append(row)
        path = self.outputs / "metrics.csv"
        if path in self.failing or not path.exists():  # it may have gaps, or half a line at its end
            self.write("metrics.csv", self._write_metrics)
        else:
            self._try(path, lambda: self._append_metrics(path))
        if self.events:
            self._log_event(lambda: self.events.add_row(row))

    def log_grid(self, step: int, name: str) -> None:
        """Add a sample grid of outputs/ to the event file, if there is one."""
        if self.events:
            self._log_event(lambda: self.events.add_grid(step, self.outputs / name))

    def _log_event(self, write: Callable[[], None]) -> None:
        self._try(self.outputs / "events.out.tfevents", write, errors=Exception)

    def write(self, name: str, draw: Callable[[Path], None], errors: Errors = WRITE_ERRORS) -> None:
        """Have `draw` write a file of outputs/, which appears under its name when it is whole; see `_try`."""
        def write_whole() -> None:
            with replacing(self.outputs / name) as temporary:
                draw(temporary)

        self._try(self.outputs / name, write_whole, errors)

    def _try(self, path: Path, write: Callable[[], None], errors: Errors = WRITE_ERRORS) -> bool:
        """Write a file; return whether that worked. A failure is reported once, and so is the next success.

        `errors` are those that count as failures: for a file that only shows the run, `Exception`, since nothing that
        is wrong with it may stop a training.
        """
        if not self.is_main:
            return True
        try:
            write()
        except errors as error:
            if path not in self.failing:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                tqdm.write(f"warning: no {path} ({reason}); training goes on", file=sys.stderr)
            self.failing.add(path)
            return False
        if path in self.failing:
            tqdm.write(f"{path} could be written again", file=sys.stderr)
            self.failing.remove(path)
        return True

    def _write_metrics(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.history)

    def _append_metrics(self, path: Path) -> None:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(self.history[-1])

    def cost(self, step: int) -> dict[str, float]:
        """Return the run's cost up to this step, with grids and saves: seconds, images, and peak memory in bytes."""
        return dict(seconds=round(self.spent + time.monotonic() - self.began, 1), images=step * self.batch_size,
                    peak_memory=max(self.peak, peak_memory()))

    def draw_loss(self, path: Path) -> None:
        """Plot the loss of each epoch on logarithmic axes, where a steady improvement is a straight line."""
        with result_plot(path, 7, 4) as figure:
            axis = figure.subplots()
            axis.loglog([row["epoch"] for row in self.history], [row["loss"] for row in self.history])
            axis.set_xlabel("epoch")
            axis.set_ylabel("loss")
            axis.grid(alpha=0.3, which="both")


class StopOnSignal:
    """True once Ctrl-C or SIGTERM came: the loop finishes its step and saves. A second Ctrl-C stops at once.

    A second SIGTERM does not: torchrun and cluster schedulers both pass one on to every process.
    """

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = self.signal or number

    def __bool__(self) -> bool:
        return self.signal != 0
