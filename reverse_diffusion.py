"""The reverse process: from noise to images, by one of the samplers in `SAMPLERS`.

    images = sample(model, scheduler, torch.randn(16, 3, 64, 64), sampler="ddim", steps=50)

Seeds, devices and latents are the business of models/pipeline.py; DIFFUSION_THEORY.md derives every sampler. A new
sampler with one network pass a step is a step function and a line in `SAMPLERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forward_diffusion import NoiseScheduler

VARIANCES = ("beta_tilde", "beta")
Previous = tuple[int, torch.Tensor]  # timestep and predicted x_0 of the step before


# ---------------------------------------------------------------------------------------------------------------------
# steps: each goes from x_t to x_s, where s = t_next < t and s = -1 is the clean image, and returns the mean of x_s
# (a tensor) and the standard deviation of the noise to add (a number)


def ddpm_step(scheduler: NoiseScheduler, x_0: torch.Tensor, x_t: torch.Tensor, t: int, t_next: int,
              previous: Previous | None = None, variance: str = "beta_tilde") -> tuple[torch.Tensor, float]:
    """Ancestral sampling: draw from q(x_s | x_t, x_0), for s = t-1 eq. 6 and 7 of Ho et al. (2020).

    The same formulas with alpha = alpha-bar_t / alpha-bar_s hold when timesteps are skipped. The variance
    "beta_tilde" is the posterior's own, exact if there is only one possible image; "beta", which is 1 - alpha, is
    exact for images of standard normal pixels (their section 3.2).
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}: choose one of {', '.join(VARIANCES)}")
    abar_t, abar_s = scheduler.alpha_bar(t), scheduler.alpha_bar(t_next)
    alpha = abar_t / abar_s
    beta = 1 - alpha
    mean = (abar_s**0.5 * beta * x_0 + alpha**0.5 * (1 - abar_s) * x_t) / (1 - abar_t)
    return mean, (beta if variance == "beta" else beta * (1 - abar_s) / (1 - abar_t)) ** 0.5


def ddim_step(scheduler: NoiseScheduler, x_0: torch.Tensor, x_t: torch.Tensor, t: int, t_next: int,
              previous: Previous | None = None, eta: float = 0.0) -> tuple[torch.Tensor, float]:
    """DDIM (Song et al. 2021, eq. 12 and 16).

    Mix the predicted image and the predicted noise in the proportion that belongs to s. The fraction of the noise that
    is drawn anew grows with `eta`, from 0 (none) to 1 (as much as ddpm with "beta_tilde").
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], not {eta}")
    abar_t, abar_s = scheduler.alpha_bar(t), scheduler.alpha_bar(t_next)
    fresh = eta**2 * (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)  # variance of the new noise
    kept = max(1 - abar_s - fresh, 0.0)  # rounding must not leave a negative number under the root
    return abar_s**0.5 * x_0 + kept**0.5 * scheduler.to_eps(x_0, x_t, t), fresh**0.5


def dpm_solver_step(scheduler: NoiseScheduler, x_0: torch.Tensor, x_t: torch.Tensor, t: int, t_next: int,
                    previous: Previous | None = None, eta: float = 0.0) -> tuple[torch.Tensor, float]:
    """DPM-Solver++ 2M and, with eta = 1, SDE-DPM-Solver++ 2M (Lu et al. 2022, algorithm 2 and section 5).

    The predicted image keeps moving between t and s. It is extrapolated linearly, in lambda = ln(signal / noise), from
    this prediction and the previous one to the middle of the step; the rest is DDIM. The first step has no previous
    prediction, and the last one, over which lambda grows to infinity, no middle: both are plain DDIM.
    """
    if previous is not None and t_next >= 0:
        t_previous, x_0_previous = previous
        lambda_previous, lambda_t, lambda_s = (_half_log_snr(scheduler, u) for u in (t_previous, t, t_next))
        x_0 = x_0 + (lambda_s - lambda_t) / 2 * (x_0 - x_0_previous) / (lambda_t - lambda_previous)
    return ddim_step(scheduler, x_0, x_t, t, t_next, eta=eta)


def sde_dpm_solver_step(scheduler: NoiseScheduler, x_0: torch.Tensor, x_t: torch.Tensor, t: int, t_next: int,
                        previous: Previous | None = None) -> tuple[torch.Tensor, float]:
    """SDE-DPM-Solver++ 2M (Lu et al. 2022, section 5): second order in law, with as much noise as ddpm."""
    return dpm_solver_step(scheduler, x_0, x_t, t, t_next, previous, eta=1.0)


def consistency_step(scheduler: NoiseScheduler, x_0: torch.Tensor, x_t: torch.Tensor, t: int, t_next: int,
                     previous: Previous | None = None) -> tuple[torch.Tensor, float]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): jump to the end, and put all noise on anew."""
    abar_s = scheduler.alpha_bar(t_next)
    return abar_s**0.5 * x_0, (1 - abar_s) ** 0.5


