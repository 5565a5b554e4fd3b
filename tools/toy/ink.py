"""A drop of ink in the plane: a data set whose images are single points, learned with the parts of every training.

    ink = load_ink("", 2000, seed=0)
    scheduler = NoiseScheduler(schedule=SCHEDULE)
    network, loss = train(ink, scheduler, steps=2500, seed=0)
    points = sample(network, scheduler, torch.randn(2000, 2, 1, 1), prediction=PREDICTION, clip=ink.reach)

A point is an image of one pixel with two channels, x and y. So the noise schedule, the loss, the training step and the
samplers need not know that it is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from critters import draw_critter
from forward_diffusion import NoiseScheduler
from models.space import PixelSpace
from reverse_diffusion import sample, trailing_timesteps
from training.config import TrainingConfig
from training.distributed import DistEnv
from training.loss import DiffusionLoss
from training.step import TrainingStep, adam_options
from unet import timestep_embedding
from utils.errors import UserError
from utils.images import decode_error, decode_image
from utils.seeding import seed_from

CRITTER = 14  # index of the critter that is drawn without an image
IMAGE_SIZE = 256  # of the drawing
DARK = 0.35  # a pixel is ink in this part of the range from the darkest to the lightest
SCHEDULE, PREDICTION = "cosine", "v"  # as in the quick preset, and for its reasons: a short training
BATCH_SIZE, LEARNING_RATE = 1024, 1e-2
COPY = 1e-3  # a point that is nearer than this to one of the ink's is a copy of it


@dataclass
class Ink:
    """Ink molecules, and the drawing that they come from.

    Both are normalised, as latents are, to mean 0 and variance 1.

    Attributes:
        points: float32 [N, 2, 1, 1].
        pixels: the centres of all dark pixels of the drawing, float32 [M, 2].
        pixel: the side of a pixel.
        reach: no coordinate is beyond plus and minus this number.
    """

    points: torch.Tensor
    pixels: torch.Tensor
    pixel: float
    reach: float


def load_ink(path: str, count: int, seed: int) -> Ink:
    """Draw `count` points at random from the dark pixels of an image file, or of a critter for the path "".

    Raises:
        UserError: for a file that cannot be read as an image, or an image of one brightness.
    """
    if path:
        try:
            image = Image.fromarray(decode_image(path, IMAGE_SIZE).transpose(1, 2, 0))
        except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
            raise UserError(f"cannot read {path}: {decode_error(error)}; choose another image") from error
    else:
        image = draw_critter(CRITTER, IMAGE_SIZE)[0]
    grey = np.asarray(image.convert("L")).astype(float)
    row, column = np.nonzero(grey < grey.min() + DARK * (grey.max() - grey.min()))
    if len(row) < 2:
        raise UserError(f"{path} has hardly any dark pixels: choose a dark drawing on a light ground")

    # Pixels as squares of the plane, y upwards; each point is anywhere in its pixel.
    rng = np.random.default_rng(seed)
    pixels = np.stack([column + 0.5, IMAGE_SIZE - row - 0.5], axis=1)
    points = pixels[rng.choice(len(pixels), count, replace=len(pixels) < count)] + rng.uniform(-0.5, 0.5, (count, 2))
    centre, scale = pixels.mean(axis=0), float(pixels.var(axis=0).mean() ** 0.5)
    points, pixels = ((torch.tensor((p - centre) / scale, dtype=torch.float32)) for p in (points, pixels))
    reach = pixels.abs().max().item() + 0.5 / scale
    return Ink(points[:, :, None, None], pixels, 1 / scale, reach)


# ---------------------------------------------------------------------------------------------------------------------
# learning


class PointSpace(PixelSpace):
    """The space of points: two channels, x and y."""

    channels = 2


class PointNet(nn.Module):
    """Small network for points: waves of both coordinates, then residual blocks that the timestep turns up and down.

    A network of a plain coordinate learns coarse shapes first and fine ones hardly; random waves give it the fine ones
    (Tancik et al. 2020). The timestep enters through the U-Net's own embedding.
    """

    def __init__(self, width: int = 64, blocks: int = 3, waves: int = 64, frequency: float = 8.0):
        super().__init__()
        self.width = width
        self.register_buffer("frequencies", frequency * torch.randn(2, waves))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.first = nn.Linear(2 + 2 * waves, width)
        self.scales = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.last = nn.Linear(width, 2)
        for layer in (*self.outer, self.last):  # zero-init, as in the U-Net
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None, *,
                augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the prediction for points x_t [B, 2, 1, 1] at timesteps t [B]; points have no labels."""
        x, emb = x_t.flatten(1), self.time(timestep_embedding(t, self.width))
        waves = x @ self.frequencies
        h = self.first(torch.cat([x, waves.sin(), waves.cos()], dim=1))
        for scale, inner, outer in zip(self.scales, self.inner, self.outer):
            h = h + outer(nn.functional.silu(inner(h) * (1 + scale(emb))))
        return self.last(h).view_as(x_t)


