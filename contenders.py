"""What benchmark.py compares: what train.py does, the loop that one writes first, and other trainers' networks in it.

    kind, precision = contenders("bf16")["plain loop, fp32"]
    contender = kind(unet_config, args, device, precision)     # args: the flags of benchmark.py
    seconds, waited = contender(steps=10)
"""

from __future__ import annotations

import argparse
import copy
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import load_codec
from dataset import load_images, make_loader
from denoising import Denoising
from devices import autocast, memory_format
from distributed import Processes
from forward_diffusion import NoiseScheduler
from profiling import synchronize
from training_step import Task, TrainingStep
from unet import UNet, UNetConfig

STEPS = 1_000_000  # of a run that has no end in sight


class Contender:
    """A network, and a loop that trains it on 256 critters, which are in memory and augmented as in training."""

    def __init__(self, unet: UNetConfig, args: argparse.Namespace, device: torch.device, precision: str):
        self.args, self.device, self.precision, self.done = args, device, precision, 0
        self.scheduler, self.codec = NoiseScheduler(), load_codec(args.autoencoder, device)
        images = load_images("critters", args.image_size, labels="none", num_critters=256)
        images, self.prepare = self.codec.prepare(images, args.augment, precision)
        self.shape = self.codec.shape(args.image_size)
        self.batches = iter(make_loader(images, args.batch_size, 0, 0, STEPS))
        self.model = self.build(unet).to(device)

    def build(self, unet: UNetConfig) -> nn.Module:
        return UNet(unet)

    def __call__(self, steps: int) -> tuple[float, float]:
        """Train: the seconds that it took, and those of them in which the host waited for the next images."""
        waited, started = 0.0, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            images, types = next(self.batches)
            waited += time.perf_counter() - asked
            self.step(images, types)
        synchronize(self.device)
        return time.perf_counter() - started, waited

    def step(self, images: torch.Tensor, types: torch.Tensor) -> None:
        raise NotImplementedError


class Ours(Contender):
    """What train.py does."""

    compiled = False

    def __init__(self, unet, args, device, precision):
        super().__init__(unet, args, device, precision)
        self.model.to(memory_format=memory_format(device, training=True))
        denoising = Denoising(self.scheduler, self.prepare, self.shape, device, precision)
        config = SimpleNamespace(batch_size=args.batch_size, grad_accum=1, lr=1e-4, lr_schedule="constant", seed=0,
                                 warmup_steps=0, clip_grad=1.0, ema_decay=0.9999)
        task = Task(self.model, denoising.draw, denoising.loss, lambda average, path: None)
        self.make_step = TrainingStep(task, config, device, precision, Processes(), STEPS)
        self.make_step.begin()
        self.compile_seconds = 0.0
        if self.compiled:
            from torch._inductor import config as inductor

            inductor.force_disable_caches = True  # else it finds what was compiled before
            started = time.perf_counter()
            if not self.make_step.compile(*next(self.batches)):
                raise ValueError("--compile needs a compiler: a C++ one for a CPU, Triton for a GPU")
            self.compile_seconds = time.perf_counter() - started

    def step(self, images, types):
        self.make_step(images, types, self.done)
        self.done += 1


class Compiled(Ours):
    compiled = True


class Plain(Contender):
    """The loop that one writes first: Adam as it comes, the average weight by weight, the loss read at each step."""

    averages = True

    def __init__(self, unet, args, device, precision):
        super().__init__(unet, args, device, precision)
        self.average = copy.deepcopy(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.generator = torch.Generator(device)

    def step(self, images, types):
        u = torch.rand(len(images), 8, generator=self.generator, device=self.device)
        x_0, told = self.prepare(images.to(self.device), u)
        with autocast(self.device, self.precision):
            loss = self.loss(x_0, told)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.averages:
            with torch.no_grad():
                for mean, weight in zip(self.average.parameters(), self.model.parameters()):
                    mean.lerp_(weight, 1e-4)
        self.last_loss = loss.item()

    def loss(self, x_0: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        noise, t = torch.randn_like(x_0), torch.randint(self.scheduler.num_timesteps, (len(x_0),), device=self.device)
        return F.mse_loss(self.predict(self.scheduler.add_noise(x_0, t, noise), t, told), noise)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        return self.model(x_t, t, augmentation=told)


class Diffusers(Plain):
    """diffusers' UNet2DModel, with our widths and as many blocks, in the plain loop; without an average, which its
    train_unconditional.py leaves out unless asked."""

    averages = False

    def build(self, unet):
        from diffusers import UNet2DModel

        levels = len(unet.widths)
        return UNet2DModel(
            sample_size=self.args.image_size, block_out_channels=unet.widths, layers_per_block=unet.blocks,
            down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels,
            norm_num_groups=unet.groups, attention_head_dim=unet.head_width, resnet_time_scale_shift="scale_shift",
        )

    def predict(self, x_t, t, told):
        return self.model(x_t, t).sample


class DenoisingDiffusionPytorch(Plain):
    """denoising-diffusion-pytorch's Unet of our widths, and its loss, with their defaults, in the plain loop; without
    an average, which its Trainer updates in every tenth step."""

    averages = False

    def build(self, unet):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        network = Unet(dim=unet.width, dim_mults=unet.multipliers)
        return GaussianDiffusion(network, image_size=self.args.image_size, timesteps=1000, auto_normalize=False)

    def loss(self, x_0, told):
        return self.model(x_0)


PEERS = {"denoising-diffusion-pytorch": DenoisingDiffusionPytorch, "diffusers": Diffusers}  # by their names on PyPI
YARDSTICK = "plain loop, fp32"


def contenders(precision: str) -> dict[str, tuple[type[Contender], str]]:
    """All there are, by name: what each is, and in which precision. Peers leave it to flags: so in both."""
    found = {f"PokeDiff, {precision}": (Ours, precision), f"PokeDiff, {precision}, compiled": (Compiled, precision),
             "PokeDiff, fp32": (Ours, "fp32"), YARDSTICK: (Plain, "fp32")}
    return found | {f"{package}, {its}": (kind, its) for package, kind in PEERS.items() for its in ("fp32", precision)}
