"""Tuning to few steps: a trained model learns to jump to the image that it would draw. The loss; checks of settings.

    python train.py --objective consistency --init checkpoints/final_model.pt ...       # see docs/few_steps.md
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from models.pipeline import Pipeline
from reverse_diffusion import SAMPLERS, consistency_timesteps, sample
from training.loss import DiffusionLoss
from utils.device import autocast

CONSISTENCY = "consistency"
OBJECTIVES = ("denoising", CONSISTENCY)


class Teacher(nn.Module):
    """The model as it was before tuning, frozen: what the loss needs to draw with it.

    Args:
        net: a copy of the network to be tuned.
        guidance: scale.
        worse: what guidance goes away from; None: `net` without labels, see `reverse_diffusion.sample`.
    """

    def __init__(self, net: nn.Module, guidance: float = 1.0, worse: nn.Module | None = None):
        super().__init__()
        self.net, self.guidance, self.worse = net, guidance, worse
        self.eval().requires_grad_(False)


@dataclass
class ConsistencyLoss(DiffusionLoss):
    """The denoising loss, for the image that a teacher draws from x_t instead of the one that x_t was made of.

    The sampler is deterministic, so the network learns a function of x_t: where its path ends (Luhman & Luhman 2021,
    from pure noise; Song et al. 2023 call it the consistency function). Only the timesteps from which the sampler
    `consistency` jumps are trained.

    Attributes:
        teacher: draws by dpm++, with its guidance.
        teacher_steps: of that from the last timestep; in proportion fewer from others, at least one.
        jumps: number of timesteps, those of `consistency_timesteps`.
    """

    teacher: Teacher = field(kw_only=True)
    teacher_steps: int = 8
    jumps: int = 4

    def __post_init__(self):
        self.timesteps = consistency_timesteps(self.scheduler.num_timesteps, self.jumps)

    def draw_timesteps(self, batch_size: int, generator: torch.Generator, step: int) -> torch.Tensor:
        """Return timesteps [B] that take turns, over the images and over the steps."""
        turns = (torch.arange(batch_size) + step) % self.jumps
        return torch.tensor(self.timesteps)[turns].to(generator.device)

    @torch.no_grad()
    def what_to_predict(self, x_0: torch.Tensor, noise: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor,
                        labels: torch.Tensor, augment_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the teacher's image, and the noise that x_t then has."""
        image, clip = torch.empty_like(x_0), self.space.latent_range
        for u in self.timesteps:
            rows = t == u
            if not rows.any():
                continue
            net, worse = (net and _told(net, augment_labels[rows]) for net in (self.teacher.net, self.teacher.worse))
            steps = max(1, round(self.teacher_steps * (u + 1) / self.scheduler.num_timesteps))
            with autocast(x_t.device, self.precision):
                image[rows] = sample(net, self.scheduler, x_t[rows], sampler="dpm++", steps=steps, start=u,
                                     prediction=self.prediction, labels=labels[rows], guidance=self.teacher.guidance,
                                     worse=worse, clip=clip)
        return image, self.scheduler.to_eps(image, x_t, t)


def _told(net: nn.Module, augment_labels: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return `net` as `sample` calls it, with the augmentation bound; guidance by types asks for each image twice."""
    def network(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return net(x_t, t, labels, augment_labels=augment_labels.repeat(len(x_t) // len(augment_labels), 1))

    return network


def check_objective(config: Any, checkpoint: dict[str, Any] | None) -> None:
    """Raise ValueError for settings that do not go with the objective."""
    if config.objective != CONSISTENCY:
        if SAMPLERS[config.sampler].tuned:
            raise ValueError(f"--sampler {config.sampler} is for a model that is tuned to it: add --objective "
                             f"{CONSISTENCY}, or choose another")
        if config.teacher_guidance:
            raise ValueError(f"--teacher_guidance needs --objective {CONSISTENCY}")
        return
    if checkpoint is not None:
        _check_resumed(config, checkpoint)
    if config.guide_at:
        raise ValueError(f"--guide_at does not go with --objective {CONSISTENCY}: leave it out")
    if config.lognormal or config.loss_weighting != "uniform":
        flag = "--lognormal" if config.lognormal else f"--loss_weighting {config.loss_weighting}"
        raise ValueError(f"{flag} does not go with --objective {CONSISTENCY}, which has a few timesteps, all "
                         f"of the same weight: leave it out")
    for name in ("sample_steps", "teacher_steps"):
        if getattr(config, name) > config.timesteps:
            raise ValueError(f"--{name} must be at most the {config.timesteps} timesteps, not {getattr(config, name)}")
    if checkpoint is None and not config.init:
        raise ValueError(f"--objective {CONSISTENCY} tunes a model: name the checkpoint of one that predicts v with "
                         f"--init")
    if config.prediction != "v":
        raise ValueError(f"--objective {CONSISTENCY} needs --prediction v, and the other flags that the model of "
                         f"--init was trained with")
    if not SAMPLERS[config.sampler].tuned:
        raise ValueError(f"--objective {CONSISTENCY} needs --sampler consistency: a tuned model jumps, and the small "
                         f"steps of {config.sampler} are not for it")


def _check_resumed(config: Any, checkpoint: dict[str, Any]) -> None:
    """Raise ValueError for a tuning that cannot be continued, or not with these settings."""
    teacher, jumps = checkpoint.get("teacher"), checkpoint["config"]["sample_steps"]
    if not isinstance(teacher, dict) or not any(name.startswith("net.") for name in teacher):
        raise ValueError("this tuning was begun by a version of PokeDiff that tuned in another way: start a new one")
    if config.sample_steps != jumps:
        raise ValueError(f"--sample_steps {config.sample_steps} would tune other timesteps: this tuning is to {jumps} "
                         f"jumps; give --sample_steps {jumps}, or leave it and --preset out")
    _check_guided_once(config)


def _check_guided_once(config: Any) -> None:
    if config.guidance != 1 and config.teacher_guidance != 1:
        raise ValueError(f"--guidance {config.guidance:g}: guidance {config.teacher_guidance:g} is built in by the "
                         f"tuning, and the sample grids need no other: leave it out")


def check_tunable(config: Any, start: Pipeline) -> None:
    """Raise ValueError for a model of --init that cannot be the teacher; fill in the guidance that it draws with."""
    if start.prediction != "v":
        raise ValueError(f"--init {config.init} predicts {start.prediction}, and --objective {CONSISTENCY} needs a "
                         f"model that predicts v: train one with --prediction v")
    if start.tuned:
        raise ValueError(f"--init {config.init} is tuned already and cannot be the teacher: give the model that it was "
                         f"tuned from")
    config.teacher_guidance = config.teacher_guidance or start.default_guidance(has_types=True)
    if config.teacher_guidance != 1 and not start.guides:
        raise ValueError(f"--teacher_guidance {config.teacher_guidance:g} needs a model that was trained with "
                         f"--guide_at, or with types and --label_dropout above 0, and {config.init} was not: leave it "
                         f"out")
    _check_guided_once(config)
