"""The settings that every training has, and how they come together: flags, preset, and the run to resume."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from training.augment import AUGMENT_MODES
from training.dataset import POKEMON_FOLDER, POKEMON_SOURCE, has_images
from training.event_log import LOGS, check_tensorboard
from training.labels import BEFORE_METADATA
from training.run_dir import find_first_stage, find_run
from training.splits import SPLIT_SETTINGS
from utils.cli import (
    MAX_SEED,
    Parser,
    add_settings,
    check_ranges,
    check_sub_folder,
    device_setting,
    given_settings,
    setting,
)
from utils.device import PRECISIONS
from utils.errors import is_out_of_memory

ConfigT = TypeVar("ConfigT", bound="TrainingConfig")


@dataclass
class TrainingConfig:
    """The settings that every training has."""

    data: str = setting(POKEMON_FOLDER, "folder of images, at any depth, or a .zip of one; or 'critters', the built-in "
                                        "creatures")
    num_critters: int = setting(2000, "number of critters to draw, where those are the data", above=0)
    data_seed: int = setting(0, "seed of the critters", least=0, most=MAX_SEED)
    holdout: float = setting(0.0, "fraction of the images held out from training, for evaluate.py; below 1",
                             least=0, below=1)
    splits: str = setting("auto", "auto: top folders named train, validation and test divide the images, and the last "
                                  "two are held out; none: they are folders like others", SPLIT_SETTINGS)
    BEFORE: ClassVar[dict[str, Any]] = {}  # what runs did that do not have a setting yet, where it is not the default

    image_size: int = setting(64, "side of the images in pixels; a multiple of 8 for the reference network", most=4096)
    augment: str = setting("full", "full: flips, rotations to 15 degrees and colour jitter; flip: flips alone",
                           AUGMENT_MODES)

    epochs: int = setting(2000, "passes over the data", above=0)
    max_steps: int = setting(0, "stop after this many steps; 0: never", least=0)
    batch_size: int = setting(16, "images per step, of all processes together", above=0)
    grad_accum: int = setting(1, "micro-batches per step (gradient accumulation): less memory, the same training",
                              above=0)
    lr: float = setting(1e-4, "learning rate of Adam", above=0)
    lr_schedule: str = setting("constant", "cosine: the rate falls to 0 at the end", ("constant", "cosine"))
    warmup_steps: int = setting(0, "steps of linear learning-rate warm-up", least=0)
    clip_grad: float = setting(1.0, "gradient clipping: maximum norm", above=0)
    ema_decay: float = setting(0.9999, "decay per step of the weights' moving average (EMA), lower at the start; "
                                       "below 1", least=0, below=1)
    seed: int = setting(0, "seed of weights, order, noise and augmentation", least=0, most=MAX_SEED)

    sample_every: int = setting(10, "epochs between sample grids and updates of the loss curve", above=0)
    num_samples: int = setting(16, "images in a sample grid", above=0)
    milestone_every: int = setting(100, "epochs between checkpoints that are kept, epoch_0100.pt and so on", above=0)
    milestones: tuple[int, ...] = setting((), "further epochs whose checkpoint is kept and whose grid is drawn, as 1 "
                                              "30 (default: none)")
    keep: int = setting(0, "number of newest milestones to keep, besides those of --milestones; 0: all", least=0)
    save_every: float = setting(10.0, "minutes between saves of checkpoints/latest.pt", least=0)

    log: str = setting("none", "tensorboard: also write curves, grids and settings as a TensorBoard event file; needs "
                               "the package tensorboard", LOGS)
    workers: int = setting(-1, "DataLoader workers per training process, if the images do not fit in memory; -1: one "
                               "per core, at most 8", least=-1)
    device: str = device_setting()
    precision: str = setting("auto", "of the network's arithmetic; auto: bf16 where the device computes in it; fp16 is "
                                     "for GPUs that do not", PRECISIONS)
    compile: str = setting("off", "torch.compile, which takes minutes and then makes steps faster on a GPU",
                           ("on", "off"))
    run_name: str = setting("", "sub-folder of outputs/ and checkpoints/ for this run (default: none)")


# What a resumed run may change; anything else would make it another run.
MAY_CHANGE_ON_RESUME = {
    "epochs", "max_steps", "grad_accum", "grad_checkpoint", "sample_every", "num_samples", "sampler", "sample_steps",
    "guidance", "guide_at", "milestone_every", "milestones", "keep", "save_every", "log", "workers", "device",
    "precision", "compile", "run_name",
}


@dataclass
class Launch:
    """How a training starts.

    Attributes:
        config: its settings.
        checkpoint: the latest.pt to resume, or None.
        resume: whether --resume was given; without a checkpoint, the run was in its first stage.
        notice: shown at the start and at the end if the run trains on something else than one may expect.
    """

    config: Any
    checkpoint: dict[str, Any] | None
    resume: bool
    notice: str = ""

    def print_notice(self) -> None:
        if self.notice:
            print(self.notice)


def configure(config_class: type[ConfigT], presets: dict[str, dict], description: str, prog: str,
              implied: dict[tuple[str, Any], dict] | None = None) -> Launch:
    """Read the command line of a training script.

    Args:
        implied: for a setting's name and value, other settings that go with it unless flags say otherwise. On --resume
            only with --preset: else the checkpoint has them.

    Raises:
        ValueError, CheckpointError: for settings that are out of range, or a run that cannot be begun or resumed.
    """
    given = _parse_flags(config_class, presets, description, prog)
    resume, has_preset = given.pop("resume", False), "preset" in given
    preset = presets[given.pop("preset", "reference")]
    if has_preset or not resume:
        for (name, value), others in (implied or {}).items():
            if ({**preset, **given}).get(name) == value:
                preset = {**preset, **others}
    run_name = given.get("run_name", preset.get("run_name", config_class.run_name))
    stopped = find_first_stage(run_name, config_class) if resume else None
    if stopped is not None:
        return Launch(settle({**preset, **given}, dict(config=stopped), config_class), None, resume)
    checkpoint = find_run(run_name, config_class, resume)
    launch = Launch(settle({**preset, **given}, checkpoint, config_class), checkpoint, resume)
    is_default = launch.config.data == POKEMON_FOLDER and "data" not in given and checkpoint is None
    if is_default and not has_images(POKEMON_FOLDER):
        launch.notice = (f"NO IMAGES IN {POKEMON_FOLDER}/: TRAINING ON CRITTERS, THE BUILT-IN CREATURES, INSTEAD. For "
                         f"Pokémon, put the images of {POKEMON_SOURCE} there; for others, name a folder with --data.")
        launch.config.data = "critters"
    return launch


def _parse_flags(config_class: type, presets: dict[str, dict], description: str, prog: str) -> dict[str, Any]:
    """Return the flags that were given, and no others, so that a preset or a checkpoint fills in the rest."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS, prog=prog)
    parser.add_argument("--preset", choices=presets, help="settings to start from; flags take precedence (default: "
                        "reference)")
    parser.add_argument("--resume", action="store_true", help="continue from checkpoints/latest.pt, or that of "
                        "--run_name, with its settings")
    add_settings(parser, config_class)
    return given_settings(parser)


