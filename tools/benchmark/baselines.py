"""The training loops that the benchmark compares: train.py's, a plain loop, and other packages' networks in that loop.

    trainer_class, precision = trainers("bf16")["plain loop, fp32"]
    trainer = trainer_class(unet_config, settings, device, precision)
    seconds, waited = trainer.run(steps=10)
"""

from __future__ import annotations

import copy
import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from forward_diffusion import NoiseScheduler
from models.space import load_space
from tools.benchmark.roofline import synchronize
from training.augment import AUGMENT_RAND_DIM
from training.batches import make_loader
from training.dataset import encode_dataset, load_images
from training.distributed import DistEnv
from training.loss import DiffusionLoss, to_x_0
from training.step import TrainingStep, adam_options
from unet import UNet, UNetConfig
from utils.device import autocast, memory_format

TOTAL_STEPS = 1_000_000  # more than any measurement makes
NUM_IMAGES = 256


class Trainer:
    """A network and a loop that trains it, on critters in memory that are augmented as in training.

    Args:
        settings: those of the benchmark's command line.
    """

    def __init__(self, unet_config: UNetConfig, settings: Any, device: torch.device, precision: str):
        self.settings, self.device, self.precision = settings, device, precision
        self.scheduler, self.space = NoiseScheduler(), load_space(settings.autoencoder, device)
        self.shape = self.space.shape(settings.image_size)
        images = load_images("critters", settings.image_size, label_source="none", num_critters=NUM_IMAGES)
        images = encode_dataset(images, self.space, settings.augment, precision)
        self.batches = iter(make_loader(images, settings.batch_size, seed=0, last_step=TOTAL_STEPS,
                                        pin_memory=device.type == "cuda"))
        self.net = self.build(unet_config).to(device)

    def build(self, unet_config: UNetConfig) -> nn.Module:
        return UNet(unet_config)

    def run(self, steps: int) -> tuple[float, float]:
        """Make `steps` steps; return the seconds, and those of them in which the host waited for images."""
        waited, started = 0.0, time.perf_counter()
        for _ in range(steps):
            requested = time.perf_counter()
            images, labels = next(self.batches)
            waited += time.perf_counter() - requested
            self.step(images, labels)
        synchronize(self.device)
        return time.perf_counter() - started, waited

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        raise NotImplementedError


class PokeDiff(Trainer):
    """The step of train.py."""

    use_compile = False

    def __init__(self, unet_config: UNetConfig, settings: Any, device: torch.device, precision: str):
        super().__init__(unet_config, settings, device, precision)
        self.net.to(memory_format=memory_format(device, training=True))
        config = SimpleNamespace(batch_size=settings.batch_size, grad_accum=1, lr=1e-4, lr_schedule="constant", seed=0,
                                 warmup_steps=0, clip_grad=1.0, ema_decay=0.9999)
        loss = DiffusionLoss(self.scheduler, self.space, settings.image_size, precision, augment=settings.augment)
        optimizer = torch.optim.Adam(self.net.parameters(), **adam_options(config.lr, device))
        self.training_step = TrainingStep(self.net, loss, optimizer, config, device, precision, DistEnv(), TOTAL_STEPS)
        self.training_step.begin()
        self.step_number, self.compile_seconds = 0, 0.0
        if self.use_compile:
            self._compile()

    def _compile(self) -> None:
        from torch._inductor import config as inductor

        inductor.force_disable_caches = True  # or it would find what an earlier call compiled
        started = time.perf_counter()
        if not self.training_step.compile(*next(self.batches)):
            raise ValueError("--compile needs a compiler: a C++ compiler for a CPU, Triton for a GPU")
        self.compile_seconds = time.perf_counter() - started

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.training_step(images, labels, self.step_number)
        self.step_number += 1


class CompiledPokeDiff(PokeDiff):
    """The step of train.py with --compile."""

    use_compile = True


class PlainLoop(Trainer):
    """A first version of a training loop: default Adam, an EMA weight by weight, the loss read at each step."""

    has_ema = True

    def __init__(self, unet_config: UNetConfig, settings: Any, device: torch.device, precision: str):
        super().__init__(unet_config, settings, device, precision)
        self.ema = copy.deepcopy(self.net)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-4)
        self.generator = torch.Generator(device)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        augment_rand = torch.rand(len(images), AUGMENT_RAND_DIM, generator=self.generator, device=self.device)
        x_0, augment_labels = to_x_0(images.to(self.device), augment_rand, self.settings.augment, self.space,
                                     self.precision)
        with autocast(self.device, self.precision):
            loss = self.loss(x_0, augment_labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        if self.has_ema:
            with torch.no_grad():
                for mean, weight in zip(self.ema.parameters(), self.net.parameters()):
                    mean.lerp_(weight, 1e-4)
        self.last_loss = loss.item()

    def loss(self, x_0: torch.Tensor, augment_labels: torch.Tensor) -> torch.Tensor:
        noise, t = torch.randn_like(x_0), torch.randint(self.scheduler.num_timesteps, (len(x_0),), device=self.device)
        return F.mse_loss(self.predict(self.scheduler.add_noise(x_0, t, noise), t, augment_labels), noise)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, augment_labels: torch.Tensor) -> torch.Tensor:
        return self.net(x_t, t, augment_labels=augment_labels)


class Diffusers(PlainLoop):
    """diffusers' UNet2DModel in the plain loop, with our widths and as many blocks.

    Without an EMA, which its train_unconditional.py leaves out by default.
    """

    has_ema = False

    def build(self, unet_config: UNetConfig) -> nn.Module:
        from diffusers import UNet2DModel

        levels = len(unet_config.widths)
        return UNet2DModel(
            sample_size=self.settings.image_size, block_out_channels=unet_config.widths,
            layers_per_block=unet_config.blocks, down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels, norm_num_groups=unet_config.groups,
            attention_head_dim=unet_config.head_width, resnet_time_scale_shift="scale_shift",
        )

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, augment_labels: torch.Tensor) -> torch.Tensor:
        return self.net(x_t, t).sample


class DenoisingDiffusionPytorch(PlainLoop):
    """denoising-diffusion-pytorch's Unet of our widths and its loss, with their defaults, in the plain loop.

    Without an EMA, which its Trainer updates in every tenth step.
    """

    has_ema = False

    def build(self, unet_config: UNetConfig) -> nn.Module:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        unet = Unet(dim=unet_config.width, dim_mults=unet_config.multipliers)
        return GaussianDiffusion(unet, image_size=self.settings.image_size, timesteps=1000, auto_normalize=False)

    def loss(self, x_0: torch.Tensor, augment_labels: torch.Tensor) -> torch.Tensor:
        return self.net(x_0)


PEERS = {"denoising-diffusion-pytorch": DenoisingDiffusionPytorch, "diffusers": Diffusers}  # by their names on PyPI
PLAIN = "plain loop, fp32"  # what the others are compared with


def trainers(precision: str) -> dict[str, tuple[type[Trainer], str]]:
    """Return all trainers by name: class and precision. Peers leave the precision to a flag, so they run in both."""
    ours = {f"PokeDiff, {precision}": (PokeDiff, precision),
            f"PokeDiff, {precision}, compiled": (CompiledPokeDiff, precision),
            "PokeDiff, fp32": (PokeDiff, "fp32"), PLAIN: (PlainLoop, "fp32")}
    peers = {f"{package}, {peer_precision}": (peer, peer_precision)
             for package, peer in PEERS.items() for peer_precision in ("fp32", precision)}
    return ours | peers
