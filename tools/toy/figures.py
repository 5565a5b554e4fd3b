"""The figures of the ink drop: out and back, the score as arrows, the paths of each sampler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from forward_diffusion import NoiseScheduler
from models.exact import ExactDenoiser
from reverse_diffusion import SAMPLERS, default_steps
from tools.toy.ink import Ink, Model, score, walk_back, walk_out
from utils.images import save_gif
from utils.plots import COLOURS, bare, drawing, styled, to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = (50, 150, 300, 500, 999)  # timesteps of the stills, beside the ink itself
ARROWS_AT = (60, 250, 600)  # timesteps of the arrows
WINDOW = 2.8  # the plane is drawn from minus to plus this number
SAMPLER, STEPS = "ddpm", 250  # of the way back in the stills and the animation
FRAMES_OUT, FRAMES_BACK, SIDE = 18, 24, 320  # of the animation: numbers of frames, and pixels
STARTS = ((-2.2, -0.9), (0.2, 2.3), (2.3, 0.4))  # of the paths


def draw_points(axis: Axes, points: torch.Tensor, is_left: torch.Tensor, **style: Any) -> None:
    """Draw points [N, 2, 1, 1], in two colours, in a square part of the plane."""
    x, y = points.flatten(1).T.tolist()
    colours = [COLOURS["ink"] if left else COLOURS["orange"] for left in is_left.tolist()]
    axis.scatter(x, y, c=colours, linewidths=0, **style)
    axis.set(xlim=(-WINDOW, WINDOW), ylim=(-WINDOW, WINDOW), aspect="equal")
    bare(axis)


def left_half(ink: Ink) -> torch.Tensor:
    """Return which points are drawn in the first colour, bool [N]: the left half of the ink."""
    x = ink.points[:, 0, 0, 0]
    return x < x.median()


def draw_ink(path: Path, ink: Ink, scheduler: NoiseScheduler, models: Sequence[Model], seed: int) -> None:
    """Draw the ink at rising timesteps, and below it, for each model, on the way back from there."""
    generator, is_left = torch.Generator().manual_seed(seed), left_half(ink)
    out = [ink.points, *walk_out(ink.points, scheduler, list(SHOWN), generator)]
    with drawing(path, 9, 1.48 * (1 + len(models)) + 0.2) as figure:
        axes = figure.subplots(1 + len(models), len(out))
        for column, (axis, points) in enumerate(zip(axes[0], out)):
            draw_points(axis, points, is_left, s=2.2)
            axis.set_title(f"t = {SHOWN[column - 1]}" if column else "the ink")
        axes[0][0].set_ylabel("noise is added →")
        for row, model in zip(axes[1:], models):
            states = walk_back(model, scheduler, out[-1], ink.reach, generator, SAMPLER, STEPS)
            for axis, t in zip(row, (-1, *SHOWN)):
                draw_points(axis, states[min(states, key=lambda state, t=t: abs(state - t))], is_left, s=2.2)
            row[0].set_ylabel(f"← and taken away\n({model.name})")


def draw_animation(path: Path, ink: Ink, scheduler: NoiseScheduler, model: Model, seed: int) -> None:
    """Animate the ink on its way out and back; many frames where little noise is left, for there it has its shape."""
    generator, is_left = torch.Generator().manual_seed(seed), left_half(ink)
    last = scheduler.num_timesteps - 1
    rising = sorted({round(last * (i / FRAMES_OUT) ** 1.5) for i in range(1, FRAMES_OUT + 1)})
    out = [ink.points, *walk_out(ink.points, scheduler, rising, generator)]
    states = walk_back(model, scheduler, out[-1], ink.reach, generator, SAMPLER, STEPS)
    falling = sorted({min(states, key=lambda state, i=i: abs(state - last * (i / FRAMES_BACK) ** 1.5))
                      for i in range(FRAMES_BACK)} - {last} | {-1}, reverse=True)
    frames = [animation_frame(ink.points, is_left, "a drop of ink")] * 4
    frames += [animation_frame(points, is_left, f"adding noise: t = {t}") for t, points in zip(rising, out[1:])]
    frames += [animation_frame(states[t], is_left, f"taking it away: t = {t}") for t in falling if t >= 0]
    frames += [animation_frame(states[-1], is_left, "the same drop, other molecules")]
    save_gif(frames, path, seconds=len(frames) / 8)


def animation_frame(points: torch.Tensor, is_left: torch.Tensor, title: str) -> Image.Image:
    """Return a frame of the animation."""
    with styled(SIDE / 100, SIDE / 100) as figure:
        axis = figure.subplots()
        draw_points(axis, points, is_left, s=2.0, marker="s", antialiased=False)  # or each frame takes twice the bytes
        axis.set_title(title, fontsize=9)
        return to_image(figure, 100)


def draw_score(path: Path, ink: Ink, scheduler: NoiseScheduler, models: Sequence[Model]) -> None:
    """Draw the score of each model as arrows, over the density of the ink, at three noise levels."""
    density = ExactDenoiser(ink.points, scheduler)
    with drawing(path, 9, 2.95 * len(models) + 0.25) as figure:
        axes = figure.subplots(len(models), len(ARROWS_AT), squeeze=False)
        for i, (row, model) in enumerate(zip(axes, models)):
            for axis, t in zip(row, ARROWS_AT):
                shade(axis, density, t)
                arrows(axis, score(model, scheduler, grid(17), t), (1 - scheduler.alpha_bar(t)) ** 0.5)
                axis.set(xlim=(-WINDOW, WINDOW), ylim=(-WINDOW, WINDOW), aspect="equal")
                bare(axis)
                if i == 0:
                    axis.set_title(f"t = {t}")
            row[0].set_ylabel(model.name)


def grid(side: int) -> torch.Tensor:
    """Return the points of a square grid over the window, [side * side, 2, 1, 1], row by row from below."""
    line = torch.linspace(-WINDOW, WINDOW, side + 2)[1:-1]
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)[:, :, None, None]


def shade(axis: Axes, density: ExactDenoiser, t: int, side: int = 120) -> None:
    """Shade a plot with the density of the ink at a timestep; the root of it, so that thin ink is seen as well."""
    points = grid(side)
    p = density.log_density(points, torch.full((len(points),), t)).exp().sqrt()
    x, y = points.flatten(1).T.reshape(2, side, side).numpy()
    levels = torch.linspace(0, 1, 9) * p.max() * 1.001
    axis.contourf(x, y, p.view(side, side).numpy(), levels=levels.tolist(), cmap="Blues", vmax=1.6 * p.max().item())


def arrows(axis: Axes, scores: torch.Tensor, amplitude: float) -> None:
    """Draw the scores [N, 2, 1, 1] on a grid as arrows: longer for a stronger pull, but none past the next one."""
    points = grid(round(len(scores) ** 0.5)).flatten(1)
    pull = amplitude * scores.flatten(1)  # in units of the noise, whatever its amplitude
    arrow = pull / (1 + pull.norm(dim=1, keepdim=True)) * (2 * WINDOW / 18)
    axis.quiver(*points.T.numpy(), *arrow.T.numpy(), color=COLOURS["ink"], angles="xy", scale_units="xy", scale=1,
                width=0.005, headwidth=4, headlength=4.5)


def draw_paths(path: Path, ink: Ink, scheduler: NoiseScheduler, model: Model, seed: int) -> None:
    """Draw the way of a few points from noise to ink, with each sampler in its own number of steps."""
    starts = torch.tensor(STARTS)[:, :, None, None]
    names = [name for name, sampler in SAMPLERS.items() if not sampler.tuned]
    colours = [COLOURS[name] for name in ("blue", "orange", "green")]
    with drawing(path, 9, 3.45 * ((len(names) + 1) // 2)) as figure:
        axes = figure.subplots((len(names) + 1) // 2, 2, squeeze=False).ravel()
        for axis in axes[len(names):]:
            axis.remove()
        for axis, name in zip(axes, names):
            steps = default_steps(name, scheduler.num_timesteps)
            generator = torch.Generator().manual_seed(seed)
            states = walk_back(model, scheduler, starts, ink.reach, generator, name, steps)
            way = torch.stack(list(states.values())).flatten(2)  # [steps + 1, N, 2]
            axis.scatter(*ink.points.flatten(1).T.tolist(), s=1.2, c=COLOURS["pale"], linewidths=0)
            for i, colour in enumerate(colours):
                line = dict(marker=".", markersize=4, linewidth=1.2) if steps <= 100 else dict(linewidth=0.7)
                axis.plot(*way[:, i].T.tolist(), color=colour, **line)
                axis.scatter(*way[0, i].tolist(), s=34, facecolors="white", edgecolors=colour, zorder=3)
                axis.scatter(*way[-1, i].tolist(), s=26, c=colour, zorder=3)
            axis.set(xlim=(-WINDOW, WINDOW), ylim=(-2.4, 2.4), aspect="equal")
            bare(axis)
            axis.set_title(f"{name}, {steps:,} steps")