def _half_log_snr(scheduler: NoiseScheduler, t: int) -> float:
    """Return lambda_t = ln(sqrt(alpha-bar_t) / sqrt(1 - alpha-bar_t)) for t >= 0; -inf for pure noise."""
    abar = scheduler.alpha_bar(t)
    return math.log(abar / (1 - abar)) / 2 if abar > 0 else -math.inf


# ---------------------------------------------------------------------------------------------------------------------
# timesteps


def trailing_timesteps(num_timesteps: int, steps: int | None) -> list[int]:
    """Return `steps` timesteps, evenly spaced and falling, the first at T-1 ("trailing", Lin et al. 2024, table 2)."""
    steps = num_timesteps if steps is None else steps
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must be in 1 ... {num_timesteps}, not {steps}")
    return (np.round(num_timesteps - np.arange(steps) * (num_timesteps / steps)).astype(int) - 1).tolist()


def consistency_timesteps(num_timesteps: int, steps: int | None) -> list[int]:
    """Return `steps` falling timesteps, the first at T-1, for jumps: of 1000, 999 430 or 999 750 430 200.

    Other numbers lie on the same curve, drawn straight between these.
    """
    steps = num_timesteps if steps is None else steps
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must be in 1 ... {num_timesteps}, not {steps}")
    i = np.arange(steps)
    fractions = np.interp(i / steps, (0, 0.25, 0.5, 0.75, 1), (1, 0.75, 0.43, 0.2, 0))
    timesteps = np.minimum(np.round(fractions * num_timesteps).astype(int), num_timesteps - 1)
    timesteps = np.minimum.accumulate(timesteps + i) - i  # no timestep twice, for any number of steps
    return np.maximum(timesteps, steps - 1 - i).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# registry


@dataclass(frozen=True)
class Sampler:
    """Registry entry of a sampler: step function, defaults, options.

    Attributes:
        step: (scheduler, x_0, x_t, t, t_next, previous, **options) -> mean of x_s, standard deviation of the noise.
        steps: default number of passes, see `default_steps`; None: all timesteps. `sample` alone visits all.
        deterministic: adds no noise, unless its options say so.
        options: keyword arguments of `step` that `sample` passes on.
        about: one line for people who choose.
        timesteps: (T, steps) -> the timesteps to visit.
        tuned: for a network that was tuned to few steps, and no other; all other samplers are for any other network.
    """

    step: Callable[..., tuple[torch.Tensor, float]]
    steps: int | None
    deterministic: bool
    options: tuple[str, ...] = ()
    about: str = ""
    timesteps: Callable[[int, int | None], list[int]] = trailing_timesteps
    tuned: bool = False


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm_step, None, False, ("variance",), "the reverse process of Ho et al. (2020)"),
    "ddim": Sampler(ddim_step, 50, True, ("eta",), "deterministic, first order (Song et al. 2021)"),
    "dpm++": Sampler(dpm_solver_step, 20, True, (), "deterministic, second order (Lu et al. 2022)"),
    "sde-dpm++": Sampler(sde_dpm_solver_step, 20, False, (), "with noise, second order (Lu et al. 2022)"),
    "consistency": Sampler(consistency_step, 2, False, (), "few jumps, for a network that was tuned to them (Song et "
                           "al. 2023)", consistency_timesteps, tuned=True),
}


def find_sampler(name: str) -> Sampler:
    """Return the entry of `SAMPLERS`. Raises ValueError for an unknown name."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def default_steps(sampler: str, num_timesteps: int) -> int:
    """Return a sampler's default number of steps."""
    return min(find_sampler(sampler).steps or num_timesteps, num_timesteps)


# ---------------------------------------------------------------------------------------------------------------------
# inpainting


