"""The life of a training run: its flags, its folders, its lock, its saves, its stops, its numbers.

What any training script of this repository needs around its loop. A script declares its settings once, as a dataclass
of `flag`s, and then goes

    given = parse_flags(Config, PRESETS, "Train a ...")                      # what was typed
    checkpoint = find_run(given, Config, needs)                              # a run to go on with, or None
    config = settle(given, checkpoint, Config, PRESETS, may_change)          # every setting of this run
    run = Run(config, history, ...)                                          # its folders, to this process alone

Nothing that happens to a folder while a run is in it ends the run: what cannot be written is named, and tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import json
import math
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from dataset import DataError, printable
from devices import peak_memory
from distributed import Processes
from flags import Parser

RETRY_SECONDS = 60  # after a save that failed


# ---------------------------------------------------------------------------------------------------------------------
# settings


def flag(default, help: str, choices: Sequence[str] | None = None, *, above: float = -math.inf,
         least: float = -math.inf, below: float = math.inf, most: float = math.inf):
    """A setting of a configuration, with its help line and its range; the command line is made from these."""
    limits = dict(above=above, least=least, below=below, most=most)
    return field(default=default, metadata=dict(help=help, choices=choices, limits=limits))


def with_default(config: type, name: str, default):
    """The setting of another configuration, with a default of its own."""
    (setting,) = (setting for setting in fields(config) if setting.name == name)
    return field(default=default, metadata=setting.metadata)


def parse_flags(config: type, presets: dict[str, dict], description: str) -> dict[str, Any]:
    """The flags that were given, and no others: so that a preset's values, or a checkpoint's, fill the rest."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=presets, help="settings to start from (default: reference); "
                        "a flag given beside it wins")
    parser.add_argument("--resume", action="store_true", help="go on from checkpoints/latest.pt, or "
                        "that of --run_name, with its settings")
    for setting in fields(config):
        many = type(setting.default) is tuple
        shown = " ".join(map(str, setting.default)) if many else setting.default
        text = setting.metadata["help"] + (f" (default: {shown})" if shown != "" else "")
        kind = dict(type=int if many else type(setting.default), choices=setting.metadata["choices"])
        kind = dict(action="store_true") if setting.default is False else {**kind, "nargs": "+"} if many else kind
        parser.add_argument(f"--{setting.name}", help=text.replace("%", "%%"), **kind)
    given = vars(parser.parse_args())
    return {name: tuple(value) if type(value) is list else value for name, value in given.items()}


def settle(given: dict[str, Any], checkpoint: dict | None, config: type, presets: dict[str, dict],
           may_change: set[str]) -> Any:
    """The settings of this run, a `config`, out of the flags given, the preset, and the checkpoint that is resumed.

    Raises:
        ValueError: for a value out of its range, or one that would make the run to resume another run.
    """
    given = {name: value for name, value in given.items() if name != "resume"}
    given = {**presets[given.pop("preset", "reference")], **given}
    if checkpoint is not None:
        before = checkpoint["config"]
        wrong = [f"--{name} {before[name]}" for name in given if name not in may_change and given[name] != before[name]]
        if wrong:
            raise ValueError(f"the run to resume has {', '.join(wrong)}: leave these flags out, or start another run")
        given = {**before, **given}
    settled = config(**given)
    for setting in fields(settled):
        check_range(setting, getattr(settled, setting.name))
    return settled


def check_range(setting, value: Any) -> None:
    """Raise ValueError, with the range in words, where a setting's value is out of it."""
    above, least, below, most = (setting.metadata["limits"][name] for name in ("above", "least", "below", "most"))
    if setting.name == "run_name":
        if Path(value).is_absolute() or ".." in Path(value).parts:
            raise ValueError(f"--run_name must be the name of a sub-folder, not {value}")
    elif type(value) in (int, float):
        if not math.isfinite(value):
            raise ValueError(f"--{setting.name} must be a finite number, not {value}")
        if not (above < value < below and least <= value <= most):
            words = dict(zip(("more than", "at least", "less than", "at most"), (above, least, below, most)))
            words = [f"{text} {limit}" for text, limit in words.items() if math.isfinite(limit)]
            raise ValueError(f"--{setting.name} must be {' and '.join(words)}, not {value}")


# ---------------------------------------------------------------------------------------------------------------------
# folders


def run_folder(top: str, name: str) -> Path:
    """outputs/ or checkpoints/, or this run's folder in it."""
    return Path(top) / name


