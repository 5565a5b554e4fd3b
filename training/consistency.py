"""Tuning to few steps: a trained model learns to draw in a few jumps what it draws now. The loss; checks of settings.

    python train.py --objective consistency --init checkpoints/final_model.pt ...       # see docs/few_steps.md
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.pipeline import Pipeline
from reverse_diffusion import SAMPLERS, consistency_timesteps, guided, sample
from training.loss import DiffusionLoss, draw_timesteps, to_x_0
from utils.device import autocast

CONSISTENCY = "consistency"
OBJECTIVES = ("denoising", CONSISTENCY)

PATH_FRACTION = 1 / 4  # of the images have their paths followed; for all, that would be half the cost of a step
PATH_WEIGHT = 1 / 4  # of their loss. With a weight of 1 images are less sharp, with 0 modes collapse
CRITIC_RATE = 2.0  # learning rate of the critic in units of the network's highest; it does not fall with that
NETWORK_BETAS = (0.5, 0.999)  # of its Adam; with the usual momentum of 0.9 images are less sharp
MATCHED = (0.02, 0.98)  # fractions of T, between which drawn images are judged (Yin et al. 2024)


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

    def with_augmentation(self, augment_labels: torch.Tensor) -> tuple[Callable[..., torch.Tensor] | None, ...]:
        """Return `net` and `worse` with the augmentation bound."""
        return with_augmentation(self.net, augment_labels), self.worse and with_augmentation(self.worse, augment_labels)


@dataclass
class ConsistencyLoss(DiffusionLoss):
    """What tunes a network to draw in a few jumps: distribution matching, the ends of paths, and a critic's own loss.

    *Distribution matching* (Yin et al. 2024): the network draws an image, noise is put on it, and two others predict
    the image from that: the teacher, who knows what the data are like, and the critic, who knows what the network
    draws. Where they differ, the network draws too much or too little of something, and the image moves by the
    difference. *Ends of paths* (Luhman & Luhman 2021): to where a deterministic sampler of the teacher leads from x_t,
    the network is to jump at once; this keeps it from mode collapse. *The critic* learns to denoise what
    the network draws.

    Attributes:
        teacher: what it draws is to be drawn in few jumps, with its guidance.
        critic: a copy of the network, to be trained with it.
        teacher_steps: steps of dpm++ that lead to the end of a path from the last timestep; in proportion fewer from
            others, at least one.
        jumps: number of timesteps, those of `consistency_timesteps`.
    """

    teacher: Teacher = field(kw_only=True)
    critic: nn.Module = field(kw_only=True)
    teacher_steps: int = 8
    jumps: int = 2

    def __post_init__(self):
        self.timesteps = consistency_timesteps(self.scheduler.num_timesteps, self.jumps)

    def parameter_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """Return the network, whose target moves, and the critic, which has to keep up with it to the end."""
        return [dict(params=net.parameters(), betas=NETWORK_BETAS),
                dict(params=self.critic.parameters(), rate=CRITIC_RATE)]

    # -----------------------------------------------------------------------------------------------------------------
    # randomness

    def draw_randomness(self, batch_size: int, generator: torch.Generator, step: int) -> tuple[torch.Tensor, ...]:
        """Draw what the denoising loss needs, and more.

        Returns:
            augment_rand, t, noise and keep_label, see `DiffusionLoss`.
            path_weight: [B], of the loss for ends of paths; 0 for images without it, whose paths are not followed. They
                are chosen from the whole batch, so a process's part can have none or all of them.
            jump_noise: [B, jumps, C, H, W]: pure noise, and what is put on after each jump but the last.
            levels: timesteps [B, 2] of the noise that is put on drawn images: where the critic learns from them, and
                where teacher and critic judge them.
            level_noise: [B, 2, C, H, W], that noise.
        """
        augment_rand, t, noise, keep_label = super().draw_randomness(batch_size, generator, step)
        options = dict(generator=generator, device=generator.device)
        with_path = torch.randperm(batch_size, **options) < PATH_FRACTION * batch_size
        path_weight = PATH_WEIGHT * with_path / with_path.float().mean()
        jump_noise = torch.randn(batch_size, self.jumps, *noise.shape[1:], **options)
        T = self.scheduler.num_timesteps
        low, high = (round(T * end) for end in MATCHED)
        levels = torch.stack([draw_timesteps(batch_size, T, generator),
                              low + draw_timesteps(batch_size, high - low, generator)], dim=1)
        level_noise = torch.randn(batch_size, 2, *noise.shape[1:], **options)
        return augment_rand, t, noise, keep_label, path_weight, jump_noise, levels, level_noise

    def draw_timesteps(self, batch_size: int, generator: torch.Generator, step: int) -> torch.Tensor:
        """Return timesteps [B] that take turns, over the images and over the steps."""
        turns = (torch.arange(batch_size) + step) % self.jumps
        return torch.tensor(self.timesteps)[turns].to(generator.device)

    # -----------------------------------------------------------------------------------------------------------------
    # the loss

    def __call__(self, net: nn.Module, images: torch.Tensor, labels: torch.Tensor, augment_rand: torch.Tensor,
                 t: torch.Tensor, noise: torch.Tensor, keep_label: torch.Tensor, path_weight: torch.Tensor,
                 jump_noise: torch.Tensor, levels: torch.Tensor, level_noise: torch.Tensor) -> torch.Tensor:
        """Return the sum of the three losses; images and labels as in `DiffusionLoss`, the rest of `draw_randomness`.

        The images of the data are where paths begin; images are drawn with their labels and augmentation, from noise.
        """
        x_0, augment_labels = to_x_0(images, augment_rand, self.augment, self.space, self.precision)
        conditions = (labels * keep_label, augment_labels)
        with_path = path_weight > 0
        path = [x[with_path] for x in (self.scheduler.add_noise(x_0, t, noise), t, *conditions)]

        # One pass of the network, for drawn images and for paths.
        drawn = [self.before_last_jump(net, t, jump_noise, *conditions), t, *conditions]
        x_t, both_t, both_labels, both_augment_labels = (torch.cat(parts) for parts in zip(drawn, path))
        with autocast(x_t.device, self.precision):
            output = net(x_t, both_t, both_labels, augment_labels=both_augment_labels).float()
        output, path_output = output.split([len(t), len(path[0])])
        image = self.scheduler.to_x_0(self.prediction, output, drawn[0], t)

        matching_loss = self.matching_loss(image, levels[:, 1], level_noise[:, 1], *conditions)
        critic_loss = self.error(self.critic, image.detach(), levels[:, 0], level_noise[:, 0], *conditions).mean()
        path_error = F.mse_loss(path_output, self.path_target(*path), reduction="none").mean(dim=(1, 2, 3))
        return matching_loss + critic_loss + (path_weight[with_path] * path_error).sum() / len(t)

    @torch.no_grad()
    def before_last_jump(self, net: nn.Module, t: torch.Tensor, jump_noise: torch.Tensor, labels: torch.Tensor,
                         augment_labels: torch.Tensor) -> torch.Tensor:
        """Return x_t as the sampler `consistency` comes to it, from pure noise by the jumps above t."""
        x_t = jump_noise[:, 0].clone()
        for number, (higher, lower) in enumerate(zip(self.timesteps, self.timesteps[1:]), 1):
            rows = t < higher
            if not rows.any():
                break
            u = torch.full_like(t[rows], higher)
            with autocast(x_t.device, self.precision):
                output = net(x_t[rows], u, labels[rows], augment_labels=augment_labels[rows]).float()
            image = self.clamp(self.scheduler.to_x_0(self.prediction, output, x_t[rows], u))
            x_t[rows] = self.scheduler.add_noise(image, lower, jump_noise[rows, number])
        return x_t

    def matching_loss(self, image: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor,
                      augment_labels: torch.Tensor) -> torch.Tensor:
        """Return a loss whose gradient moves drawn images to where the teacher sees more of the data (theory, eq. 50).

        Args:
            image: drawn by the network, with its gradient.
            t, noise: what is put on it, to be judged.
        """
        with torch.no_grad():
            x_t = self.scheduler.add_noise(image, t, noise)
            teacher = guided(*self.teacher.with_augmentation(augment_labels), x_t, labels, self.teacher.guidance)
            critic = guided(with_augmentation(self.critic, augment_labels), None, x_t, labels, 1.0)
            with autocast(x_t.device, self.precision):
                teacher_x_0, critic_x_0 = (self.scheduler.to_x_0(self.prediction, network(x_t, t).float(), x_t, t)
                                           for network in (teacher, critic))
            teacher_x_0, critic_x_0 = self.clamp(teacher_x_0), self.clamp(critic_x_0)
            # By the teacher's distance to the image, so that all timesteps weigh alike.
            distance = (teacher_x_0 - image).abs().mean(dim=(1, 2, 3), keepdim=True)
            difference = (critic_x_0 - teacher_x_0) / distance.clamp(min=1e-3)
        return F.mse_loss(image, image.detach() - difference) / 2

    @torch.no_grad()
    def path_target(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, augment_labels: torch.Tensor
                    ) -> torch.Tensor:
        """Return what the network should predict at x_t to jump to the image that the teacher draws from there."""
        image = torch.empty_like(x_t)
        for u in self.timesteps:
            rows = t == u
            if not rows.any():
                continue
            net, worse = self.teacher.with_augmentation(augment_labels[rows])
            steps = max(1, round(self.teacher_steps * (u + 1) / self.scheduler.num_timesteps))
            with autocast(x_t.device, self.precision):
                image[rows] = sample(net, self.scheduler, x_t[rows], sampler="dpm++", steps=steps, start=u,
                                     prediction=self.prediction, labels=labels[rows], guidance=self.teacher.guidance,
                                     worse=worse, clip=self.space.latent_range)
        return self.scheduler.target(self.prediction, image, t, self.scheduler.to_eps(image, x_t, t))

    def clamp(self, image: torch.Tensor) -> torch.Tensor:
        """Clamp as samplers do."""
        limit = self.space.latent_range
        return image.clamp(-limit, limit)


def with_augmentation(net: nn.Module, augment_labels: torch.Tensor) -> Callable[..., torch.Tensor]:
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
    jumps = checkpoint["config"]["sample_steps"]
    if not {"teacher", "critic"} <= checkpoint.keys():
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
