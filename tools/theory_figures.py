"""Draw the figures of DIFFUSION_THEORY.md that need no training; `python -m tools.toy` draws those of the ink drop.

    python -m tools.theory_figures                                   # outputs/theory_weights.png and so on
    python -m tools.theory_figures --output docs/images/theory       # those that the page shows

Each figure is computed with the scheduler, the samplers and the networks themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from forward_diffusion import NoiseScheduler
from models.exact import ExactDenoiser, GaussianDenoiser
from reverse_diffusion import VARIANCES, ddpm_step, sample
from unet import UNet
from utils.cli import parse, setting
from utils.errors import one_line_errors, printable
from utils.plots import COLOURS, bare, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPIKES = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)  # a data set of two images of one pixel
STEP_FROM = 0.15  # x_t of the step that is drawn: nearly undecided between the two


@dataclass
class Settings:
    """The flags of this command."""

    output: str = setting("outputs/theory", "path of the files to write, to which _weights.png and so on are added")


def main() -> None:
    with one_line_errors():
        settings = parse(Settings, "Draw the figures of DIFFUSION_THEORY.md, but for those of the ink drop.",
                         prog="python -m tools.theory_figures")
        for name, draw in FIGURES.items():
            path = Path(f"{settings.output}_{name}.png")
            draw(path)
            print(printable(f"wrote {path}"))


# ---------------------------------------------------------------------------------------------------------------------
# two spikes in one dimension


def draw_spikes(path: Path) -> None:
    """Draw the density of two spikes at all timesteps, with the paths of a sampler that draws noise and of one without.

    Both are exact: the network is the mean over the two spikes.
    """
    scheduler = NoiseScheduler(schedule="cosine")
    denoiser = ExactDenoiser(SPIKES, scheduler)
    last = scheduler.num_timesteps - 1
    quantiles = torch.linspace(0.03, 0.97, 14)
    starts = (math.sqrt(2) * torch.erfinv(2 * quantiles - 1)).view(-1, 1, 1, 1)
    panels = {"with fresh noise at each step: ddpm": ("ddpm", starts[1::3], 0.8),
              "without: the flow that ddim follows": ("ddim", starts, 1.3)}
    with drawing(path, 9, 3.7) as figure:
        for axis, (title, (sampler, x_T, width)) in zip(figure.subplots(1, 2, sharey=True), panels.items()):
            shade_density(axis, denoiser)
            for i, x in enumerate(states(denoiser, scheduler, x_T, sampler).flatten(1).T):
                colour = COLOURS["orange"] if x[-1] > 0 else COLOURS["ink"]
                axis.plot([*range(last, -2, -1)], x.tolist(), color=colour, linewidth=width, alpha=0.9, zorder=3 + i)
            axis.set(title=title, xlim=(-12, last), ylim=(-2.8, 2.8), xlabel="t  (sampling goes to the left)")
        figure.axes[0].set_ylabel("$x_t$, the value of the pixel")


def states(denoiser: ExactDenoiser, scheduler: NoiseScheduler, x_T: torch.Tensor, sampler: str) -> torch.Tensor:
    """Return x_t at T-1, T-2, ..., -1, [T + 1, *x_T.shape], of a sampler that makes all steps."""
    visited, generator = [x_T], torch.Generator().manual_seed(4)
    sample(denoiser, scheduler, x_T, sampler=sampler, steps=scheduler.num_timesteps, prediction="x0",
           draw_noise=lambda: torch.randn(x_T.shape, generator=generator),
           callback=lambda i, x_t, x_0: visited.append(x_t))
    return torch.stack(visited)


def shade_density(axis: Axes, denoiser: ExactDenoiser, height: int = 281) -> None:
    """Shade a plot of x_t over t with the density, scaled to its largest value at each t."""
    x, timesteps = torch.linspace(-2.8, 2.8, height).view(-1, 1, 1, 1), torch.arange(0, 1000, 4)
    density = torch.stack([denoiser.log_density(x, torch.full((height,), int(t))).exp() for t in timesteps], dim=1)
    density = (density / density.max(dim=0).values).sqrt()
    axis.imshow(density.numpy(), origin="lower", extent=(0, 999, -2.8, 2.8), aspect="auto", cmap="Blues", vmax=1.9,
                interpolation="bilinear")


def step_densities(x: torch.Tensor, t: int, s: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return densities at x [N] of the step from t to s for two spikes, from x_t = STEP_FROM.

    Returns:
        The true one, a Gaussian for each spike, weighted by how likely x_t comes from it; and those of the sampler,
        which puts the mean of both spikes in the place of x_0, by the name of their variance.
    """
    scheduler = NoiseScheduler(schedule="cosine")
    denoiser = ExactDenoiser(SPIKES, scheduler)
    x_t, t_batch = torch.full((1, 1, 1, 1), STEP_FROM), torch.tensor([t])

    def density(x_0: torch.Tensor, variance: str = "beta_tilde") -> torch.Tensor:
        mean, std = ddpm_step(scheduler, x_0, x_t, t, s, variance=variance)
        return torch.distributions.Normal(mean.flatten(), std).log_prob(x).exp()

    weights = torch.softmax(denoiser.log_kernels(x_t, t_batch), dim=1)[0]
    truth = sum(weight * density(spike[None]) for weight, spike in zip(weights, SPIKES))
    return truth, {variance: density(denoiser(x_t, t_batch), variance) for variance in VARIANCES}


