"""Consistency tuning: a trained model learns to jump, and then draws in few steps. The loss, and checks of settings.

    python train.py --objective consistency --init checkpoints/final_model.pt ...       # see docs/few_steps.md
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.pipeline import BY_TYPES, Pipeline
from reverse_diffusion import SAMPLERS
from training.loss import DiffusionLoss, to_x_0

CONSISTENCY = "consistency"
OBJECTIVES = ("denoising", CONSISTENCY)


@dataclass
class ConsistencyLoss(DiffusionLoss):
    """Consistency tuning: x_t and x_r, of one image and one noise, are to give the same image (Geng et al. 2025).

    r < t has less noise, see `lower_timesteps`; -1 is the clean image itself. The gap rises in equal parts of the run
    through `gaps`, so that r comes nearer to t. The precision must be "fp32": the loss is a difference of two outputs.

    Attributes:
        total_steps: of the run.
        gaps: of its parts.
        anchor: fraction of the timesteps that are compared with the image itself, see `lower_timesteps`.
        huber: c of the pseudo-Huber distance sqrt(d^2 + c^2) - c, above 0.
        dropout: whether the network has any.
        teacher: a frozen network whose step of ddim from x_t gives x_r; None: add_noise gives it.
        guidance: the classifier-free guidance scale of that step.
    """

    total_steps: int = 1
    gaps: Sequence[int] = (2, 4, 8, 16)
    anchor: float = 0.1
    huber: float = 5e-4
    dropout: bool = False
    teacher: nn.Module | None = None
    guidance: float = 1.0

    def __post_init__(self):
        self._lower = [lower_timesteps(self.scheduler.num_timesteps, gap, self.anchor) for gap in self.gaps]

    def draw_randomness(self, batch_size: int, generator: torch.Generator, step: int) -> tuple[torch.Tensor, ...]:
        """Draw what `DiffusionLoss` draws, and add r [B], which follows from the timestep and the step's gap."""
        augment_rand, t, noise, keep_label = super().draw_randomness(batch_size, generator, step)
        part = min(step * len(self.gaps) // self.total_steps, len(self.gaps) - 1)
        self._lower[part] = self._lower[part].to(t.device)  # once: a step copies nothing from the host
        return augment_rand, t, noise, keep_label, self._lower[part][t]

    def __call__(self, net: nn.Module, images: torch.Tensor, labels: torch.Tensor, augment_rand: torch.Tensor,
                 t: torch.Tensor, noise: torch.Tensor, keep_label: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """Return the mean distance of the images predicted at x_t and, without a gradient, at x_r, times T / (t - r).

        Args: as `DiffusionLoss` has them, and r [B], below t.
        """
        x_0, augment_labels = to_x_0(images, augment_rand, self.augment, self.space, self.precision)
        labels = labels * keep_label
        x_t, s = self.scheduler.add_noise(x_0, t, noise), r.clamp(min=0)

        def predict(network: nn.Module, x: torch.Tensor, u: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.scheduler.to_x_0(self.prediction, network(x, u, labels, augment_labels=augment_labels), x, u)

        # The target: what the same network, with the same dropout mask, makes of x_r; or the image.
        seed = torch.initial_seed()  # of the step, which has drawn nothing from it yet
        with torch.no_grad():
            if self.teacher is None:
                x_r = self.scheduler.add_noise(x_0, s, noise)
            else:
                guided = predict(self.teacher, x_t, t, labels)
                if self.guidance != 1:
                    plain = predict(self.teacher, x_t, t, torch.zeros_like(labels))
                    guided = plain + self.guidance * (guided - plain)
                guided = guided.clamp(-self.space.latent_range, self.space.latent_range)
                x_r = self.scheduler.add_noise(guided, s, self.scheduler.to_eps(guided, x_t, t))
            target = torch.where(r.view(-1, 1, 1, 1) < 0, x_0, predict(net, x_r, s, labels))
        if self.dropout:
            torch.manual_seed(seed)

        # sqrt(d^2 + c^2) - c, in a form that loses no digits where d is small.
        squared = (predict(net, x_t, t, labels) - target).square().mean(dim=(1, 2, 3))
        distance = squared / ((squared + self.huber**2).sqrt() + self.huber)
        return (distance * self.scheduler.num_timesteps / (t - r)).mean()


def lower_timesteps(num_timesteps: int, gap: int, anchor: float) -> torch.Tensor:
    """Return, for each timestep t, the r = t - ceil((t + 1) / gap) that it is compared with; int64 [T].

    Below `anchor` times T, r is -1, the image itself. There x_t shows its noise as well as its image: what both answers
    have in common, a rest of the noise, is no difference between t and r, so the loss does not see it, and it was found
    to grow until the network only repeats x_t. The image tells it. Little is lost: with so little noise a single image
    can be meant, which is where the path ends.
    """
    t = torch.arange(num_timesteps)
    r = t - (t + gap) // gap  # ceil((t + 1) / gap)
    return r.where(t >= anchor * num_timesteps, -1)


def check_objective(config: Any, checkpoint: dict[str, Any] | None) -> None:
    """Raise ValueError for settings that do not go with the objective; warn of gaps that move on resume."""
    if config.objective != CONSISTENCY:
        if SAMPLERS[config.sampler].tuned:
            raise ValueError(f"--sampler {config.sampler} is for a model that is tuned to it: add --objective "
                             f"{CONSISTENCY}, or choose another")
        if config.teacher_guidance:
            raise ValueError(f"--teacher_guidance needs --objective {CONSISTENCY}")
        return
    if config.guide_at:
        raise ValueError(f"--guide_at does not go with --objective {CONSISTENCY}: leave it out")
    if checkpoint is None and not config.init:
        raise ValueError(f"--objective {CONSISTENCY} tunes a model: name the checkpoint of one that predicts v with "
                         f"--init")
    if config.prediction != "v":
        raise ValueError(f"--objective {CONSISTENCY} needs --prediction v, and the other flags that the model of "
                         f"--init was trained with")
    if config.precision not in ("auto", "fp32"):
        raise ValueError(f"--objective {CONSISTENCY} needs --precision fp32: its loss is a difference of two outputs, "
                         f"which {config.precision} rounds too much")
    config.precision = "fp32"
    if not SAMPLERS[config.sampler].tuned:
        raise ValueError(f"--objective {CONSISTENCY} needs --sampler consistency: a tuned model jumps, and the small "
                         f"steps of {config.sampler} are not for it")
    if checkpoint is not None and config.epochs != checkpoint["config"]["epochs"]:
        print(f"warning: --epochs {config.epochs} instead of {checkpoint['config']['epochs']} changes when each of "
              f"--gaps is due", file=sys.stderr)


def check_tunable(config: Any, start: Pipeline) -> None:
    """Raise ValueError for a model of --init that cannot be tuned to consistency, or be the teacher."""
    if start.prediction != "v":
        raise ValueError(f"--init {config.init} predicts {start.prediction}, and --objective {CONSISTENCY} needs a "
                         f"model that predicts v: train one with --prediction v")
    if config.teacher_guidance and start.tuned:
        raise ValueError(f"--init {config.init} is tuned already and cannot be the teacher: give the model that it was "
                         f"tuned from, or leave --teacher_guidance out")
    if config.teacher_guidance not in (0, 1) and BY_TYPES not in start.guides:
        raise ValueError(f"--teacher_guidance {config.teacher_guidance} needs a model with types that was trained with "
                         f"--label_dropout above 0, and {config.init} is none: give 1, or leave it out")
