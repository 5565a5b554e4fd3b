"""From noise to image: the samplers. Each walks from x_T, which is pure noise, to x_0, a picture.

    images = sample(model, scheduler, torch.randn(16, 3, 64, 64), sampler="ddim", steps=50)
    images = sample_seeds(model, scheduler, range(16), 64, "cuda", "bf16", sampler="ddim", steps=50)

`generate.py` is the command around this file; DIFFUSION_THEORY.md derives both samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from devices import autocast, memory_format
from forward_diffusion import NoiseScheduler, seed_from

SAMPLERS = ("ddpm", "ddim")


@torch.no_grad()
def sample(
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: NoiseScheduler,
    x_T: torch.Tensor,
    *,
    sampler: str = "ddpm",
    steps: int | None = None,
    prediction: str = "eps",
    types: torch.Tensor | None = None,
    guidance: float = 1.0,
    eta: float = 0.0,
    seeds: Sequence[int] | None = None,
    clip: bool = True,
    callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Run the reverse process from x_T, standard normal [B, C, H, W], to images of the same shape.

    Args:
        model: any callable (x_t, t) -> output of the shape of x_t; t is an integer tensor [B].
        sampler: "ddpm" draws from the posterior at each step (Ho et al. 2020, algorithm 2); "ddim" is deterministic
            for eta = 0 and loses little in few steps (Song et al. 2021, eq. 12).
        steps: number of network passes, 1 ... T; None means all T.
        prediction: what the output means: "eps", "v" or "x0".
        eta: noise that ddim adds, from 0 (none) to 1 (as much as ddpm).
        seeds: one integer an image; the noise added to an image then depends on its own seed alone, whatever the
            batch around it. None: noise from torch's global generator.
        clip: keep each predicted clean image within [-1, 1]; eps is derived again from what was kept. Without it the
            errors of an eps network at large t (multiplied by up to 157 on the linear schedule, and more on the cosine
            one) end as black or garish pictures.
        callback: called after each step with (step number from 0, x_t, predicted x_0).

    Returns:
        Images, in [-1, 1] where `clip` is on.

    Raises:
        ValueError: for an unknown sampler or prediction, steps outside of 1 ... T, or eta outside of [0, 1].
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], not {eta}")
    timesteps = trailing_timesteps(scheduler.num_timesteps, steps)
    draw = _noise_source(x_T, seeds)

    x_t = x_T
    for i, (t, s) in enumerate(zip(timesteps, timesteps[1:] + [-1])):  # one step goes from t to the less noisy s
        t_batch = torch.full((len(x_t),), t, device=x_t.device)
        output = _guided(model, x_t, t_batch, types, guidance).to(x_t.dtype)
        x_0 = scheduler.to_x_0(prediction, output, x_t, t_batch)
        if clip:
            x_0 = x_0.clamp(-1, 1)
        if sampler == "ddpm":
            mean, std = posterior(scheduler, x_0, x_t, t, s)
        else:
            mean, std = ddim_step(scheduler, x_0, scheduler.to_eps(x_0, x_t, t_batch), t, s, eta)
        x_t = mean + std * draw() if std > 0 else mean  # the last step, to the clean image, adds nothing
        if callback is not None:
            callback(i, x_t, x_0)
    return x_t


def sample_seeds(
    model: torch.nn.Module,
    scheduler: NoiseScheduler,
    seeds: Sequence[int],
    image_size: int,
    device: torch.device,
    precision: str,
    *,
    types: torch.Tensor | None = None,
    batch_size: int = 64,
    **options,
) -> torch.Tensor:
    """Images [len(seeds), 3, image_size, image_size] in [-1, 1], float32 on the CPU, drawn in batches on the device.

    Image i depends on seeds[i] alone. `options` go to `sample`.
    """

    def network(x_t: torch.Tensor, t: torch.Tensor, *types: torch.Tensor) -> torch.Tensor:
        with autocast(device, precision):
            return model(x_t.contiguous(memory_format=memory_format(device)), t, *types)

    images = []
    for i in range(0, len(seeds), batch_size):
        batch = seeds[i : i + batch_size]
        x_T = seeded_noise(batch, (3, image_size, image_size), device)
        batch_types = None if types is None else types[i : i + batch_size].to(device)
        images.append(sample(network, scheduler, x_T, seeds=batch, types=batch_types, **options).float().cpu())
    return torch.cat(images)


def _guided(model, x_t: torch.Tensor, t: torch.Tensor, types: torch.Tensor | None, guidance: float) -> torch.Tensor:
    """The network's output, pushed away from what it would say of images of any type (Ho & Salimans 2022)."""
    if types is None:
        return model(x_t, t)
    if guidance == 1:
        return model(x_t, t, types)
    both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([types, torch.zeros_like(types)]))
    of_types, of_any = both.chunk(2)
    return of_any + guidance * (of_types - of_any)