@dataclass(frozen=True)
class Inpainting:
    """What is kept of an image, while the rest is drawn to fit it (RePaint, Lugmayr et al. 2022, algorithm 1).

    At every timestep, the kept pixels of x_t are those of the image with that timestep's noise. The network sees them
    and continues them. But the rest of x_t was drawn before this step's noise of the kept pixels was, so it never quite
    fits. Hence parts of the reverse process are repeated: back up to more noise, and down again from there.

    Attributes:
        x_0: the clean image, [1, C, H, W] or [B, C, H, W].
        redraw: boolean, broadcasts to x_0: true where the image is drawn anew.
        resample: how often each part is run, at least 1. 1 is the plain replacement of the kept pixels.
        jump: steps in a part. None: a 25th of all steps, as in the paper (10 of 250), and at least 2, without which no
            step of a second-order sampler would have a previous one.
    """

    x_0: torch.Tensor
    redraw: torch.Tensor
    resample: int = 10
    jump: int | None = None

    def keep(self, scheduler: NoiseScheduler, x_t: torch.Tensor, t: int, noise: torch.Tensor | None) -> torch.Tensor:
        """Return x_t with the kept pixels of the image, at the noise of timestep t; t = -1 is clean (eq. 8)."""
        kept = self.x_0 if t == -1 else scheduler.add_noise(self.x_0, t, noise)
        return torch.where(self.redraw, x_t, kept)


def repeat_parts(path: list[tuple[int, int]], resample: int, jump: int | None = None) -> list[tuple[int, int]]:
    """Return the steps (t, t_next) of the reverse process with each part of `jump` steps `resample` times.

    Steps that fill no part are the noisiest, and are made once; so is the last one, to the clean image. See
    `Inpainting` for the arguments.

    Raises:
        ValueError: for a number below 1.
    """
    jump = max(2, round(len(path) / 25)) if jump is None else jump
    if resample < 1 or jump < 1:
        raise ValueError(f"resample and jump must be at least 1, not {resample} and {jump}")
    *path, last = path
    first = len(path) % jump
    repeated = path[:first]
    for i in range(first, len(path), jump):
        repeated += resample * path[i : i + jump]
    return [*repeated, last]


# ---------------------------------------------------------------------------------------------------------------------
# the reverse process


@torch.no_grad()
def sample(model: Callable[..., torch.Tensor], scheduler: NoiseScheduler, x_T: torch.Tensor, *,
           sampler: str = "ddpm", steps: int | None = None, prediction: str = "eps",
           labels: torch.Tensor | None = None, guidance: float = 1.0, worse: Callable[..., torch.Tensor] | None = None,
           start: int | None = None, timesteps: Sequence[int] | None = None, clip: bool | float = True,
           inpainting: Inpainting | None = None, draw_noise: Callable[[], torch.Tensor] | None = None,
           callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
           **options: float | str) -> torch.Tensor:
    """Run the reverse process from x_T, standard normal [B, C, H, W], to images of the same shape.

    Args:
        model: any callable (x_t, t) -> output of the shape of x_t, or (x_t, t, labels) where labels are given; t is an
            integer tensor [B].
        sampler: a key of `SAMPLERS`.
        steps: number of network passes, 1 ... T (1 ... start + 1 with `start`); None means all.
        prediction: what the output means: "eps", "v" or "x0".
        labels: multi-hot [B, K]; a row of zeros is unconditional. None: the model takes no labels.
        guidance: scale of the guidance: output = worse output + guidance * (output - worse output). 1 is the model's
            own output, in one pass; any other scale takes two.
        worse: a worse model (Karras et al. 2024). None: the model itself without labels (Ho & Salimans 2022).
        start: the timestep of x_T, 0 ... T-1; None means T-1. Below that, x_T is an image to which
            `NoiseScheduler.add_noise` added that timestep's noise (SDEdit, Meng et al. 2022).
        timesteps: the timesteps to visit, falling, in place of `steps` and `start`; None: as the sampler spaces them.
        clip: keep each predicted x_0 within [-1, 1], or within plus and minus another number; eps is derived again
            from the clipped x_0. Without it, the errors of an eps network at large t (multiplied by up to 157 on the
            linear schedule, and more on the cosine one) end as black or garish images.
        inpainting: what to keep of an image; `repeat_parts` then repeats parts of the path.
        draw_noise: returns the noise of the next step, shaped as x_T. None: torch's global generator.
        callback: called after each pass with (its number from 0, x_t, predicted x_0).
        options: of the sampler: `eta` for ddim, `variance` for ddpm.

    Returns:
        Images, in [-1, 1] where `clip` is on, or in its range.

    Raises:
        ValueError: for an unknown sampler, option or prediction, for steps, start or timesteps out of range, for a
            number of label rows other than B, for guidance that is not finite or has neither labels nor a worse model,
            and for predicting eps from a timestep of zero SNR.
    """
    chosen = find_sampler(sampler)
    if unknown := options.keys() - set(chosen.options):
        raise ValueError(f"sampler {sampler} has no option {', '.join(sorted(unknown))}")
    path = _path(scheduler.num_timesteps, start, steps, chosen.timesteps, timesteps)
    network = guided(model, worse, x_T, labels, guidance)
    draw_noise = draw_noise or (lambda: torch.randn_like(x_T))

    x_t, now, previous = x_T, path[0][0], None
    if inpainting is not None:
        path = repeat_parts(path, inpainting.resample, inpainting.jump)
        x_t = inpainting.keep(scheduler, x_T, now, draw_noise())
    for i, (t, t_next) in enumerate(path):
        # Where inpainting repeats a part of the path, go back up.
        if t > now:
            x_t, previous = scheduler.add_more_noise(x_t, now, t, draw_noise()), None

        # Predict the clean image.
        t_batch = torch.full((len(x_t),), t, device=x_t.device)
        x_0 = scheduler.to_x_0(prediction, network(x_t, t_batch).to(x_t.dtype), x_t, t_batch)
        if clip:
            x_0 = x_0.clamp(-clip, clip)  # True is 1

        # Go to the next timestep. The last step, to the clean image, adds no noise.
        mean, std = chosen.step(scheduler, x_0, x_t, t, t_next, previous, **options)
        noise = draw_noise() if t_next >= 0 and (std > 0 or inpainting is not None) else None
        x_t = mean if noise is None else mean + std * noise
        if inpainting is not None:
            x_t = inpainting.keep(scheduler, x_t, t_next, noise)
        now, previous = t_next, (t, x_0)
        if callback is not None:
            callback(i, x_t, x_0)
    return x_t