def find_run(given: dict[str, Any], config: type, needs: dict[str, type]) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None for a new run, which may not take the place of another.

    Args:
        needs: what the checkpoint must hold, and of which types, besides its configuration; among it step and history.

    Raises:
        ValueError: if a run stands where a new one would be.
        CheckpointError: if there is no checkpoint, or none of such a run.
    """
    folder = run_folder("checkpoints", given.get("run_name", config.run_name))
    if not given.get("resume"):
        refuse_to_overwrite(folder)
        return None
    path = folder / "latest.pt"
    content = load_checkpoint(path)
    settings, examples = content.get("config"), {setting.name: setting.default for setting in fields(config)}
    fits = isinstance(settings, dict) and settings.keys() == examples.keys()
    fits = fits and all(type(settings[name]) in ((float, int) if type(example) is float else (type(example),))
                        for name, example in examples.items())
    fits = fits and all(isinstance(content.get(name), kind) for name, kind in needs.items())
    fits = fits and content["step"] > 0 and all(isinstance(row, dict) for row in content["history"])
    if not fits:
        raise CheckpointError(f"{path} cannot be resumed: it is not the latest.pt of a run of this version")
    return content


def refuse_to_overwrite(folder: Path) -> None:
    """Raise ValueError if a run has left its checkpoints in `folder`."""
    for path in (folder / "latest.pt", folder / "final_model.pt", *milestones(folder)):
        if path.exists():
            raise ValueError(f"{path} is from an earlier run; go on with it: --resume, or keep it and give this one "
                             f"a folder of its own: --run_name NAME")


def milestones(folder: Path) -> list[Path]:
    """The checkpoints epoch_0100.pt, ... of a folder, the oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("epoch_*.pt")
             if (match := re.fullmatch(r"epoch_(\d+)\.pt", path.name))]
    return [path for _, path in sorted(found)]


def lock_folder(folder: Path) -> None:
    """Keep `folder` for this process until it ends, in whatever way. Raises ValueError if another one has it.

    The lock is the operating system's and goes with its process: a kill leaves nothing to clean up, and the file that
    stays behind means nothing. It is a record lock, which forked children do not share, so that processes that decode
    images and outlive a killed training by some seconds do not hold it. Where a file system has no locks, it is done
    without.
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
        who = os.read(file, 200).decode(errors="replace").strip()
        os.close(file)
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return
        raise ValueError(f"another training ({who}) is at work in {folder}/: wait for it, or give this one a folder of "
                         f"its own with --run_name NAME") from error
    with contextlib.suppress(OSError):  # no room for a name is no reason to stop
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


class Run:
    """A run's two folders, its log, and its stop; nothing is written unless this is the process that `writes`.

    Attributes:
        history: a row for each epoch, as in metrics.csv.
        stop: true once the run was asked to stop.
    """

    def __init__(self, config: Any, history: list[dict], columns: Sequence[str], new: bool, writes: bool = True):
        self.outputs, self.checkpoints = (run_folder(top, config.run_name) for top in ("outputs", "checkpoints"))
        self.history, self.columns, self.writes = history, list(columns), writes
        self.batch_size, self.save_seconds = config.batch_size, 60 * config.save_every
        self.failing: set[Path] = set()  # what could not be written the last time
        if writes:
            for folder in (self.outputs, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            lock_folder(self.checkpoints)
            if new:
                refuse_to_overwrite(self.checkpoints)  # again: another run may have come and gone while we read images
            self.write("metrics.csv", self._write_metrics)
        self.began, self.spent, self.peak = time.monotonic(), 0.0, 0
        if not new:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # then the count starts anew
                cost = json.loads((self.outputs / "cost.json").read_text())
                self.spent, self.peak = float(cost["seconds"]), int(cost["peak_memory"])
        self.stop = StopOnSignal()
        self.next_save = time.monotonic() + self.save_seconds

    def save_due(self) -> bool:
        """Is it time to save latest.pt again?"""
        return time.monotonic() >= self.next_save

    def save(self, name: str, **content: Any) -> bool:
        """Write a checkpoint; False if that failed, which is said, and is no reason to stop. See save_checkpoint."""
        path = self.checkpoints / name
        saved = self._try(path, lambda: save_checkpoint(path, **content))
        if saved and name in ("latest.pt", "final_model.pt"):
            self.write("cost.json", lambda path: self._write_cost(path, content["step"]))
        if name == "latest.pt":
            self.next_save = time.monotonic() + (self.save_seconds if saved else min(RETRY_SECONDS, self.save_seconds))
        return saved

    def keep_milestones(self, number: int) -> None:
        """Delete the oldest epoch_*.pt until `number` are left; 0 keeps them all."""
        if self.writes and number:
            for path in milestones(self.checkpoints)[:-number]:
                with contextlib.suppress(OSError):
                    path.unlink()

    def log(self, row: dict) -> None:
        """Add an epoch to the history and to metrics.csv."""
        self.history.append(row)
        path = self.outputs / "metrics.csv"
        if path in self.failing or not path.exists():  # it may have holes, or half a line at its end
            self.write("metrics.csv", self._write_metrics)
        else:
            self._try(path, lambda: self._append_metrics(path))

    def write(self, name: str, draw: Callable[[Path], None]) -> None:
        """Have `draw` write a file of outputs/, which is whole when it appears under its name."""
        temporary = self.outputs / f".{name}"

        def write_and_rename() -> None:
            self.outputs.mkdir(parents=True, exist_ok=True)
            draw(temporary)
            os.replace(temporary, self.outputs / name)

        if not self._try(self.outputs / name, write_and_rename):
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _try(self, path: Path, write: Callable[[], None]) -> bool:
        """Did the file get written? That it did not is said once, and once more when it works again."""
        if not self.writes:
            return True
        try:
            write()
        except (OSError, torch.OutOfMemoryError) as error:
            if path not in self.failing:
                reason = str(error).splitlines()[0]
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

    def _write_cost(self, path: Path, step: int) -> None:
        """What the run has taken up to this step, grids and saves included: seconds of the work that was kept, images,
        and the largest peak of memory in bytes, of the GPU's where there is one."""
        cost = dict(seconds=round(self.spent + time.monotonic() - self.began, 1), images=step * self.batch_size,
                    peak_memory=max(self.peak, peak_memory()))
        path.write_text(json.dumps(cost) + "\n")

    def draw_loss(self, path: Path) -> None:
        """The loss of each epoch as a curve, on logarithmic axes, where a steady improvement is a straight line."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        axis.loglog([row["epoch"] for row in self.history], [row["loss"] for row in self.history])
        axis.set_xlabel("epoch")
        axis.set_ylabel("loss")
        axis.grid(alpha=0.3, which="both")
        figure.savefig(path, dpi=120)
        plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# stops


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


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the script with one line on stderr, and no traceback, for what a user can cause.

    Of several processes only the first speaks, but for an error that it does not share. They end here, well or not:
    nothing that comes after the `with` happens in them.
    """
    for stream in (sys.stdout, sys.stderr):  # names of folders can hold what a terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    processes = Processes()
    message, status = "", 1
    with contextlib.ExitStack() as stack:
        if not processes.first:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        try:
            yield
            status = 0
        except (ValueError, DataError, CheckpointError, OSError) as error:
            message = f"error: {printable(error)}"
        except KeyboardInterrupt:
            status = 130
        except SystemExit as stopped:
            if processes.size == 1:
                raise
            message, status = (stopped.code, 1) if isinstance(stopped.code, str) else ("", stopped.code or 0)
        except Exception as error:
            if processes.size == 1:
                raise
            message = traceback.format_exc().rstrip()
            lost_another = re.search("gloo|nccl|connection|peer|socket", str(error), re.IGNORECASE)
            if isinstance(error, RuntimeError) and lost_another:
                message = "error: another process of this training has ended; what it said tells why. --resume goes on"
    if processes.size > 1:
        end_one_of_several(processes.first, message, status)
    if status:
        sys.exit(message or status)


