"""Training of the autoencoder, on the images that a diffusion will learn, in the same loop.

`python -m tools.train_autoencoder` is the command around it; `train.py --autoencoder own` makes it the first stage of
its run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from models.autoencoder import Autoencoder, AutoencoderConfig
from training.config import TrainingConfig
from training.distributed import DistEnv
from training.loop import Stage, training_loop
from training.loss import AutoencoderLoss
from training.run_images import images_to_measure, load_run_images
from training.step import TrainingStep, adam_options
from training.timetable import Timetable
from unet import count_parameters
from utils.cli import setting, with_default
from utils.device import autocast, memory_format, pick_precision, use_fast_kernels
from utils.images import image_grid, psnr, ssim, to_uint8
from utils.seeding import seed_from

PART = 16  # images that are reconstructed at a time


@dataclass
class AutoencoderTrainingConfig(TrainingConfig):
    """Every setting of an autoencoder's training."""

    BEFORE: ClassVar[dict[str, Any]] = dict(mean_colours=False, latent_noise=0.0)

    image_size: int = setting(128, "side of the images in pixels; a multiple of 4, that is, of 2 to the power of the "
                                   "number of levels", most=4096)
    epochs: int = with_default(TrainingConfig, "epochs", 300)
    batch_size: int = with_default(TrainingConfig, "batch_size", 8)
    grad_accum: int = setting(1, "micro-batches per step (gradient accumulation): less memory; with --latent_noise "
                                 "each scales that noise by its own latents", above=0)
    lr: float = with_default(TrainingConfig, "lr", 2e-3)
    lr_schedule: str = with_default(TrainingConfig, "lr_schedule", "cosine")
    warmup_steps: int = with_default(TrainingConfig, "warmup_steps", 100)
    ema_decay: float = with_default(TrainingConfig, "ema_decay", 0.999)
    run_name: str = setting("autoencoder", "sub-folder of outputs/ and checkpoints/ for this run")

    channels: int = setting(6, "channels of the latents", above=0)
    width: int = setting(32, "channels at the first level, which has half of the image's resolution", above=0)
    multipliers: tuple[int, ...] = setting((1, 2), "of the width, one per level; each level halves the resolution")
    mean_colours: bool = setting(True, "let the first three channels be the mean colours of each square of pixels; "
                                       "three levels or more learn no colours without")
    edge_weight: float = setting(1.0, "weight of the edges beside the colours", least=0)
    kl_weight: float = setting(1e-3, "weight of the KL divergence of the latents from a standard normal distribution",
                               least=0)
    latent_noise: float = setting(0.4, "largest deviation of noise that is added to latents before they are decoded, "
                                       "as they would be normalised: the decoder learns to ignore small errors of "
                                       "samples", least=0)

    @property
    def network(self) -> AutoencoderConfig:
        """The size of the autoencoder."""
        return AutoencoderConfig(width=self.width, multipliers=self.multipliers, channels=self.channels,
                                 mean_colours=self.mean_colours)


def train_autoencoder(config: AutoencoderTrainingConfig, checkpoint: dict[str, Any] | None, dist: DistEnv,
                      stage: Stage | None = None) -> Path:
    """Train an autoencoder; return the path of the final checkpoint.

    Raises:
        ValueError: for settings that cannot be, and as `training_loop` does.
    """
    # Device.
    device = dist.pick_device(config.device)
    precision = pick_precision(config.precision, device)
    use_fast_kernels()
    dist.rank_slice(config.batch_size, config.grad_accum)  # can the batch be divided? before the data is read

    # Data.
    network = config.network
    if config.image_size % network.factor or config.image_size < 16:
        raise ValueError(f"--image_size must be a multiple of {network.factor} that is at least 16, for this "
                         f"autoencoder; {config.image_size} is not")
    run_images = load_run_images(config, checkpoint)

    # Model and loss.
    torch.manual_seed(seed_from(config.seed, stream="weights"))
    net = Autoencoder(network).to(device, memory_format=memory_format(device, training=True))
    latent_shape = net.latent_shape(config.image_size)
    print(f"network    {count_parameters(net):,} parameters; 3 x {config.image_size} x {config.image_size} to "
          f"{' x '.join(map(str, latent_shape))} and back")
    loss = AutoencoderLoss(latent_shape, precision, augment=config.augment, edge_weight=config.edge_weight,
                           kl_weight=config.kl_weight, latent_noise=config.latent_noise)

    # Optimizer and step.
    optimizer = torch.optim.Adam(net.parameters(), **adam_options(config.lr, device))
    total_steps = Timetable(config, len(run_images.dataset)).total_steps
    step = TrainingStep(net, loss, optimizer, config, device, precision, dist, total_steps)

    # Loop, measured on images that are not trained on.
    originals, origin = images_to_measure(config, run_images)
    print(f"measured   on {len(originals)} {origin}")

    def measure() -> dict[str, float]:
        reconstructed = reconstruct(step.ema, originals, device, precision)
        figures = dict(psnr=psnr(reconstructed, originals).mean().item(),
                       ssim=ssim(reconstructed, originals).mean().item())
        tqdm.write(f"reconstructed {origin}: PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.4f}")
        return figures

    def draw_grid(path: Path) -> None:
        shown = originals[: config.num_samples]
        pairs = torch.stack([shown, reconstruct(step.ema, shown, device, precision)], dim=1).flatten(0, 1)
        image_grid(to_uint8(pairs), columns=8).save(path)

    content = dict(autoencoder=dict(config=asdict(network)))
    return training_loop(config, run_images, step, draw_grid, content, checkpoint, measure, ("psnr", "ssim"), stage)


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, images: torch.Tensor, device: torch.device, precision: str) -> torch.Tensor:
    """Encode and decode images [N, 3, S, S] in [-1, 1], on the CPU in and out."""
    parts = []
    for part in images.split(PART):
        with autocast(device, precision):
            parts.append(autoencoder.decode(autoencoder.encode(part.to(device))).cpu())
    return torch.cat(parts)
