"""All contenders of the race by their names, with what to install for each.

    contender = make_contender("diffusers", data, folder, device)
    contender.step(number=0, progress=0.0)
    images = contender.draw("ema-ddim-50", count=64, seed=0)                   # uint8 [64, 3, S, S]
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evaluation.data import EvaluationData
from evaluation.measure import sample_labels
from forward_diffusion import NoiseScheduler
from models.pipeline import Pipeline
from models.space import PixelSpace
from tools.race.contender import (
    MANY_STEPS,
    QUICK_GUIDANCE,
    QUICK_LOSS,
    QUICK_NETWORK,
    QUICK_SCHEDULE,
    QUICK_TRAINING,
    Contender,
    planned_steps,
)
from tools.race.peers import DenoisingDiffusionPytorch, Diffusers, Variant
from training.batches import make_loader
from training.config import TrainingConfig
from training.dataset import ImageFolder
from training.distributed import DistEnv
from training.loss import DiffusionLoss
from training.step import TrainingStep, adam_options
from unet import UNet, UNetConfig
from utils.device import memory_format, pick_precision
from utils.errors import first_line
from utils.images import to_uint8
from utils.seeding import seed_from


class PokeDiff(Contender):
    """`train.py --preset quick`, whose epochs fill the time; with the preset's guidance, which doubles the passes.

    Args:
        typed: whether it learns the types of the images, where they have any, as the preset does.
    """

    samplers = ("sde-dpm++-20", "sde-dpm++-50", "dpm++-20")

    def __init__(self, data: EvaluationData, folder: Path, device: torch.device, typed: bool):
        self.data, self.device, self.precision = data, device, pick_precision("auto", device)
        self.class_names = data.class_names if typed else ()
        self.images = ImageFolder.from_array(data.train)
        if self.class_names:
            self.images.labels = data.train_labels.to(torch.uint8)

        # As in train.py.
        config = TrainingConfig(**QUICK_TRAINING)
        torch.manual_seed(seed_from(config.seed, stream="weights"))
        self.net = UNet(UNetConfig(**QUICK_NETWORK, num_types=len(self.class_names)))
        self.net.to(device, memory_format=memory_format(device, training=True))
        self.scheduler = NoiseScheduler(schedule=QUICK_SCHEDULE)
        loss = DiffusionLoss(self.scheduler, PixelSpace(), data.train.shape[-1], self.precision, **QUICK_LOSS)
        optimizer = torch.optim.Adam(self.net.parameters(), **adam_options(config.lr, device))
        self.training_step = TrainingStep(self.net, loss, optimizer, config, device, self.precision, DistEnv(),
                                          MANY_STEPS, guide_step=MANY_STEPS)
        self.training_step.begin()
        self.batches: Iterator | None = None

    def step(self, number: int, progress: float) -> None:
        if self.batches is None:
            self.batches = iter(make_loader(self.images, self.batch_size, 0, first_step=number))
        self.training_step.total_steps = planned_steps(number, progress)
        self.training_step.guide_step = math.ceil(QUICK_GUIDANCE["guide_at"] * self.training_step.total_steps)
        self.training_step(*next(self.batches), number)

    def draw(self, sampler: str, count: int, seed: int) -> torch.Tensor:
        name, steps = sampler.rsplit("-", 1)
        settings = dict(image_size=self.data.train.shape[-1], prediction=QUICK_LOSS["prediction"])
        pipeline = Pipeline(self.training_step.ema, self.scheduler, PixelSpace(), settings, self.class_names,
                            self.device, self.precision, self.training_step.earlier)
        labels = sample_labels(self.data, count, seed) if self.class_names else None
        guidance = 1.0 if self.training_step.earlier is None else QUICK_GUIDANCE["guidance"]
        return to_uint8(pipeline.sample(range(seed, seed + count), labels=labels, guidance=guidance, sampler=name,
                                        steps=int(steps)))

    def state(self) -> dict[str, Any]:
        return self.training_step.ema_state() | self.training_step.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.training_step.load_state("state.pt", state)


class Entry(NamedTuple):
    """A line of the race: title, how it is made, and the package it needs, as PyPI and as Python call it."""

    title: str
    contender: type[Contender]
    options: dict[str, Any]
    package: str = ""
    module: str = ""


CONTENDERS = {
    "pokediff": Entry("PokeDiff, quick preset, guided", PokeDiff, dict(typed=True)),
    "pokediff-untyped": Entry("PokeDiff, quick preset, guided, without types", PokeDiff, dict(typed=False)),
}
for name, (peer, module) in {"denoising-diffusion-pytorch": (DenoisingDiffusionPytorch, "denoising_diffusion_pytorch"),
                             "diffusers": (Diffusers, "diffusers")}.items():
    CONTENDERS |= {
        name: Entry(f"{name}, its own settings", peer, dict(variant=Variant()), name, module),
        f"{name}-ours": Entry(f"{name}, our precision, batch and rate", peer, dict(variant=Variant(ours=True)), name,
                              module),
        f"{name}-small": Entry(f"{name}, also our widths", peer, dict(variant=Variant(ours=True, small=True)), name,
                               module),
    }


def make_contender(name: str, data: EvaluationData, folder: Path, device: torch.device) -> Contender:
    """Return a contender before its first step.

    Args:
        data: the images to train on are `data.train`.
        folder: for files that it needs.
    """
    entry = CONTENDERS[name]
    return entry.contender(data, folder, device, **entry.options)


def installed(names: Sequence[str]) -> list[str]:
    """Return the contenders whose package can be imported; name the others."""
    found = []
    for name in names:
        entry = CONTENDERS[name]
        try:
            if entry.module:
                importlib.import_module(entry.module)
            found.append(name)
        except ImportError as error:
            print(f"{name} is left out, its package cannot be imported ({first_line(error)}): pip install "
                  f"{entry.package}")
    return found
