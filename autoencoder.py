"""Train an autoencoder: from pictures to a few numbers each, and back. A diffusion can then learn those.

    python autoencoder.py --preset quick                      # critters of 128 x 128, in minutes, on a CPU
    python autoencoder.py --data my_pictures --image_size 256 --run_name my_autoencoder
    python train.py --data my_pictures --image_size 256 --autoencoder checkpoints/my_autoencoder/final_model.pt

Nothing is pre-trained: it learns from the same pictures as the diffusion. The network is in latents.py, the loop in
training.py. Pictures beside their reconstructions, and how near they come in metrics.csv, go to outputs/autoencoder/,
weights to checkpoints/autoencoder/.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image
from tqdm import tqdm

from augmentation import augment
from dataset import load_images
from devices import autocast, memory_format
from forward_diffusion import seed_from
from latents import Autoencoder, AutoencoderConfig, psnr
from runs import flag, with_default
from training import Training, TrainingConfig, command
from training_step import Task
from unet import count_parameters

FRESH_SEED = 4_000_003  # of critters that no autoencoder was trained on
MOST_MEASURED = 100  # pictures


@dataclass
class Config(TrainingConfig):
    """Every setting of an autoencoder's training, with those of training.py."""

    image_size: int = flag(128, "side of the images, in pixels; a multiple of 4, that is, of 2 to the power of the "
                                "number of levels", most=4096)
    epochs: int = with_default(TrainingConfig, "epochs", 300)
    batch_size: int = with_default(TrainingConfig, "batch_size", 8)
    lr: float = with_default(TrainingConfig, "lr", 2e-3)
    lr_schedule: str = with_default(TrainingConfig, "lr_schedule", "cosine")
    warmup_steps: int = with_default(TrainingConfig, "warmup_steps", 100)
    ema_decay: float = with_default(TrainingConfig, "ema_decay", 0.999)
    run_name: str = flag("autoencoder", "sub-folder of outputs/ and checkpoints/ for this run")

    channels: int = flag(4, "numbers of the latents at each position", above=0)
    width: int = flag(32, "channels at the first level, which has half of the picture's resolution", above=0)
    multipliers: tuple[int, ...] = flag((1, 2), "of the width, one a level; each level halves the resolution")
    edge_weight: float = flag(1.0, "how much the edges count beside the colours", least=0)
    kl_weight: float = flag(5e-3, "how strongly the latents are held near a standard normal distribution", least=0)


PRESETS = {
    "reference": {},
    # Critters at 128 x 128 on a CPU, in time for `train.py --preset latents`.
    "quick": dict(data="critters", augment="flip", epochs=10, batch_size=4, sample_every=5),
}


def main() -> None:
    command(Config, PRESETS, "Train an autoencoder on a folder of images.", train)


def train(config: Config, checkpoint: dict | None) -> None:
    """Teach an autoencoder to give pictures back."""
    autoencoder_config = AutoencoderConfig(width=config.width, multipliers=config.multipliers, channels=config.channels)
    factor = autoencoder_config.factor
    if config.image_size % factor or config.image_size < 16:
        raise ValueError(f"--image_size must be a multiple of {factor} that is at least 16, for this autoencoder; "
                         f"{config.image_size} is not")
    training = Training(config, checkpoint)
    device, precision = training.device, training.precision
    torch.manual_seed(seed_from(config.seed, stream="weights"))
    model = Autoencoder(autoencoder_config).to(device, memory_format=memory_format(device, training=True))
    print(f"network    {count_parameters(model):,} parameters; 3 x {config.image_size} x {config.image_size} to "
          f"{' x '.join(map(str, model.shape(config.image_size)))} and back")
    coding = Coding(model.shape(config.image_size), device, precision, config.augment, config.edge_weight,
                    config.kl_weight)
    pictures, kind = pictures_to_measure(training)
    print(f"measured   on {len(pictures)} {kind}")

    def reconstruct(average: Autoencoder, originals: torch.Tensor) -> torch.Tensor:
        parts = []
        for part in originals.split(16):
            with autocast(device, precision):
                parts.append(average.decode(average.encode(part.to(device))).cpu())
        return torch.cat(parts)

    def measure(average: Autoencoder) -> dict[str, float]:
        images = reconstruct(average, pictures)
        found = dict(psnr=psnr(images, pictures).mean().item(), ssim=ssim(images, pictures).mean().item())
        tqdm.write(f"{kind} come back with a PSNR of {found['psnr']:.2f} dB, and an SSIM of {found['ssim']:.4f}")
        return found

    def picture(average: Autoencoder, path: Path) -> None:
        """Pictures side by side with what comes back of them."""
        originals = pictures[: config.num_samples]
        pairs = torch.stack([originals, reconstruct(average, originals)], dim=1).flatten(0, 1)
        save_image(pairs, path, nrow=8, normalize=True, value_range=(-1, 1), pad_value=1)

    content = dict(autoencoder=dict(config=asdict(autoencoder_config)))
    training.run(Task(
        model, coding.draw, coding.loss, picture, content, measures=("psnr", "ssim"), measure=measure,
        shows="pictures beside their reconstructions",
        next_command="to learn its latents: python train.py --autoencoder",
    ))


