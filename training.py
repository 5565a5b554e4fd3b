"""The training loop, whatever is learned: the data, the steps in their order, and what is written beside them.

    training = Training(config, checkpoint)           # the device, and the images
    training.run(Task(model, draw, loss, picture))    # see training_step.py, which has the step itself

`config` is a `TrainingConfig`, with the settings that every training has; `checkpoint` is the latest.pt to go on from,
or None (`runs.find_run`). train.py teaches a network to denoise in this way.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from augmentation import AUGMENT_MODES
from checkpoint import restore
from dataset import DataError, find_images, held_out_names, image_names, load_images, make_loader
from devices import COMPILE, PRECISIONS, describe, pick_precision, use_fast_kernels
from distributed import Processes
from runs import (Run, announce_duration, find_run, flag, memory_advice, one_line_errors, parse_flags, run_folder,
                  settle)
from training_step import Task, TrainingStep, learning_rate

POKEMON_FOLDER = "data/pokemon_jpg"
POKEMON_SOURCE = "https://www.kaggle.com/datasets/kvpratama/pokemon-images-dataset"


@dataclass
class TrainingConfig:
    """The settings that every training has."""

    data: str = flag(POKEMON_FOLDER, "folder of images, at any depth; or 'critters', the built-in creatures")
    num_critters: int = flag(2000, "how many critters to draw, where those are the data", above=0)
    holdout: float = flag(0.0, "share of the images kept aside from training, for evaluate.py; 0 to below 1",
                          least=0, below=1)
    image_size: int = flag(64, "side of the images, in pixels; a multiple of 8 for the reference network", most=4096)
    augment: str = flag("full", "full: flips, rotations to 15 degrees, colour jitter; flip: flips alone; untold: full, "
                                "but the network is not told of it", AUGMENT_MODES)

    epochs: int = flag(2000, "passes over the data", above=0)
    max_steps: int = flag(0, "stop after so many steps, 0: never", least=0)
    batch_size: int = flag(16, "images a step, of all processes together", above=0)
    grad_accum: int = flag(1, "parts in which a step's images go through the network one after the other: more parts "
                              "take less memory and change nothing else", above=0)
    lr: float = flag(1e-4, "learning rate of Adam", above=0)
    lr_schedule: str = flag("constant", "cosine: the rate falls to 0 at the end", ("constant", "cosine"))
    warmup_steps: int = flag(0, "steps over which the rate rises from 0", least=0)
    clip_grad: float = flag(1.0, "largest norm of the gradient", above=0)
    ema_decay: float = flag(0.9999, "decay a step of the weights' moving average, from 0 to 1; lower at the start",
                            least=0, below=1)
    seed: int = flag(0, "of the weights, the order, the noise and the augmentation", least=0)

    sample_every: int = flag(10, "epochs between sample grids and updates of the loss curve", above=0)
    num_samples: int = flag(16, "images in a sample grid", above=0)
    milestone_every: int = flag(100, "epochs between checkpoints that are kept, epoch_0100.pt and so on", above=0)
    milestones: tuple[int, ...] = flag((), "more epochs whose checkpoint is kept and whose grid is drawn, as 1 30 "
                                           "(default: none)")
    keep: int = flag(0, "how many of those to keep, the newest ones; 0: all", least=0)
    save_every: float = flag(10.0, "minutes between saves of checkpoints/latest.pt", least=0)

    workers: int = flag(-1, "processes that decode images, when the folder does not fit in memory, for each process "
                            "that trains; -1: one a core, at most 8", least=-1)
    device: str = flag("auto", "auto, cuda, cuda:1, mps, cpu, ...; auto: CUDA, else MPS, else the CPU")
    precision: str = flag("auto", "of the network's arithmetic; auto: bf16 where the device has it; fp16 is for GPUs "
                                  "that have not", PRECISIONS)
    compile: str = flag("auto", "torch.compile, which takes minutes and then makes steps faster; auto: where the run "
                                "is long enough to earn it", COMPILE)
    run_name: str = flag("", "sub-folder of outputs/ and checkpoints/ for this run (default: none)")


# What a resumed run may change; anything else would make it another run.
MAY_CHANGE_ON_RESUME = {
    "epochs", "max_steps", "grad_accum", "grad_checkpoint", "sample_every", "num_samples", "sampler", "sample_steps",
    "guidance", "milestone_every", "milestones", "keep", "save_every", "workers", "device", "precision", "compile",
    "run_name",
}

# What latest.pt holds beside the settings, so that a run can go on from it.
NEEDED_TO_RESUME = dict(model=dict, ema=dict, optimizer=dict, scaler=dict, step=int, tally=torch.Tensor, history=list,
                        num_images=int, fingerprint=str, types=list, held_out=list)

COLUMNS = ("epoch", "step", "loss", "lr", "skipped")  # of metrics.csv
MAX_SKIPPED = 20  # steps in a row without a finite gradient, after which training stops


def command(config_class: type, presets: dict[str, dict], description: str,
            train: Callable[[TrainingConfig, dict | None], None]) -> None:
    """A training script's `main`: from the command line to `train(config, checkpoint)`, with one line for an error."""
    with one_line_errors():
        given = parse_flags(config_class, presets, description)
        checkpoint = find_run(given, config_class, NEEDED_TO_RESUME)
        config = settle(given, checkpoint, config_class, presets, MAY_CHANGE_ON_RESUME)
        if config.data == POKEMON_FOLDER and "data" not in given and checkpoint is None and not has_images(config.data):
            print(f"{POKEMON_FOLDER}/ has no images: put those of {POKEMON_SOURCE} there, or name a folder with "
                  f"--data; training on critters, the built-in creatures, for now")
            config.data = "critters"
        with memory_advice(config.batch_size, config.grad_accum):
            train(config, checkpoint)


