"""Training loop shared by train.py and the autoencoder: data, optimisation steps, logging, checkpoints."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.batches import make_loader
from training.config import TrainingConfig
from training.run_dir import RunDir, run_folder
from training.run_images import RunImages
from training.run_page import RunPage
from training.step import Stats, TrainingStep, learning_rate
from training.timetable import Timetable
from unet import count_parameters
from utils.device import describe_device
from utils.errors import printable

COLUMNS = ("epoch", "step", "loss", "lr", "skipped")  # of metrics.csv
MAX_SKIPPED = 20  # steps in a row without a finite gradient, after which training stops


@dataclass
class Stage:
    """A training that is the first part of a longer run.

    Attributes:
        run_name: of the whole run.
        next_config: settings of the part that follows; checkpoints hold them, so that the run can be resumed.
        next_seconds: how long that part will take.
    """

    run_name: str
    next_config: dict[str, Any]
    next_seconds: float


def training_loop(
    config: TrainingConfig,                            # settings
    run_images: RunImages,                             # data set, held-out names
    step: TrainingStep,                                # network, EMA, optimizer, and the update
    draw_grid: Callable[[Path], None],                 # writes an image that shows what the EMA can do
    content: dict[str, Any],                           # of a checkpoint besides the weights, to rebuild the network
    checkpoint: dict[str, Any] | None = None,          # latest.pt to resume from
    measure: Callable[[], dict[str, float]] = dict,    # further columns of metrics.csv
    measured: tuple[str, ...] = (),                    # and their names
    stage: Stage | None = None,                        # set if another training follows in the same run
) -> Path:
    """Train to the end of the run and return the path of the final checkpoint.

    Raises:
        ValueError: if gradients stay non-finite.
        OSError: if the last step could not be saved.
        SystemExit: 128 + signal, after saving, for SIGINT or SIGTERM.
    """
    # Start or resume.
    dataset, dist, timetable = run_images.dataset, step.dist, Timetable(config, len(run_images.dataset))
    number = start_or_resume(config, step, timetable, checkpoint)
    run = RunDir(config, checkpoint["history"] if checkpoint else [], [*COLUMNS, *measured], new=checkpoint is None,
                 is_main=dist.is_main, step=number)
    writer = Writer(config, run_images, step, draw_grid, content, run, timetable, stage)
    print_plan(config, run_images, step, timetable, run)
    dist.init(step.device)
    dist.check_same((run_images.fingerprint, number), "images and checkpoint")
    step.begin()
    if config.compile == "on" and number < timetable.last_step and not step.compile(*dataset.__getitems__([0])):
        config.compile = "off"
    writer.catch_up(number)

    # Load data.
    loader = make_loader(dataset, config.batch_size, config.seed, number, timetable.last_step, config.workers,
                         step.rank_slice, pin_memory=step.device.type == "cuda")
    progress, saved, stop_signal = ProgressBar(config, timetable, step, number, stage), True, 0
    for batch, labels in loader:
        # Optimisation step.
        step(batch, labels, number)
        number += 1
        progress.update(number)

        # Agree on stopping and saving, and look for skipped steps.
        stop_signal = dist.all_max(run.stop.signal)  # the processes stop after the same step
        save_now = stop_signal or number == timetable.last_step or run.save_due()
        if save_now or timetable.ends_epoch(number) or number % 20 == 0:
            stats = step.stats()
            progress.report_skipped(stats, number, run.checkpoints)

        with progress.paused():
            # End of epoch: metrics and milestone.
            if timetable.ends_epoch(number):
                writer.log(number, metrics_row(config, stats, number, timetable)
                           | (measure() if timetable.shows_progress(number) else {}))
                step.reset_counts()
                progress.reported = 0
                if timetable.is_milestone(number):
                    writer.milestone(number)

            # Save, then draw samples.
            if save_now:
                saved = writer.latest(number)
            if timetable.shows_progress(number) and (number == timetable.last_step or not stop_signal):
                writer.show_progress(number)
        if stop_signal:
            break

    # Finish.
    progress.close()
    return writer.finish(number, saved, stop_signal)


# ---------------------------------------------------------------------------------------------------------------------
# start


def start_or_resume(config: TrainingConfig, step: TrainingStep, timetable: Timetable,
                    checkpoint: dict[str, Any] | None) -> int:
    """Restore what `checkpoint` holds and return the number of steps that are done."""
    if checkpoint is None:
        return 0
    number, before = checkpoint["step"], checkpoint["config"]
    step.load_state(run_folder("checkpoints", config.run_name) / "latest.pt", checkpoint)
    print(f"resuming at step {number:,} of {timetable.last_step:,}")
    if config.lr_schedule == "cosine" and config.epochs != before["epochs"]:
        planned = before["epochs"] * timetable.steps_per_epoch
        old, new = learning_rate(config, number, planned), learning_rate(config, number, timetable.total_steps)
        print(f"warning: --epochs {config.epochs} instead of {before['epochs']} stretches the cosine schedule, so the "
              f"learning rate jumps from {old:.2g} to {new:.2g}", file=sys.stderr)
    return number


def about(config: TrainingConfig, run_images: RunImages, step: TrainingStep) -> dict[str, str]:
    """Return what a run's page says of its images, its network and its device."""
    dataset, held_out = run_images.dataset, len(run_images.held_out)
    processes = f", {step.dist.world_size} processes" if step.dist.world_size > 1 else ""
    return {"Images": f"{len(dataset):,} of {config.image_size} × {config.image_size} from {config.data}"
                      + (f"; {held_out:,} held out" if held_out else ""),
            "Types": ", ".join(dataset.class_names) or "none",
            "Network": f"{count_parameters(step.raw_net):,} parameters",
            "Device": f"{describe_device(step.device)}, {step.precision}{processes}"}