def draw_step(path: Path) -> None:
    """Draw the true step back for two spikes, which has two humps, against the sampler's Gaussian, at three strides."""
    t, x = 400, torch.linspace(-2, 2, 801)
    looks = {"beta_tilde": (r"ddpm, $\tilde\beta$", "-"), "beta": (r"ddpm, $\beta$", "--")}
    with drawing(path, 9, 3.1) as figure:
        for axis, s in zip(figure.subplots(1, 3), (390, 300, 100)):
            truth, approximations = step_densities(x, t, s)
            axis.fill_between(x, truth, color=COLOURS["pale"], linewidth=0)
            axis.plot(x, truth, color=COLOURS["ink"], label="the true step")
            for variance, (label, style) in looks.items():
                axis.plot(x, approximations[variance], color=COLOURS["orange"], linestyle=style, label=label)
            axis.axvline(STEP_FROM, color=COLOURS["grey"], linewidth=1.2, linestyle=":", label="$x_t$")
            axis.set(title=f"from t = {t} to {s}", xlabel="$x_s$", xlim=(-2, 2), ylim=(0, None), yticks=[])
            axis.spines["left"].set_visible(False)
        figure.axes[0].legend(loc="upper left", handlelength=1.4)


# ---------------------------------------------------------------------------------------------------------------------
# weights and predictions


def loss_weights(scheduler: NoiseScheduler) -> dict[str, np.ndarray]:
    """Return how five losses weigh the squared error of the image, at t = 2 ... T in the count of the formulas.

    At t = 1 the bound has a term of another kind.
    """
    snr = scheduler.snr().numpy()
    before, snr = snr[:-1], snr[1:]
    return {"the bound": 0.5 * (before - snr), "eps": snr, "v": snr + 1, "x0": np.ones_like(snr),
            "min-SNR": np.minimum(snr, 5)}


def draw_weights(path: Path) -> None:
    """Draw how five losses weigh the timesteps: per squared error of the noise, and per squared error of the image."""
    scheduler = NoiseScheduler()
    snr, t = scheduler.snr().numpy()[1:], np.arange(2, scheduler.num_timesteps + 1)
    colours = (COLOURS[name] for name in ("ink", "orange", "green", "violet", "red"))
    with drawing(path, 9, 3.9) as figure:
        left, right = figure.subplots(1, 2)
        for (name, weight), colour in zip(loss_weights(scheduler).items(), colours):
            style = dict(color=colour, label=name, linestyle="--" if name == "v" else "-")
            left.plot(t, weight / snr, **style)
            right.plot(t, weight / weight.mean(), **style)
        left.set(title="weight of the noise's squared error", ylim=(3e-4, 3e4))
        right.set(title="weight of the image's squared error (mean 1)", ylim=(1e-6, 1e3))
        for axis in (left, right):
            axis.set(xscale="log", yscale="log", xlabel="t (linear schedule)", xlim=(2, 1000))
            axis.set_xticks([2, 10, 100, 1000], ["2", "10", "100", "1000"])
            axis.minorticks_off()
            axis.grid()
        right.legend(loc="lower left")