def train(ink: Ink, scheduler: NoiseScheduler, steps: int, seed: int) -> tuple[nn.Module, float]:
    """Train a `PointNet` to predict v, on the CPU, with the loss and the step of every training.

    Returns:
        The network with averaged weights, and the mean loss of the last tenth of the steps.
    """
    cpu = torch.device("cpu")
    torch.manual_seed(seed_from(seed, stream="weights"))
    net = PointNet()
    loss = DiffusionLoss(scheduler, PointSpace(), image_size=1, precision="fp32", augment="none", prediction=PREDICTION)
    config = TrainingConfig(batch_size=BATCH_SIZE, lr=LEARNING_RATE, lr_schedule="cosine", warmup_steps=100,
                            ema_decay=0.999, seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), **adam_options(config.lr, cpu))
    step = TrainingStep(net, loss, optimizer, config, cpu, "fp32", DistEnv(), steps)
    step.begin()

    batches = torch.Generator().manual_seed(seed_from(seed, stream="order"))
    no_labels = torch.zeros(BATCH_SIZE, 0)
    for number in tqdm(range(steps), desc="learning", unit="step", leave=False):
        if number == steps - max(1, steps // 10):
            step.reset_counts()
        chosen = torch.randint(len(ink.points), (BATCH_SIZE,), generator=batches)
        step(ink.points[chosen, None], no_labels, number)  # [B, 1, 2, 1, 1]: one version of each, as of latents
    return step.ema, step.stats().loss_sum / max(1, steps // 10)


# ---------------------------------------------------------------------------------------------------------------------
# out and back


@dataclass
class Model:
    """A network, exact or learned, with what its output means.

    Attributes:
        name: for titles.
        network: (x_t, t) -> output.
        prediction: "eps", "v" or "x0".
    """

    name: str
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    prediction: str


def walk_out(x_0: torch.Tensor, scheduler: NoiseScheduler, timesteps: list[int], generator: torch.Generator
             ) -> list[torch.Tensor]:
    """Return x_t at rising timesteps, each drawn from q(x_t | x_s) of the one before: a random walk of each point."""
    states, s = [x_0], -1
    for t in timesteps:
        kept = scheduler.alpha_bar(t) / scheduler.alpha_bar(s)
        noise = torch.randn(x_0.shape, generator=generator)
        states.append(kept**0.5 * states[-1] + (1 - kept) ** 0.5 * noise)
        s = t
    return states[1:]


def walk_back(model: Model, scheduler: NoiseScheduler, x_T: torch.Tensor, reach: float, generator: torch.Generator,
              sampler: str, steps: int | None = None) -> dict[int, torch.Tensor]:
    """Return all states of a sampler on its way from x_T, by their timesteps; -1 is the last."""
    timesteps = trailing_timesteps(scheduler.num_timesteps, steps)
    states = {timesteps[0]: x_T}

    def keep(i: int, x_t: torch.Tensor, x_0: torch.Tensor) -> None:
        states[(timesteps[1:] + [-1])[i]] = x_t

    sample(model.network, scheduler, x_T, sampler=sampler, steps=steps, prediction=model.prediction, clip=reach,
           draw_noise=lambda: torch.randn(x_T.shape, generator=generator), callback=keep)
    return states


@torch.no_grad()
def score(model: Model, scheduler: NoiseScheduler, x_t: torch.Tensor, t: int) -> torch.Tensor:
    """Return the gradient of ln p(x_t) that a model implies: minus the expected noise, divided by its amplitude."""
    t_batch = torch.full((len(x_t),), t)
    x_0 = scheduler.to_x_0(model.prediction, model.network(x_t, t_batch), x_t, t_batch)
    return -scheduler.to_eps(x_0, x_t, t_batch) / (1 - scheduler.alpha_bar(t)) ** 0.5


def on_ink(points: torch.Tensor, ink: Ink) -> float:
    """Return the fraction of points [N, 2, 1, 1] that are within a pixel of a dark one's centre."""
    nearest = torch.cdist(points.flatten(1), ink.pixels).min(dim=1).values
    return (nearest <= ink.pixel).float().mean().item()


def copies(points: torch.Tensor, ink: Ink) -> float:
    """Return the fraction of points [N, 2, 1, 1] that are copies of one of the ink's."""
    nearest = torch.cdist(points.flatten(1), ink.points.flatten(1)).min(dim=1).values
    return (nearest < COPY).float().mean().item()