def print_plan(config: TrainingConfig, run_images: RunImages, step: TrainingStep, timetable: Timetable,
               run: RunDir) -> None:
    """Print the device, the data and the length of the run."""
    processes = f", {step.dist.world_size} processes" if step.dist.world_size > 1 else ""
    held_out = f"; {len(run_images.held_out):,} held out" if run_images.held_out else ""
    print(f"device     {describe_device(step.device)}, {step.precision}{processes}")
    print(f"images     {len(run_images.dataset):,} of {config.image_size} x {config.image_size} from {config.data}, "
          f"augmentation: {config.augment}{held_out}")
    if run_images.dataset.origin:
        print(f"data       {printable(run_images.dataset.origin)}")
    if run_images.dataset.class_names:
        print(f"types      {', '.join(run_images.dataset.class_names)}")
    print(f"training   {config.epochs:,} epochs of {timetable.steps_per_epoch:,} steps of {config.batch_size} images; "
          f"grids in {run.outputs}/, weights in {run.checkpoints}/")


# ---------------------------------------------------------------------------------------------------------------------
# during the run


def metrics_row(config: TrainingConfig, stats: Stats, number: int, timetable: Timetable) -> dict[str, float]:
    """Return an epoch's row of metrics.csv; `COLUMNS` has the names."""
    counted = timetable.steps_per_epoch - stats.skipped
    return dict(epoch=timetable.epoch(number), step=number, loss=stats.loss_sum / counted if counted > 0 else math.nan,
                lr=learning_rate(config, number - 1, timetable.total_steps), skipped=int(stats.skipped))


