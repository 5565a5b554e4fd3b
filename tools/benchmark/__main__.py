"""Benchmark: how fast PokeDiff trains and samples on this machine, how much memory it takes, and against what.

    python -m tools.benchmark                                 # the reference network, 16 images of 64 x 64 per step
    python -m tools.benchmark --width 32 --multipliers 1 2 2 --blocks 1 --groups 8 --image_size 32  # --preset quick
    python -m tools.benchmark --compile                       # also with torch.compile
    python -m tools.benchmark --against                       # also other packages, where they are installed
    python -m tools.benchmark --alone --image_size 256 --autoencoder checkpoints/autoencoder/final_model.pt
    python -m tools.benchmark --profile                       # where the time of a step goes, and its floor

The baseline is the same network in a plain float32 loop. A speed is the median of the rounds, with the smallest and the
largest. The tables go to the screen, everything measured to outputs/benchmark.json. Run nothing else meanwhile.
"""

from __future__ import annotations

import importlib
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from models.space import load_space
from tools.benchmark.baselines import PEERS, CompiledPokeDiff, PokeDiff, trainers
from tools.benchmark.measure import measure_memory, measure_sampling, measure_training
from tools.benchmark.roofline import Rates, machine_rates, profile
from tools.benchmark.tables import profile_table, sampling_table, training_table
from training.augment import AUGMENT_MODES
from unet import UNetConfig, default_multipliers
from utils.cli import device_setting, parse, precision_setting, setting
from utils.cuda_graph import ORDINARY_CALLS
from utils.device import describe_device, peak_memory, pick_device, pick_precision, use_fast_kernels
from utils.errors import first_line, one_line_errors
from utils.files import write_json


@dataclass
class Settings:
    """The flags of the benchmark."""

    width: int = setting(64, "channels at the network's first level", above=0)
    multipliers: tuple[int, ...] = setting(
        (), "of the width, one per level (default: those of unet.LEVELS for the image size)", above=0)
    blocks: int = setting(2, "residual blocks per level", above=0)
    groups: int = setting(32, "groups of the group normalisations", above=0)
    image_size: int = setting(64, "side of the images in pixels", above=0)
    autoencoder: str = setting("", "checkpoint of an autoencoder, to work in its latents (default: in pixels)")
    augment: str = setting("full", "augmentation of the images", AUGMENT_MODES)
    batch_size: int = setting(16, "images per training step", above=0)
    num_images: int = setting(16, "images sampled at a time", above=0)

    rounds: int = setting(5, "rounds, in each of which all take turns", above=0)
    steps: int = setting(0, "training steps per turn; 0: 1, on a GPU 100", least=0)
    warmup: int = setting(0, "training steps before the first turn; 0: 2, on a GPU 20", least=0)
    passes: int = setting(2, "least number of network passes to time in each turn of a sampler", above=0)
    seconds: float = setting(3.0, "end the turn of a sampler after this many seconds", above=0)

    alone: bool = setting(False, "measure PokeDiff only, without baselines")
    compile: bool = setting(False, "also measure training with torch.compile")
    against: bool = setting(False, f"also measure the training of {' and '.join(PEERS)}, where installed")
    profile: bool = setting(False, "instead: where the time of a training step goes")
    memory_of: str = setting("", "instead: print the peak memory, in bytes, of a few training steps of one row of the "
                                 "table, given by its name", metavar="NAME")
    output: Path = setting(Path("outputs/benchmark.json"), "file for everything that was measured", kind=Path)
    device: str = device_setting()
    precision: str = precision_setting()


def main() -> None:
    with one_line_errors():
        settings = parse(Settings, "Measure how fast PokeDiff trains and samples, and how much memory that takes.",
                         prog="python -m tools.benchmark")
        device = pick_device(settings.device)
        precision = pick_precision(settings.precision, device)
        settings.steps = settings.steps or (100 if device.type == "cuda" else 1)
        settings.warmup = settings.warmup or (20 if device.type == "cuda" else 2)
        unet_config = make_unet_config(settings)
        check(settings, precision)
        settings.output.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written should fail at once
        use_fast_kernels()
        if settings.memory_of:
            print_memory(unet_config, settings, device, precision)
        elif settings.profile:
            profile_step(unet_config, settings, device, precision)
        else:
            compare(unet_config, settings, device, precision)


def make_unet_config(settings: Settings) -> UNetConfig:
    """Return the network's configuration. Raises ValueError for a size that it does not fit."""
    space = load_space(settings.autoencoder)
    unet_config = UNetConfig(
        channels=space.channels, width=settings.width, blocks=settings.blocks, groups=settings.groups,
        multipliers=settings.multipliers or default_multipliers(space.shape(settings.image_size)[-1]))
    multiple = unet_config.size_multiple * space.factor
    if settings.image_size % multiple:
        raise ValueError(f"--image_size must be a multiple of {multiple}, not {settings.image_size}")
    return unet_config