def posterior(scheduler: NoiseScheduler, x_0: torch.Tensor, x_t: torch.Tensor, t: int, s: int):
    """Mean (a tensor) and standard deviation (a number) of q(x_s | x_t, x_0), for s < t; s = -1 is the clean image.

    For s = t-1 these are eq. 6 and 7 of Ho et al. (2020), with the variance beta-tilde; the same formulas with
    alpha = alpha-bar_t / alpha-bar_s hold when steps are left out.
    """
    abar_t, abar_s = scheduler.alpha_bar(t), scheduler.alpha_bar(s)
    alpha = abar_t / abar_s
    beta = 1 - alpha
    mean = (abar_s**0.5 * beta * x_0 + alpha**0.5 * (1 - abar_s) * x_t) / (1 - abar_t)
    return mean, (beta * (1 - abar_s) / (1 - abar_t)) ** 0.5


def ddim_step(scheduler: NoiseScheduler, x_0: torch.Tensor, eps: torch.Tensor, t: int, s: int, eta: float):
    """Mean and standard deviation of DDIM's step from t to s (Song et al. 2021, eq. 12 and 16).

    It mixes the two things that x_t was made of, the predicted image and the predicted noise, in the proportion that
    belongs to s. Part of the noise, as told by eta, is drawn anew.
    """
    abar_t, abar_s = scheduler.alpha_bar(t), scheduler.alpha_bar(s)
    std = eta * ((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)) ** 0.5
    return abar_s**0.5 * x_0 + (1 - abar_s - std**2) ** 0.5 * eps, std


def trailing_timesteps(num_timesteps: int, steps: int | None) -> list[int]:
    """`steps` timesteps, evenly spaced and falling, the first at T-1 ("trailing", Lin et al. 2024, table 2)."""
    steps = num_timesteps if steps is None else steps
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must be in 1 ... {num_timesteps}, not {steps}")
    return (np.round(num_timesteps - np.arange(steps) * (num_timesteps / steps)).astype(int) - 1).tolist()


def seeded_noise(seeds: Iterable[int], shape: tuple[int, ...], device: str | torch.device = "cpu") -> torch.Tensor:
    """Standard normal noise [B, *shape], image i from seeds[i] alone, the same on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)


def _noise_source(x_T: torch.Tensor, seeds: Sequence[int] | None) -> Callable[[], torch.Tensor]:
    """A function that draws the noise of the next step, shaped as x_T."""
    if seeds is None:
        return lambda: torch.randn_like(x_T)
    if len(seeds) != len(x_T):
        raise ValueError(f"{len(seeds)} seeds for {len(x_T)} images")
    # Not seeded with the seed itself, which made x_T: the first step's noise would be x_T over again.
    generators = [torch.Generator().manual_seed(seed_from(seed, stream="steps")) for seed in seeds]

    def draw() -> torch.Tensor:
        noise = [torch.randn(x_T.shape[1:], generator=generator, dtype=x_T.dtype) for generator in generators]
        return torch.stack(noise).to(x_T.device)

    return draw