class ProgressBar:
    """The progress bar, the estimate of the duration, and the warnings about skipped steps."""

    FIRST, LAST = 5, 25  # steps between which the speed is measured: before, kernels are loaded and chosen

    def __init__(self, config: TrainingConfig, timetable: Timetable, step: TrainingStep, number: int,
                 stage: Stage | None = None):
        self.config, self.timetable, self.step, self.first_step = config, timetable, step, number
        self.next_seconds = stage.next_seconds if stage else 0.0  # of what follows in the same run
        self.reported = step.stats().skipped  # skipped steps of this epoch that were reported
        self.started = self.pauses = 0.0
        self.bar = tqdm(total=timetable.last_step * config.batch_size, initial=number * config.batch_size, unit="img",
                        smoothing=0.1, dynamic_ncols=True, mininterval=0.5)

    def update(self, number: int) -> None:
        self.bar.update(self.config.batch_size)
        done = number - self.first_step
        if number % 20 == 0:
            epoch = 1 + self.timetable.epoch(number - 1)
            self.bar.set_postfix(epoch=epoch, loss=f"{self.step.stats().last_loss:.4f}")
        if done == self.FIRST:
            self.step.stats()  # waits for the device
            self.started, self.pauses = time.monotonic(), 0.0
        if done == self.LAST and number < self.timetable.last_step:
            self.step.stats()
            seconds = time.monotonic() - self.started - self.pauses
            per_step = seconds / (self.LAST - self.FIRST)
            announce_duration(per_step * (self.timetable.last_step - number) + self.next_seconds,
                              has_faster_way=self.step.device.type == "cpu" and self.config.image_size < 128)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of saves and grids out of the estimate."""
        began = time.monotonic()
        yield
        self.pauses += time.monotonic() - began

    def report_skipped(self, stats: Stats, number: int, checkpoints: Path) -> None:
        """Warn of steps that were skipped since the last report. Raises ValueError after too many in a row."""
        if stats.skipped > self.reported:
            tqdm.write(f"warning: skipped {stats.skipped - self.reported:.0f} of the steps up to {number:,}, whose "
                       f"loss or gradient was not finite", file=sys.stderr)
            self.reported = stats.skipped
        if stats.skipped_in_a_row >= MAX_SKIPPED:
            raise ValueError(f"no finite loss and gradient in {stats.skipped_in_a_row:.0f} steps up to {number:,}: "
                             f"--lr is too high (start another run with a lower one, or with --warmup_steps), or "
                             f"float16 too narrow (--resume --precision fp32); {checkpoints}/ has the weights from "
                             f"before")

    def close(self) -> None:
        self.bar.close()


def time_training(config: TrainingConfig, run_images: RunImages, step: TrainingStep, *_: Any) -> float:
    """Estimate the seconds that `training_loop` would take, without saves and grids, from a few steps."""
    dataset, timetable = run_images.dataset, Timetable(config, len(run_images.dataset))
    first, last = ProgressBar.FIRST, ProgressBar.FIRST + 10
    step.begin()
    for number, (batch, labels) in enumerate(make_loader(dataset, config.batch_size, config.seed, 0, last)):
        if number == first:
            step.stats()  # waits for the device
            started = time.monotonic()
        step(batch, labels, number)
    step.stats()
    return (time.monotonic() - started) / (last - first) * timetable.last_step


def announce_duration(seconds: float, has_faster_way: bool) -> None:
    """Print how long the rest will take, and the preset that takes minutes if that is more than an evening."""
    if seconds < 90 * 60:
        words = f"{max(1, round(seconds / 60))} min"
    else:
        words = f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
    tqdm.write(f"at this speed, training takes about {words} more")
    if has_faster_way and seconds > 6 * 3600:
        tqdm.write("this configuration is made for a GPU; on a CPU, `--preset quick --data FOLDER` takes minutes, "
                   "`--preset maker --data FOLDER` hours (Ctrl-C stops this run and saves it)")


class Writer:
    """What a run writes: checkpoints, sample grids, its page, and the end."""

    def __init__(self, config: TrainingConfig, run_images: RunImages, step: TrainingStep,
                 draw_grid: Callable[[Path], None], content: dict[str, Any], run: RunDir, timetable: Timetable,
                 stage: Stage | None):
        self.config, self.run_images, self.step, self.draw_grid = config, run_images, step, draw_grid
        self.content, self.run, self.timetable = content, run, timetable
        self.run_name, self.stage = config.run_name, stage
        if stage:
            self.run_name = stage.run_name
            self.content = content | dict(next_config=stage.next_config)
        name = f" --run_name {shlex.quote(self.run_name)}" if self.run_name else ""
        self.resume = f"{command()} --resume{name}"
        self.page = RunPage(config, run, timetable, about(config, run_images, step), self.resume,
                            is_diffusion="network" in content, next_page="../index.html" if stage else "",
                            next_seconds=stage.next_seconds if stage else 0.0)

    def catch_up(self, number: int) -> None:
        """Write what a kill between the save and the rest of its step has prevented."""
        run, timetable = self.run, self.timetable
        self.page.update(number)
        if number > 0 and timetable.shows_progress(number) and not (run.outputs / timetable.grid_name(number)).exists():
            self.show_progress(number)
        if timetable.is_milestone(number) and not (run.checkpoints / timetable.milestone_name(number)).exists():
            self.milestone(number)
        if number >= timetable.last_step:
            print("nothing to do: the run has reached its end; raise --epochs (or --max_steps) to continue")

    def log(self, number: int, row: dict[str, float]) -> None:
        """Add an epoch to metrics.csv and to the run's page."""
        self.run.log(row)
        self.page.update(number)

    def show_progress(self, number: int) -> None:
        """Update the loss curve and draw the sample grid."""
        self.run.write("loss.png", self.run.draw_loss)
        self.run.write(self.timetable.grid_name(number), self.draw_grid)
        self.run.log_grid(number, self.timetable.grid_name(number))
        self.page.update(number)

    def _save(self, name: str, number: int, **more: Any) -> bool:
        return self.run.save(name, **self.content, **self.step.ema_state(), config=asdict(self.config),
                             types=list(self.run_images.dataset.class_names), held_out=self.run_images.held_out,
                             step=number, epoch=self.timetable.epoch(number), **more)

    def latest(self, number: int) -> bool:
        """Write latest.pt, from which a run resumes; return whether that worked."""
        saved = self._save("latest.pt", number, **self.step.state(), history=self.run.history,
                           num_images=len(self.run_images.dataset), fingerprint=self.run_images.fingerprint)
        self.page.update(number)
        return saved

    def milestone(self, number: int) -> None:
        """Write epoch_XXXX.pt, after a first latest.pt, without which it could not be resumed."""
        if not (self.run.checkpoints / "latest.pt").exists():
            self.latest(number)
        self._save(self.timetable.milestone_name(number), number)
        self.run.prune_milestones(self.config.keep, self.config.milestones)

    def finish(self, number: int, saved: bool, stop_signal: int) -> Path:
        """Write final_model.pt and return its path, or end the program if the run was stopped."""
        checkpoints, last_step = self.run.checkpoints, self.timetable.last_step
        if not saved:
            raise OSError(f"could not save step {number:,} (disk full?); {checkpoints}/latest.pt is older. Free some "
                          f"space and run --resume, which repeats the steps since then")
        if stop_signal and number < last_step:
            self.page.update(number, "stopped")
            self.step.dist.finalize()
            print(f"stopped at step {number:,} of {last_step:,} and saved; continue with: {self.resume}")
            sys.exit(128 + stop_signal)
        if not self._save("final_model.pt", number):
            raise OSError(f"the training is done, but {checkpoints}/final_model.pt could not be written. Free some "
                          f"space and run --resume, which writes it")
        self.page.update(number, "finished")
        if self.stage:
            self.step.dist.wait()
        else:
            self.step.dist.finalize()
        return checkpoints / "final_model.pt"


def command() -> str:
    """Return how this program was started: as a script, or as a module of a package."""
    script = Path(sys.argv[0])
    return f"python -m {script.parent.name}.{script.stem}" if script.parent.name == "tools" else f"python {script.name}"