@dataclass
class Coding:
    """The random part of a training step, and its loss; see the flags above for what the settings mean."""

    shape: tuple[int, int, int]  # of the latents of a picture
    device: torch.device
    precision: str
    augment: str = "full"
    edge_weight: float = 1.0
    kl_weight: float = 5e-3

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """For each image: how to augment it [B, 8], and the noise of its latents [B, *shape]."""
        options = dict(generator=generator, device=generator.device)
        return torch.rand(batch_size, 8, **options), torch.randn(batch_size, *self.shape, **options)

    def loss(self, network: nn.Module, images: torch.Tensor, types: torch.Tensor, u: torch.Tensor,
             noise: torch.Tensor) -> torch.Tensor:
        """How far the pictures come back from where they were, plus the KL term, for images uint8 [B, 3, S, S].

        The first is the mean absolute error of the colours, plus that of the differences between neighbours, which are
        large at edges and nothing within an area of one colour; DIFFUSION_THEORY.md, section 14, has the measurements
        that speak for it. The second is the KL divergence of the posterior from a standard normal distribution (Kingma
        & Welling 2014, appendix B), for each number.
        """
        x, _ = augment(images, mode=self.augment, u=u)
        with autocast(self.device, self.precision):
            output, mean, log_variance = network(x, noise)
        error = output.float() - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return error.abs().mean() + self.edge_weight * edges + self.kl_weight * kl


def pictures_to_measure(training: Training) -> tuple[torch.Tensor, str]:
    """Up to 100 pictures that are not trained on, [N, 3, S, S] in [-1, 1], and what they are: those that --holdout
    keeps aside, or fresh critters; else some of the training's."""
    config = training.config
    if training.held_out:
        every = math.ceil(len(training.held_out) / MOST_MEASURED)  # spread over all, which are in order of their names
        aside = set(training.held_out[::every])
        images, kind = load_images(config.data, config.image_size, labels="none", keep=lambda name: name in aside,
                                   num_critters=config.num_critters, seed=config.seed), "pictures kept aside"
    elif config.data == "critters":
        images = load_images("critters", config.image_size, labels="none", num_critters=MOST_MEASURED, seed=FRESH_SEED)
        kind = "fresh critters"
    else:
        images, kind = training.dataset, "pictures of the training's own (--holdout keeps some aside)"
    some = torch.linspace(0, len(images) - 1, min(len(images), MOST_MEASURED)).round().long().tolist()
    return images.__getitems__(some)[0].float() / 127.5 - 1, kind


def ssim(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image [B, 3, H, W] in [-1, 1] to its original, up to 1 (Wang et al. 2004).

    With their Gaussian window of 11 x 11 pixels and deviation 1.5, on each colour channel.
    """
    window = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).to(images)

    def blur(x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, 1, 11))
        return F.conv2d(x, window.view(1, 1, 11, 1)).unflatten(0, images.shape[:2])

    x, y = (images + 1) / 2, (originals + 1) / 2
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c_1, c_2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c_1) * (2 * covariance + c_2)
                  / ((mean_x**2 + mean_y**2 + c_1) * (variance_x + variance_y + c_2)))
    return similarity.mean(dim=(1, 2, 3, 4))


if __name__ == "__main__":
    main()