def draw_circle(path: Path) -> None:
    """Draw the quarter circle from image to noise, with x_t and v, and where each schedule's timesteps are on it."""
    angle = math.radians(40)
    a, b = math.cos(angle), math.sin(angle)
    with drawing(path, 7.2, 5.4) as figure:
        axis = figure.subplots()
        arc = np.linspace(0, math.pi / 2, 200)
        axis.plot(np.cos(arc), np.sin(arc), color=COLOURS["pale"], linewidth=2.5, zorder=0)

        # x_t and its two parts; v, as long as x_t and at right angles to it.
        arrow = dict(arrowstyle="-|>,head_width=0.25,head_length=0.5", linewidth=2, shrinkA=0, shrinkB=0)
        for start, end, colour in (((0, 0), (1, 0), "ink"), ((0, 0), (0, 1), "ink"), ((0, 0), (a, b), "orange"),
                                   ((a, b), (a - b, b + a), "green")):
            axis.annotate("", end, start, arrowprops=dict(color=COLOURS[colour], **arrow))
        axis.plot([a, a, 0], [0, b, b], color=COLOURS["grey"], linewidth=1, linestyle=":")
        turn = np.linspace(0, angle, 40)
        axis.plot(0.27 * np.cos(turn), 0.27 * np.sin(turn), color=COLOURS["grey"], linewidth=1.2)
        words: dict[str, Any] = dict(fontsize=14, va="center")
        axis.text(0.3, 0.1, r"$\varphi$", **words)
        axis.text(0.5 * a - 0.1, 0.5 * b + 0.07, "$x_t$", color=COLOURS["orange"], **words)
        axis.text(a - b - 0.07, b + a, "$v$", color=COLOURS["green"], **words)
        axis.text(0.93, -0.07, "image $x_0$", **words)
        axis.text(-0.06, 1.0, r"noise $\epsilon$", ha="right", **words)
        axis.text(a, -0.07, "$a_t$", ha="center", **words)
        axis.text(-0.06, b, "$b_t$", ha="right", **words)

        # Where every hundredth timestep is.
        for schedule, colour, radius in (("linear", "blue", 1.08), ("cosine", "red", 1.17)):
            scheduler = NoiseScheduler(schedule=schedule)
            phi = np.array([math.acos(scheduler.alpha_bar(t - 1) ** 0.5) for t in range(0, 1001, 100)])
            axis.plot(radius * np.cos(phi), radius * np.sin(phi), "o", color=COLOURS[colour], markersize=5,
                      label=f"{schedule} schedule, t = 0, 100, ..., 1000")
        axis.set(aspect="equal", xlim=(-0.4, 1.62), ylim=(-0.14, 1.46))
        axis.legend(loc="upper right", borderaxespad=0, handletextpad=0.2)
        bare(axis)


# ---------------------------------------------------------------------------------------------------------------------
# error against steps


# Four Gaussian pixels, of which the flow from noise to image is known exactly (tests/gaussian.py has the same).
MEAN = torch.tensor([-0.6, -0.2, 0.1, 0.6], dtype=torch.float64).view(1, 1, 2, 2)
STD = torch.tensor([0.1, 0.25, 0.5, 0.35], dtype=torch.float64).view(1, 1, 2, 2)


def error_after(scheduler: NoiseScheduler, sampler: str, steps: int) -> float:
    """Return the root-mean-square distance from the exact flow's end, over all noises and the four pixels.

    For Gaussian pixels sampler and flow are linear in x_T, hence so is the error: c + d x_T, whose mean square over
    standard normal x_T is c^2 + d^2. Two noises, 0 and 1, give both.
    """
    denoiser = GaussianDenoiser(MEAN, STD, scheduler)
    x_T = torch.stack([torch.zeros_like(MEAN[0]), torch.ones_like(MEAN[0])])
    images = sample(denoiser, scheduler, x_T, sampler=sampler, steps=steps, prediction="x0", clip=False)
    at_0, at_1 = images - denoiser.flow(x_T, scheduler.num_timesteps - 1, -1)
    return (at_0**2 + (at_1 - at_0) ** 2).mean().sqrt().item()


def draw_orders(path: Path) -> None:
    """Draw the error of both deterministic samplers against their number of steps."""
    steps = [5, 7, 10, 14, 20, 28, 40, 50, 70, 100, 140, 200]
    with drawing(path, 9, 3.9) as figure:
        for axis, schedule in zip(figure.subplots(1, 2, sharey=True), ("linear", "cosine")):
            scheduler = NoiseScheduler(schedule=schedule)
            for sampler, colour in (("ddim", COLOURS["blue"]), ("dpm++", COLOURS["orange"])):
                errors = [error_after(scheduler, sampler, n) for n in steps]
                axis.plot(steps, errors, "o-", color=colour, markersize=4, label=sampler)
                order, gap, side = (1, 1.8, "bottom") if sampler == "ddim" else (2, 0.5, "top")
                slope = [gap * errors[-1] * (steps[-1] / n) ** order for n in steps]
                axis.plot(steps[4:], slope[4:], color=COLOURS["grey"], linewidth=1.2, linestyle=":")
                axis.text(steps[8], slope[8], f"order {order}", ha="left" if order == 1 else "right", va=side,
                          color=COLOURS["grey"])
            axis.set(title=f"{schedule} schedule", xlabel="steps", xscale="log", yscale="log", ylim=(1e-4, 0.4))
            axis.set_xticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
            axis.minorticks_off()
            axis.grid()
        figure.axes[0].set_ylabel("distance from the exact image")
        figure.axes[0].legend(loc="lower left")


