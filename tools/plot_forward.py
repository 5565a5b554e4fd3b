"""Plot the forward process: an image on its way to noise, and the curves of both noise schedules.

    python -m tools.plot_forward                # a built-in critter
    python -m tools.plot_forward my_cat.jpg     # an image of your own

Writes forward_diffusion.png (the image at ten timesteps, under both schedules) and schedules.png (beta, alpha-bar and
signal-to-noise ratio) to outputs/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from critters import draw_critter
from forward_diffusion import SCHEDULES, NoiseScheduler
from utils.cli import parse, setting
from utils.errors import UserError, one_line_errors, printable
from utils.images import decode_error, decode_image
from utils.plots import result_plot

CRITTER = 3  # index of the critter that is shown without an image


@dataclass
class Settings:
    """The flags of this command."""

    image: str = setting("", "image file to show; without it, a built-in critter", positional=True)
    image_size: int = setting(128, "side of the image, in pixels", least=8, most=4096)
    output: str = setting("outputs", "folder to write to")


def main() -> None:
    with one_line_errors(out_of_memory="give a smaller --image_size"):
        settings = parse(Settings, "Plot an image on its way to noise, and the curves of both schedules.",
                         prog="python -m tools.plot_forward")
        x_0 = load_x_0(settings.image, settings.image_size)
        process, schedules = (Path(settings.output, name) for name in ("forward_diffusion.png", "schedules.png"))
        draw_forward_process(x_0, process)
        draw_schedules(schedules)
        print(printable(f"wrote {process} and {schedules}"))


def load_x_0(path: str, image_size: int) -> torch.Tensor:
    """Return an image file, or a critter for the path "", as float32 [1, 3, image_size, image_size] in [-1, 1].

    Raises:
        UserError: for a file that cannot be read as an image.
    """
    if path:
        try:
            pixels = decode_image(path, image_size)
        except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
            raise UserError(f"cannot read {path}: {decode_error(error)}; choose another image") from error
    else:
        pixels = np.asarray(draw_critter(CRITTER, image_size)[0]).transpose(2, 0, 1)
    return torch.tensor(pixels)[None] / 127.5 - 1


def draw_forward_process(x_0: torch.Tensor, path: Path, columns: int = 10) -> None:
    """Plot one image [1, 3, H, W] at `columns` timesteps, in a row for each schedule."""
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    with result_plot(path, 1.35 * columns, 3.3) as figure:
        axes = figure.subplots(len(SCHEDULES), columns)
        for row, schedule in enumerate(SCHEDULES):
            scheduler = NoiseScheduler(schedule=schedule)
            timesteps = np.linspace(0, scheduler.num_timesteps - 1, columns).round().astype(int)
            for axis, t in zip(axes[row], timesteps):
                x_t = scheduler.add_noise(x_0, torch.tensor([t]), noise)
                axis.imshow(((x_t[0].permute(1, 2, 0).clamp(-1, 1) + 1) / 2).numpy())
                axis.set_xticks([])
                axis.set_yticks([])
                axis.set_title(f"t = {t}", fontsize=9)
            axes[row][0].set_ylabel(schedule)


def draw_schedules(path: Path) -> None:
    """Plot beta, alpha-bar and the signal-to-noise ratio of both schedules."""
    with result_plot(path, 12, 3.4) as figure:
        axes = figure.subplots(1, 3)
        for schedule in SCHEDULES:
            scheduler = NoiseScheduler(schedule=schedule)
            axes[0].plot(scheduler.betas.numpy(), label=schedule)
            axes[1].plot(scheduler.alphas_cumprod.numpy(), label=schedule)
            axes[2].plot(scheduler.snr().numpy(), label=schedule)
        titles = ("β: variance of the noise of each step", "ᾱ: fraction of the image's variance left",
                  "ᾱ / (1 - ᾱ): signal-to-noise ratio")
        for axis, title in zip(axes, titles):
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("t")
            axis.grid(alpha=0.3)
            axis.legend()
        axes[0].set_yscale("log")
        axes[2].set_yscale("log")


if __name__ == "__main__":
    main()