def settle(given: dict[str, Any], checkpoint: dict[str, Any] | None, config_class: type[ConfigT]) -> ConfigT:
    """Combine the settings given with those of the run to resume.

    Raises:
        ValueError: for a value out of range, or one that would make the run to resume another run.
    """
    if checkpoint is not None:
        before = {declared.name: declared.default for declared in fields(config_class)} | checkpoint["config"]
        if given.get("labels") == "auto" and before["labels"] == BEFORE_METADATA:  # which is what auto was called then
            given = {**given, "labels": BEFORE_METADATA}
        wrong = [f"--{name} {_typed(before[name])}" for name in given
                 if name not in MAY_CHANGE_ON_RESUME and given[name] != before[name]]
        if wrong:
            raise ValueError(f"the run to resume has {', '.join(wrong)}: leave these flags out, or start another run")
        given = {**before, **given}
    config = config_class(**given)
    check_ranges(config)
    check_sub_folder("--run_name", config.run_name)
    for declared in fields(config):  # argparse checks what is typed; a checkpoint can hold a choice that is gone
        choices, value = declared.metadata["choices"], getattr(config, declared.name)
        if choices and value not in choices:
            raise ValueError(f"--{declared.name} {value} is not available any more; choose one of {', '.join(choices)}")
    if config.log == "tensorboard":
        check_tensorboard()
    return config


def _typed(value: Any) -> str:
    """Return a setting as it is typed after its flag."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "(none)"
    return "auto" if value == BEFORE_METADATA else str(value)


@contextlib.contextmanager
def memory_advice(batch_size: int, grad_accum: int, world_size: int) -> Iterator[None]:
    """Turn running out of memory into a ValueError that says what to try."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    here = batch_size // world_size
    finer = [parts for parts in range(2 * grad_accum, here + 1) if here % parts == 0]
    if finer:
        raise ValueError(f"out of memory with {here // grad_accum} images at a time; give --grad_accum {finer[0]}, "
                         f"which takes {here // finer[0]} at a time")
    raise ValueError("out of memory with one image at a time; give a smaller --image_size or --width")
