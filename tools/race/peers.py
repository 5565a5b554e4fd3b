"""The other packages of the race: denoising-diffusion-pytorch and diffusers, in their own settings and in ours."""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from evaluation.data import EvaluationData
from tools.race.contender import MANY_STEPS, QUICK_NETWORK, Contender, planned_steps
from training.config import TrainingConfig
from training.step import learning_rate
from utils.device import autocast, pick_precision
from utils.images import save_images, to_uint8
from utils.seeding import seed_from


@dataclass(frozen=True)
class Variant:
    """How another package runs.

    Attributes:
        ours: in our precision (bfloat16 where the device computes in it), batch and learning rate, see OURS.
        small: also with a network of the quick preset's widths.
    """

    ours: bool = False
    small: bool = False


# The quick preset's, but for the rate, which is 2.5e-3 there: these networks are larger and predict eps.
OURS = TrainingConfig(batch_size=16, lr=1e-3, lr_schedule="cosine", warmup_steps=100)



class DenoisingDiffusionPytorch(Contender):
    """denoising-diffusion-pytorch's own Trainer, in the settings of its README.

    Unet of width 64 and multipliers 1 2 4 8, 2 x 32 images per step, Adam at 8e-5, EMA 0.995; sampling by its DDIM.
    Mixed precision, which the README turns on, is float16 there and needs a GPU.
    """

    samplers = ("ema-ddim-50-eta-0", "ema-ddim-50-eta-1", "last-ddim-50-eta-0", "last-ddim-50-eta-1")

    def __init__(self, data: EvaluationData, folder: Path, device: torch.device, variant: Variant):
        if device.type == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        from accelerate.state import AcceleratorState
        from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier contender may have had another precision
        self.device, self.variant, self.fits_time = device, variant, variant.ours
        self.precision = pick_precision("auto", device) if variant.ours else "fp32"
        torch.manual_seed(0)
        size = dict(dim=QUICK_NETWORK["width"], dim_mults=QUICK_NETWORK["multipliers"]) if variant.small else dict(
            dim=64, dim_mults=(1, 2, 4, 8))
        diffusion = GaussianDiffusion(Unet(**size, flash_attn=True), image_size=data.train.shape[-1],
                                      timesteps=1000, sampling_timesteps=250)
        images = save_images(data.train, folder / "images")
        batch = dict(train_batch_size=OURS.batch_size, gradient_accumulate_every=1, train_lr=OURS.lr) if variant.ours \
            else dict(train_batch_size=32, gradient_accumulate_every=2, train_lr=8e-5)
        mixed = dict(amp=True, mixed_precision_type=self.precision) if self.precision != "fp32" else {}
        with quiet():
            self.trainer = Trainer(diffusion, str(images), **batch, **mixed, ema_decay=0.995, calculate_fid=False,
                                   results_folder=str(folder / "trainer"), save_and_sample_every=MANY_STEPS)
        self.batch_size = batch["train_batch_size"] * batch["gradient_accumulate_every"]
        self.net = diffusion.model

    def step(self, number: int, progress: float) -> None:
        trainer = self.trainer
        trainer.step, trainer.train_num_steps = number, number + 1
        if self.variant.ours:
            for group in trainer.opt.param_groups:
                group["lr"] = learning_rate(OURS, number, planned_steps(number, progress))
        with quiet():
            trainer.train()

    def draw(self, sampler: str, count: int, seed: int) -> torch.Tensor:
        weights, _, steps, _, eta = sampler.split("-")
        model = self.trainer.ema.ema_model if weights == "ema" else self.trainer.accelerator.unwrap_model(
            self.trainer.model)
        model.sampling_timesteps, model.ddim_sampling_eta, model.is_ddim_sampling = int(steps), float(eta), True
        torch.manual_seed(seed)
        model.eval()
        with quiet(), autocast(self.device, self.precision):
            return to_uint8(2 * model.sample(batch_size=count).float().cpu() - 1)

    def state(self) -> dict[str, Any]:
        trainer = self.trainer
        return dict(model=trainer.accelerator.get_state_dict(trainer.model), optimizer=trainer.opt.state_dict(),
                    ema=trainer.ema.state_dict())

    def load_state(self, state: dict[str, Any]) -> None:
        self.trainer.accelerator.unwrap_model(self.trainer.model).load_state_dict(state["model"])
        self.trainer.opt.load_state_dict(state["optimizer"])
        self.trainer.ema.load_state_dict(state["ema"])


