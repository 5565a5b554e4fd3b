"""Plot what a model predicts along one path from noise to image, before and after it was tuned to few steps.

    python -m tools.plot_consistency --tuned checkpoints/few_steps/final_model.pt

The path is that of ddim with the model before tuning, with the guidance that the tuning built in. Its prediction is a
mean, blurred where there is much noise; that of the tuned model should be a sharp image, near the one at which the path
ends. Writes outputs/consistency.png.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from models.pipeline import Pipeline
from reverse_diffusion import SAMPLERS
from training.labels import parse_types
from utils.cli import device_setting, parse, seed_setting, setting
from utils.device import pick_device
from utils.errors import one_line_errors, printable
from utils.images import to_uint8
from utils.plots import result_plot

ROWS = ("the path", "predicted before tuning", "predicted after tuning")


@dataclass
class Settings:
    """The flags of this command."""

    tuned: str = setting("checkpoints/few_steps/final_model.pt", "checkpoint of the tuned model")
    checkpoint: str = setting("", "checkpoint of the model before (default: the one that the tuning names)")
    seed: int = seed_setting("seed of the noise that the path begins with")
    types: str = setting("", "types of the image, as \"fire flying\" (default: any)")
    steps: int = setting(100, "steps of the path", least=2)
    output: str = setting("outputs/consistency.png", "file to write")
    device: str = device_setting()


def main() -> None:
    with one_line_errors():
        settings = parse(Settings, "Plot what a model predicts along one path, before and after tuning.",
                         prog="python -m tools.plot_consistency")
        device = pick_device(settings.device)
        tuned = Pipeline.load(settings.tuned, device, "fp32")
        if not tuned.tuned:
            raise ValueError(f"--tuned {settings.tuned} is not tuned to few steps; tune it with train.py --objective "
                             f"consistency")
        before = Pipeline.load(settings.checkpoint or tuned.settings["init"], device, "fp32")
        check_same_model(before, tuned)
        names = parse_types(settings.types, tuned.class_names) if settings.types else ()
        labels = tuned.class_labels([names]) if tuned.class_names else None  # of no type: zeros
        rows, timesteps = predictions(before, tuned, labels, settings)
        draw(rows, timesteps, Path(settings.output))
        print(printable(f"wrote {settings.output}"))


def check_same_model(before: Pipeline, tuned: Pipeline) -> None:
    """Raise ValueError for two models that do not have one path."""
    if before.tuned:
        raise ValueError("--checkpoint names a model that is tuned as well; give the one before")
    same = (before.scheduler.config() == tuned.scheduler.config() and before.class_names == tuned.class_names
            and before.space.fingerprint() == tuned.space.fingerprint() and before.image_size == tuned.image_size)
    if not same:
        raise ValueError("--checkpoint and --tuned are of different models; give the one that was tuned from the other")


@torch.no_grad()
def predictions(before: Pipeline, tuned: Pipeline, labels: torch.Tensor | None, settings: Settings
                ) -> tuple[list[torch.Tensor], list[int]]:
    """Return three rows of images, uint8 [N, 3, S, S] each: x_t, and x_0 predicted before and after tuning.

    Also return the N timesteps that the model was tuned for, which fall.
    """
    # Follow the path, which has the noise of the next timestep after each step, and predict an image in each.
    T, (sampler, jumps) = before.scheduler.num_timesteps, tuned.default_sampler
    timesteps = SAMPLERS[sampler].timesteps(T, jumps)
    path = sorted({*SAMPLERS["ddim"].timesteps(T, min(settings.steps, T)), *timesteps}, reverse=True)
    states, images = [before.noise([settings.seed])], []

    def after_step(i: int, x_t: torch.Tensor, x_0: torch.Tensor) -> None:
        states.append(x_t.float().cpu())
        images.append(x_0.float().cpu())

    before.sample([settings.seed], labels=labels, guidance=tuned.built_in_guidance, sampler="ddim", steps=len(path),
                  timesteps=path, callback=after_step)
    shown = [path.index(u) for u in timesteps]

    # Let the tuned model predict it at the same points.
    x_t, t = torch.cat([states[i] for i in shown]).to(before.device), torch.tensor(timesteps, device=before.device)
    inputs = [x_t, t] if labels is None else [x_t, t, labels.repeat(len(t), 1).to(t.device)]
    x_0 = tuned.scheduler.to_x_0(tuned.prediction, tuned.denoise(*inputs).float(), x_t, t)
    rows = [x_t, torch.cat([images[i] for i in shown]), x_0.clamp(-tuned.space.latent_range, tuned.space.latent_range)]
    return [to_uint8(before.decode(row)) for row in rows], timesteps


def draw(rows: list[torch.Tensor], timesteps: list[int], path: Path) -> None:
    """Draw the rows of images, with their names, under the timesteps."""
    with result_plot(path, 1.3 * len(timesteps) + 0.5, 1.4 * len(rows) + 0.3) as figure:
        axes = figure.subplots(len(rows), len(timesteps), squeeze=False)
        for images, name, row in zip(rows, ROWS, axes):
            for image, t, axis in zip(images, timesteps, row):
                axis.imshow(image.permute(1, 2, 0).numpy())
                axis.set_xticks([])
                axis.set_yticks([])
                if name == ROWS[0]:
                    axis.set_title(f"t = {t}", fontsize=9)
            row[0].set_ylabel(name.replace(" before", "\nbefore").replace(" after", "\nafter"), fontsize=9)


if __name__ == "__main__":
    main()