def end_one_of_several(first: bool, message: str, status: int) -> NoReturn:
    """End this process without taking the interpreter apart, which can hang or abort: its threads may wait for
    processes that are no more, or still let go of what they have sent."""
    if 0 < status < 128 and not first:
        # torchrun ends all when one has failed: the first must have spoken by then, and if it has the same to say, this
        # one is to be ended before it speaks.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(5)
    with contextlib.suppress(OSError):  # nobody may be reading any more
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        if message:
            print(message, file=sys.stderr, flush=True)
    os._exit(status)


@contextlib.contextmanager
def memory_advice(batch_size: int, grad_accum: int) -> Iterator[None]:
    """Turn an error of too little memory into a ValueError that says what to try."""
    try:
        yield
        return
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:  # what a CPU's allocator raises
        if not re.search("allocate memory|not enough memory|size calculation overflowed", str(error)):
            raise
    size = Processes().size
    here = batch_size // size
    finer = [parts for parts in range(2 * grad_accum, here + 1) if here % parts == 0]
    if finer:
        raise ValueError(f"out of memory with {here // grad_accum} images at a time; give --grad_accum {finer[0]}, "
                         f"which takes {here // finer[0]} at a time and changes nothing else, or --batch_size "
                         f"{size * here // finer[0]}")
    raise ValueError("out of memory with one image at a time; give a smaller --image_size or --width")


def announce_duration(seconds: float, device: torch.device) -> None:
    """Say how long the rest will take, and name the way out when that is more than an evening on a CPU."""
    if seconds < 90 * 60:
        words = f"{max(1, round(seconds / 60))} min"
    else:
        words = f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
    tqdm.write(f"at this speed, training takes about {words} more")
    if device.type == "cpu" and seconds > 6 * 3600:
        tqdm.write("this configuration is made for a GPU; on a CPU, `python train.py --preset quick` takes minutes "
                   "(Ctrl-C stops this run and saves it)")