# ---------------------------------------------------------------------------------------------------------------------
# the network


def level_shapes(model: UNet, image_size: int) -> tuple[list[torch.Size], torch.Size, list[torch.Size]]:
    """Return the shapes after each level on the way down, in the middle, and after each level on the way up."""
    shapes: dict[int, torch.Size] = {}
    last_blocks = [blocks[-1] for blocks in model.down] + [model.middle[-1]] + [blocks[-1] for blocks in model.up]
    hooks = [block.register_forward_hook(lambda module, _, output: shapes.update({id(module): output.shape}))
             for block in last_blocks]
    model(torch.zeros(1, model.config.channels, image_size, image_size, device="meta"),
          torch.zeros(1, device="meta", dtype=torch.long))
    for hook in hooks:
        hook.remove()
    ordered = [shapes[id(block)] for block in last_blocks]
    levels = len(model.down)
    return ordered[:levels], ordered[levels], ordered[levels + 1:]


def draw_unet(path: Path) -> None:
    """Draw the reference network: what each level's tensors look like, and what connects the levels."""
    with torch.device("meta"):  # shapes without memory
        model = UNet()
    down, middle, up = level_shapes(model, 64)
    levels = len(down)
    with drawing(path, 9, 5.2) as figure:
        axis = figure.subplots()

        # Levels: on the left the way down, on the right the way up.
        left, right = [], []
        for level, (shape, back) in enumerate(zip(down, reversed(up))):
            x, y = -5.6 + 0.95 * level, -1.35 * level
            left.append(draw_tensor(axis, x, y, shape, f"{len(model.down[level])} blocks"))
            right.append(draw_tensor(axis, -x, y, back, f"{len(model.up[levels - 1 - level])} blocks"))
            skips = f"{len(model.down[level]) + 1} skip connections"
            join(axis, left[-1]["right"], right[-1]["left"], skips, "blue")
        centre = draw_tensor(axis, 0, -1.35 * levels, middle, "2 blocks, attention")

        # What connects them.
        for level in range(levels - 1):
            join(axis, left[level]["below"], left[level + 1]["above"], "", "ink")
            join(axis, right[level + 1]["above"], right[level]["below"], "", "ink")
        join(axis, left[-1]["below"], centre["left"], "", "ink")
        join(axis, centre["right"], right[-1]["below"], "", "ink")
        for x, text in ((-8.0, "$x_t$"), (8.1, "output")):
            axis.text(x, 0, text, ha="center", va="center", fontsize=12)
        join(axis, (-7.7, 0), left[0]["left"], "", "ink")
        join(axis, right[0]["right"], (7.4, 0), "", "ink")
        axis.text(-8.1, -1.35 * levels + 0.1, "timestep, types, augmentation:\neach block gets a scale and a shift\n"
                  "for each of its channels", va="center", color=COLOURS["orange"], fontsize=9.5)
        axis.set(xlim=(-8.3, 8.7), ylim=(-1.35 * levels - 0.6, 0.75))
        bare(axis)


def draw_tensor(axis: Axes, x: float, y: float, shape: torch.Size, text: str) -> dict[str, tuple[float, float]]:
    """Draw a tensor [1, C, S, S] as a box, taller for a larger side and wider for more channels; return its sides."""
    from matplotlib.patches import FancyBboxPatch

    _, channels, side, _ = shape
    height, width = 0.5 + 0.1 * side**0.5, 1.6 + 0.035 * channels**0.5
    axis.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor="#eef2f6", linewidth=1.2,
                                  edgecolor=COLOURS["ink"], boxstyle="round,pad=0,rounding_size=0.1"))
    axis.text(x, y, f"{channels} × {side} × {side}\n{text}", ha="center", va="center", fontsize=9)
    return {"left": (x - width / 2, y), "right": (x + width / 2, y), "above": (x, y + height / 2),
            "below": (x, y - height / 2)}


def join(axis: Axes, start: tuple[float, float], end: tuple[float, float], text: str, colour: str) -> None:
    """Draw an arrow with a text above it."""
    axis.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=COLOURS[colour], linewidth=1.4,
                                                  shrinkA=2, shrinkB=2))
    axis.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.06, text, ha="center", va="bottom", fontsize=9,
              color=COLOURS[colour])


FIGURES = {"spikes": draw_spikes, "step": draw_step, "weights": draw_weights, "circle": draw_circle,
           "orders": draw_orders, "unet": draw_unet}

if __name__ == "__main__":
    main()