def check(settings: Settings, precision: str) -> None:
    """Raise ValueError for flags that do not go together."""
    if settings.autoencoder and settings.against:
        raise ValueError("--against compares in pixels: leave out --autoencoder")
    if settings.memory_of and settings.memory_of not in trainers(precision):
        raise ValueError(f"--memory_of must be one of: {'; '.join(trainers(precision))}")
    if settings.output.is_dir():
        raise ValueError(f"--output {settings.output} is a folder; name a file in it")


def compare(unet_config: UNetConfig, settings: Settings, device: torch.device, precision: str) -> None:
    """Measure PokeDiff and the baselines, print the tables and write the report."""
    available, names = trainers(precision), choose_trainers(settings, precision)
    precisions = list(dict.fromkeys((precision, "fp32")))

    # Memory comes first: on Linux the peak of a new process includes the memory of the one that started it.
    memory = {name: measure_memory(name, sys.argv[1:]) for name in names}

    # Speed. The machine's rates are measured at both ends, as it may have slept at first.
    rates = {name: machine_rates(device, name) for name in precisions}
    chosen = {name: available[name][0](unet_config, settings, device, available[name][1]) for name in names}
    training = measure_training(chosen, settings)
    sampling = measure_sampling(chosen[names[0]], settings, precisions[:1] if settings.alone else precisions)
    for name, before in rates.items():
        after = machine_rates(device, name)
        rates[name] = Rates(max(before.flops, after.flops), max(before.bytes, after.bytes))

    # What follows from both.
    for name, figures in training.items():
        flops_per_second = 1e9 * figures["gflop_step"] * figures["median"] / settings.batch_size
        figures["matmul_fraction"] = flops_per_second / rates[figures["precision"]].flops
        figures["peak_memory"] = memory[name]

    # Report.
    write_report(settings.output, device=describe_device(device), processor=platform.processor() or platform.machine(),
                 torch=torch.__version__, unet=asdict(unet_config), image_size=settings.image_size,
                 batch_size=settings.batch_size, rounds=settings.rounds, steps=settings.steps, training=training,
                 sampling=sampling, machine={name: asdict(rate) for name, rate in rates.items()})
    for name, rate in rates.items():
        print(f"machine    {rate.flops / 1e12:.2f} TFLOP/s in a {name} matrix product, {rate.bytes / 1e9:.0f} GB/s in "
              f"a copy")
    print(f"\n{training_table(training)}\n\n{sampling_table(sampling)}\n\nwrote {settings.output}")


def choose_trainers(settings: Settings, precision: str) -> list[str]:
    """Return the names of the trainers to measure; the first is the one that also samples."""
    available = trainers(precision)
    left_out = set(PEERS.values()) if settings.compile else {*PEERS.values(), CompiledPokeDiff}
    names = [name for name, (trainer, _) in available.items() if trainer not in left_out]
    if settings.alone:
        names = names[:1]
    for package, peer in PEERS.items() if settings.against else ():
        try:
            importlib.import_module(package.replace("-", "_"))
        except ImportError as error:
            print(f"{package} is left out, it cannot be imported ({first_line(error)}): pip install {package}")
        else:
            names += [name for name, (trainer, _) in available.items() if trainer is peer]
    return names


def print_memory(unet_config: UNetConfig, settings: Settings, device: torch.device, precision: str) -> None:
    """Print the peak memory of a few training steps; `compare` calls this in a process of its own."""
    trainer, trainer_precision = trainers(precision)[settings.memory_of]
    steps = ORDINARY_CALLS + 2 if device.type == "cuda" else 3  # past the recording
    trainer(unet_config, settings, device, trainer_precision).run(steps)
    print(peak_memory())


def profile_step(unet_config: UNetConfig, settings: Settings, device: torch.device, precision: str) -> None:
    """Show where the time of a step of train.py goes; without a CUDA graph, which hides the operations."""
    rates = machine_rates(device, precision)
    trainer = (CompiledPokeDiff if settings.compile else PokeDiff)(unet_config, settings, device, precision)
    trainer.training_step.run_eagerly()
    trainer.run(settings.warmup)
    rows = profile(lambda: trainer.run(1), device, rates)
    write_report(settings.output, device=describe_device(device), precision=precision, rates=asdict(rates),
                 rows=[asdict(row) for row in rows])
    print(f"a step of {settings.batch_size} images of {settings.image_size} x {settings.image_size} on "
          f"{describe_device(device)}, {precision}; floors for {rates.flops / 1e12:.2f} TFLOP/s and "
          f"{rates.bytes / 1e9:.0f} GB/s\n\n{profile_table(rows)}\n\nwrote {settings.output}")


def write_report(path: Path, **content: Any) -> None:
    """Write what was measured as JSON."""
    write_json(path, content)


if __name__ == "__main__":
    main()
