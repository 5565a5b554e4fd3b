"""A drop of ink in the plane: diffusion with everything in view, learned in half a minute.

    python -m tools.toy                     # the ink of a critter
    python -m tools.toy my_drawing.png      # of a drawing of your own
    python -m tools.toy --exact             # nothing is trained: the exact answer in the network's place

Draws the ink going out and coming back (PNG and GIF), the score as arrows, and the paths of each sampler.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from forward_diffusion import NoiseScheduler
from models.exact import ExactDenoiser
from tools.toy.figures import SAMPLER, STEPS, draw_animation, draw_ink, draw_paths, draw_score
from tools.toy.ink import PREDICTION, SCHEDULE, Ink, Model, copies, load_ink, on_ink, train, walk_back
from unet import count_parameters
from utils.cli import parse, seed_setting, setting
from utils.errors import one_line_errors, printable


@dataclass
class Settings:
    """The flags of this command."""

    image: str = setting("", "image file whose dark pixels are the ink; without it, a built-in critter",
                         positional=True)
    points: int = setting(2000, "number of ink molecules", least=100, most=10_000)
    exact: bool = setting(False, "train nothing: the exact answer alone, which is a mean over the ink")
    steps: int = setting(2500, "training steps", least=1)
    seed: int = seed_setting("seed of the ink, the training and the noise")
    output: str = setting("outputs/toy", "path of the files to write, to which _ink.png and so on are added")


def main() -> None:
    with one_line_errors(out_of_memory="give fewer --points"):
        settings = parse(Settings, "Let a drop of ink diffuse in the plane, learn the way back, and draw both.",
                         prog="python -m tools.toy")
        torch.set_num_threads(1)  # networks this small only lose by sharing their work
        ink = load_ink(settings.image, settings.points, settings.seed)
        scheduler = NoiseScheduler(schedule=SCHEDULE)
        print(f"ink        {len(ink.points):,} points from {printable(settings.image) or 'a critter'}")

        # The exact answer, and a network that learns it.
        models = [Model("exact", ExactDenoiser(ink.points, scheduler), "x0")]
        if not settings.exact:
            start = time.process_time()
            network, loss = train(ink, scheduler, settings.steps, settings.seed)
            print(f"network    {count_parameters(network):,} parameters, {settings.steps:,} steps in "
                  f"{time.process_time() - start:.0f} s of one core, loss {loss:.3f}")
            models.append(Model("learned", network, PREDICTION))
        for model in models:
            report(model, ink, scheduler, settings.seed)

        # Figures.
        stills, animation, arrows, paths = (Path(f"{settings.output}_{name}") for name in (
            "ink.png", "ink.gif", "score.png", "paths.png"))
        draw_ink(stills, ink, scheduler, models, settings.seed)
        draw_animation(animation, ink, scheduler, models[-1], settings.seed)
        draw_score(arrows, ink, scheduler, models)
        draw_paths(paths, ink, scheduler, models[-1], settings.seed)
        print(printable(f"wrote {stills}, {animation}, {arrows} and {paths}"))


def report(model: Model, ink: Ink, scheduler: NoiseScheduler, seed: int) -> None:
    """Draw as many points as the ink has, and print how many are ink, and how many are copies."""
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(ink.points.shape, generator=generator)
    points = walk_back(model, scheduler, x_T, ink.reach, generator, SAMPLER, STEPS)[-1]
    print(f"{model.name:<11}{on_ink(points, ink):.1%} of new points are on the drawing, {copies(points, ink):.1%} are "
          f"copies")


if __name__ == "__main__":
    main()