def _path(num_timesteps: int, start: int | None, steps: int | None, space: Callable[[int, int | None], list[int]],
          timesteps: Sequence[int] | None) -> list[tuple[int, int]]:
    """Return the steps (t, t_next) from `start` to the clean image, where t_next is -1. Raises ValueError."""
    start = num_timesteps - 1 if start is None else start
    if not 0 <= start < num_timesteps:
        raise ValueError(f"start must be in 0 ... {num_timesteps - 1}, not {start}")
    timesteps = space(start + 1, steps) if timesteps is None else list(timesteps)
    falling = [num_timesteps, *timesteps, -1]
    if not timesteps or not all(t > s for t, s in zip(falling, falling[1:])):
        raise ValueError(f"timesteps must fall, from {num_timesteps - 1} or less to 0 or more, not "
                         f"{' '.join(map(str, timesteps)) or '(none)'}")
    return list(zip(timesteps, timesteps[1:] + [-1]))


def guided(model: Callable, worse: Callable | None, x_T: torch.Tensor, labels: torch.Tensor | None, guidance: float
           ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return (x_t, t) -> output, with labels and guidance bound; the arguments are those of `sample`."""
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, not {guidance}")
    if guidance != 1 and labels is None and worse is None:
        raise ValueError(f"guidance {guidance} needs labels, and there are none: leave it at 1")
    if labels is not None and len(labels) != len(x_T):
        raise ValueError(f"{len(labels)} rows of labels for {len(x_T)} images")
    inputs = () if labels is None else (labels.to(x_T.device),)
    if guidance == 1:
        return lambda x_t, t: model(x_t, t, *inputs)

    if worse is not None:
        def both_outputs(x_t: torch.Tensor, t: torch.Tensor) -> Sequence[torch.Tensor]:
            return model(x_t, t, *inputs), worse(x_t, t, *inputs)
    else:
        both_labels = torch.cat([inputs[0], torch.zeros_like(inputs[0])])

        def both_outputs(x_t: torch.Tensor, t: torch.Tensor) -> Sequence[torch.Tensor]:
            return model(torch.cat([x_t, x_t]), torch.cat([t, t]), both_labels).chunk(2)

    def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        output, worse_output = (part.to(x_t.dtype) for part in both_outputs(x_t, t))
        return worse_output + guidance * (output - worse_output)

    return network


def slerp(a: torch.Tensor, b: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """Interpolate from a (weight 0) to b (weight 1) along the arc between them, each [..., C, H, W].

    A straight line between two noises passes through noise of too low a norm for the network; the arc keeps the norm
    (Shoemake 1985; for diffusion Song, Meng & Ermon 2021, section 5.3). Where there is no arc, because the two point
    the same way or opposite ways, it is the straight line. `weight` is a number, or a tensor that broadcasts.
    """
    x, y = a.flatten(-3), b.flatten(-3)
    cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    angle = cosine.clamp(-1, 1).acos()[..., None, None, None]
    arc = (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / angle.sin()
    return torch.where(angle.sin() > 1e-3, arc, (1 - weight) * a + weight * b)