class Diffusers(Contender):
    """diffusers' example train_unconditional, in its default settings and those of the command that it documents.

    The example is no part of the package, so its settings stand here: UNet2DModel of six levels, 16 images per step
    with random flips, AdamW (betas 0.95 and 0.999, weight decay 1e-6) at 1e-4 with a warm-up of 500 steps and a cosine
    over 100 epochs, gradients clipped to 1, EMA 0.9999 with a warm-up of power 3/4, eps on the linear schedule.
    """

    samplers = ("ema-ddim-50", "ema-sde-dpmsolver++-20", "ema-dpmsolver++-20", "last-ddim-50",
                "last-sde-dpmsolver++-20", "last-dpmsolver++-20")

    def __init__(self, data: EvaluationData, folder: Path, device: torch.device, variant: Variant):
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        self.device, self.variant, self.fits_time = device, variant, variant.ours
        self.precision = pick_precision("auto", device) if variant.ours else "fp32"
        self.images = data.train
        torch.manual_seed(0)
        if variant.small:
            widths = tuple(QUICK_NETWORK["width"] * factor for factor in QUICK_NETWORK["multipliers"])
            size = dict(block_out_channels=widths, layers_per_block=QUICK_NETWORK["blocks"],
                        norm_num_groups=QUICK_NETWORK["groups"], down_block_types=("DownBlock2D",) * len(widths),
                        up_block_types=("UpBlock2D",) * len(widths))
        else:
            down, up = ["DownBlock2D"] * 6, ["UpBlock2D"] * 6
            down[4], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
            size = dict(block_out_channels=(128, 128, 256, 256, 512, 512), layers_per_block=2,
                        down_block_types=tuple(down), up_block_types=tuple(up))
        self.net = UNet2DModel(sample_size=data.train.shape[-1], in_channels=3, out_channels=3, **size).to(device)
        self.ema = EMAModel(self.net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.ema.to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        epoch = math.ceil(len(self.images) / self.batch_size)
        self.planned = TrainingConfig(lr=1e-4, lr_schedule="cosine", warmup_steps=500), 100 * epoch

    def step(self, number: int, progress: float) -> None:
        generator = torch.Generator().manual_seed(seed_from(number, stream="diffusers"))
        index = torch.randint(len(self.images), (self.batch_size,), generator=generator)
        x_0 = self.images[index].float() / 127.5 - 1
        is_flipped = torch.rand(len(x_0), 1, 1, 1, generator=generator) < 0.5
        x_0 = torch.where(is_flipped, x_0.flip(-1), x_0).to(self.device)
        noise = torch.randn(x_0.shape, generator=generator).to(self.device)
        t = torch.randint(1000, (len(x_0),), generator=generator).to(self.device)

        config, total = (OURS, planned_steps(number, progress)) if self.variant.ours else self.planned
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, number, total)
        self.net.train()
        with autocast(self.device, self.precision):
            predicted = self.net(self.scheduler.add_noise(x_0, noise, t), t).sample
        F.mse_loss(predicted.float(), noise).backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.net.parameters())

    @torch.no_grad()
    def draw(self, sampler: str, count: int, seed: int) -> torch.Tensor:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        weights, rest = sampler.split("-", 1)
        name, steps = rest.rsplit("-", 1)
        options = {} if name == "ddim" else dict(algorithm_type=name)
        scheduler_class = DDIMScheduler if name == "ddim" else DPMSolverMultistepScheduler
        generator = torch.Generator(self.device).manual_seed(seed)
        if weights == "ema":
            self.ema.store(self.net.parameters())
            self.ema.copy_to(self.net.parameters())
        self.net.eval()
        scheduler = scheduler_class.from_config(self.scheduler.config, **options)
        scheduler.set_timesteps(int(steps))
        x = torch.randn(count, *self.images.shape[1:], generator=generator, device=self.device)
        for t in scheduler.timesteps:
            with autocast(self.device, self.precision):
                output = self.net(x, t.to(self.device)).sample.float()
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        if weights == "ema":
            self.ema.restore(self.net.parameters())
        return to_uint8(x.cpu())

    def state(self) -> dict[str, Any]:
        return dict(model=self.net.state_dict(), optimizer=self.optimizer.state_dict(), ema=self.ema.state_dict())

    def load_state(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and messages of another package from the screen."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
            warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