class Training:
    """One run of a training script: first its device and its data, then all of its steps.

    Attributes:
        device, precision: where and how the network computes.
        dataset: the images, without those that are kept aside, whose names are in `held_out`.

    Raises:
        ValueError, DataError: for settings that cannot be, and for images other than those of the run to resume.
    """

    def __init__(self, config: TrainingConfig, checkpoint: dict | None):
        self.config, self.checkpoint = config, checkpoint
        self.processes = Processes()  # this one, unless torchrun has started several
        self.device = self.processes.pick_device(config.device)
        self.precision = pick_precision(config.precision, self.device)
        use_fast_kernels()
        self.processes.share(config.batch_size, config.grad_accum)  # can the batch be divided? before the data is read
        self._load_images()

    def _load_images(self) -> None:
        """The data, without what is kept aside. A resumed run keeps aside what it kept before, whatever was added."""
        config, checkpoint = self.config, self.checkpoint
        if checkpoint is None:
            names = image_names(config.data, config.num_critters)
            self.held_out = held_out_names(names, config.holdout)
            if len(self.held_out) == len(names):
                raise ValueError(f"--holdout {config.holdout} keeps all of the {len(names)} images aside; give less")
        else:
            self.held_out = checkpoint["held_out"]
        aside = set(self.held_out)
        self.dataset = dataset = load_images(
            config.data, config.image_size, labels=getattr(config, "labels", "none"), seed=config.seed,
            keep=lambda name: name not in aside, num_critters=config.num_critters,
        )
        self.fingerprint = dataset.fingerprint()
        if checkpoint is None:
            return
        if len(dataset) != checkpoint["num_images"]:
            raise ValueError(f"{config.data} has {len(dataset)} usable images and the run to resume had "
                             f"{checkpoint['num_images']}; bring those back, or start another run with --run_name")
        if list(dataset.types) != checkpoint["types"]:
            raise ValueError(f"{config.data} has the types {' '.join(dataset.types) or '(none)'} and the run to resume "
                             f"had {' '.join(checkpoint['types']) or '(none)'}; bring its labels back")
        if self.fingerprint != checkpoint["fingerprint"]:
            raise ValueError(f"{config.data} has other file names or other labels than when the run to resume began; "
                             f"bring those back, or start another run with --run_name")

    def run(self, task: Task) -> None:
        """The whole run, in the order in which it happens."""
        config, checkpoint, processes, device = self.config, self.checkpoint, self.processes, self.device
        dataset = self.dataset
        steps_per_epoch = math.ceil(len(dataset) / config.batch_size)
        total_steps = config.epochs * steps_per_epoch
        last_step = min(total_steps, config.max_steps or total_steps)
        make_step = TrainingStep(task, config, device, self.precision, processes, total_steps)
        optimizer, scaler, tally = make_step.optimizer, make_step.scaler, make_step.tally
        step, history = 0, []
        if checkpoint is not None:
            restore(run_folder("checkpoints", config.run_name) / "latest.pt", checkpoint, optimizer, scaler,
                    model=make_step.model, ema=make_step.average)
            step, history = checkpoint["step"], checkpoint["history"]
            tally += checkpoint["tally"].to(device)
            print(f"resuming at step {step:,} of {last_step:,}")
        several = f", {processes.size} processes" if processes.size > 1 else ""
        print(f"device     {describe(device)}, {self.precision}{several}")
        print(f"images     {len(dataset):,} of {config.image_size} x {config.image_size}, augmentation: "
              f"{config.augment}" + (f"; {len(self.held_out):,} kept aside" if self.held_out else ""))
        if dataset.types:
            print(f"types      {', '.join(dataset.types)}")
        run = Run(config, history, [*COLUMNS, *task.measures], new=checkpoint is None, writes=processes.first)
        print(f"training   {config.epochs:,} epochs of {steps_per_epoch:,} steps of {config.batch_size} images; "
              f"grids in {run.outputs}/, weights in {run.checkpoints}/")

        def save(name: str, **more: Any) -> bool:
            return run.save(name, **task.content, ema=make_step.average.state_dict(), config=asdict(config),
                            types=list(dataset.types), held_out=self.held_out, step=step,
                            epoch=step // steps_per_epoch, **more)

        def save_latest() -> bool:
            return save("latest.pt", model=make_step.model.state_dict(), optimizer=optimizer.state_dict(),
                        scaler=scaler.state_dict(), tally=tally.cpu(), history=history, num_images=len(dataset),
                        fingerprint=self.fingerprint)

        def ends_one_of(every: int) -> bool:
            """Does this step end an epoch of those that come so often, or of --milestones?"""
            epoch, in_epoch = divmod(step, steps_per_epoch)
            return in_epoch == 0 and (epoch % every == 0 or epoch in config.milestones)

        def progress_is_due() -> bool:
            return step == last_step or ends_one_of(config.sample_every)

        def show_progress() -> None:
            if progress_is_due():
                run.write("loss.png", run.draw_loss)
                run.write(grid_name(), lambda path: task.picture(make_step.average, path))

        def grid_name() -> str:
            return f"generated_epoch_{math.ceil(step / steps_per_epoch):04d}.png"

        def is_milestone() -> bool:
            return 0 < step < total_steps and ends_one_of(config.milestone_every)

        def save_milestone() -> None:
            save(f"epoch_{step // steps_per_epoch:04d}.pt")
            run.keep_milestones(config.keep)

        processes.join(device)
        processes.check_same((self.fingerprint, step), "images and checkpoint")
        make_step.begin()

        def compile_network() -> None:
            tqdm.write("compiling the network, which takes a minute or two")
            compiled = make_step.compile(*dataset.__getitems__([0]))
            config.compile = "on" if compiled else "off"  # as a resumed run will do from its start

        if config.compile == "on" and step < last_step:
            compile_network()
        bar = tqdm(total=last_step * config.batch_size, initial=step * config.batch_size, unit="img", smoothing=0.1,
                   dynamic_ncols=True, mininterval=0.5)
        started, first_step = time.monotonic(), step
        stop, saved, reported = 0, True, tally[1].item()  # asked to stop? last save worked? skipped steps we spoke of
        if step > 0 and not (run.outputs / grid_name()).exists():
            show_progress()  # a kill came between the save and the grid
        if is_milestone() and not (run.checkpoints / f"epoch_{step // steps_per_epoch:04d}.pt").exists():
            save_milestone()  # or the milestone
        if step >= last_step:
            print("nothing to do: the run has reached its end; raise --epochs (or --max_steps) to go on")

        loader = make_loader(dataset, config.batch_size, config.seed, step, last_step, config.workers, make_step.share)
        for images, types in loader:
            make_step(images, types, step)
            step += 1

            bar.update(config.batch_size)
            if step % 20 == 0:
                bar.set_postfix(epoch=1 + (step - 1) // steps_per_epoch, loss=f"{tally[3].item():.4f}")
            if step == first_step + 5:
                tally[3].item()  # waits for the device; the first steps also load and choose kernels: start here
                started = time.monotonic()
            if step == first_step + 25 and step < last_step:
                tally[3].item()
                seconds_left = (time.monotonic() - started) / 20 * (last_step - step)
                announce_duration(seconds_left, device)
                if config.compile == "auto" and processes.largest(compiling_pays(seconds_left, device)):
                    compile_network()

            epoch, in_epoch = divmod(step, steps_per_epoch)
            stop = processes.largest(run.stop.signal)  # the processes stop after the same step
            save_now = stop or step == last_step or run.save_due()
            if save_now or in_epoch == 0 or step % 20 == 0:
                losses, skipped, in_a_row, _ = tally.tolist()
                if skipped > reported:
                    tqdm.write(f"warning: skipped {skipped - reported:.0f} of the steps up to {step:,}, whose loss or "
                               f"gradient was not finite", file=sys.stderr)
                    reported = skipped
                if in_a_row >= MAX_SKIPPED:
                    raise ValueError(f"no finite loss and gradient in {in_a_row:.0f} steps up to {step:,}: --lr is too "
                                     f"high (start another run with a lower one, or with --warmup_steps), or float16 "
                                     f"too narrow (--resume --precision fp32); {run.checkpoints}/ has the weights from "
                                     f"before")
            if in_epoch == 0:
                mean = losses / (steps_per_epoch - skipped) if skipped < steps_per_epoch else math.nan
                row = dict(epoch=epoch, step=step, loss=mean, lr=learning_rate(config, step - 1, total_steps),
                           skipped=int(skipped))
                run.log(row | (task.measure(make_step.average) if progress_is_due() else {}))
                tally[:2] = reported = 0
                if is_milestone():
                    # The first latest.pt comes before the first milestone, without which that could not be resumed.
                    if not (run.checkpoints / "latest.pt").exists():
                        saved = save_latest()
                    save_milestone()
            if save_now:
                saved = save_latest()
            if step == last_step or not stop:
                show_progress()
            if stop:
                break

        bar.close()
        if not saved:
            raise OSError(f"the training stands at step {step:,} but could not be saved; {run.checkpoints}/latest.pt "
                          f"is from before. Make room, and --resume repeats the steps since then, to the same result")
        if stop and step < last_step:
            processes.leave()
            name = f" --run_name {config.run_name}" if config.run_name else ""
            print(f"stopped at step {step:,} of {last_step:,} and saved; go on with: python "
                  f"{Path(sys.argv[0]).name} --resume{name}")
            sys.exit(128 + stop)
        if not save("final_model.pt"):
            raise OSError(f"the training is done, but {run.checkpoints}/final_model.pt could not be written. Make "
                          f"room, and --resume writes it")
        processes.leave()
        if step > first_step:
            print(f"done: {run.outputs}/{grid_name()} shows {task.shows}; {task.next_command} "
                  f"{run.checkpoints}/final_model.pt")


def compiling_pays(seconds_left: float, device: torch.device) -> bool:
    """Is a run of so many more seconds so long that compiling saves twice the time that it takes?

    On two cores of a CPU compiling the reference network took 100 to 130 s and its steps were no faster
    (`benchmark.py --compile`). For CUDA both numbers are guesses.
    """
    takes, saves = 120, {"cuda": 0.2}
    return seconds_left * saves.get(device.type, 0.0) > 2 * takes


def has_images(folder: str) -> bool:
    try:
        return bool(find_images(folder))
    except DataError:
        return False
