"""From noise to image: the samplers. Each walks from x_T, which is pure noise, to x_0, a picture.

    images = sample(model, scheduler, torch.randn(16, 3, 64, 64), sampler="ddim", steps=50)
    images = sample_seeds(model, scheduler, range(16), 64, pick_device(), "bf16", sampler="dpm++", steps=20)

`generate.py` is the command around this file; DIFFUSION_THEORY.md derives every sampler.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from devices import Recorded, autocast, memory_format
from forward_diffusion import NoiseScheduler, seed_from
from latents import Autoencoder, Pixels

SAMPLERS = ("ddpm", "ddim", "dpm++", "sde-dpm++")
VARIANCES = ("beta_tilde", "beta")
DEFAULT_GUIDANCE = 3.0  # where types are asked for


@torch.no_grad()
def sample(
    model: Callable[..., torch.Tensor],
    scheduler: NoiseScheduler,
    x_T: torch.Tensor,
    *,
    sampler: str = "ddpm",
    steps: int | None = None,
    prediction: str = "eps",
    types: torch.Tensor | None = None,
    guidance: float = 1.0,
    eta: float = 0.0,
    variance: str = "beta_tilde",
    seeds: Sequence[int] | None = None,
    start: int | None = None,
    clip: bool | float = True,
    callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Run the reverse process from x_T, standard normal [B, C, H, W], to images of the same shape.

    Args:
        model: any callable (x_t, t) -> output of the shape of x_t, or (x_t, t, types) where types are given; t is an
            integer tensor [B].
        sampler: "ddpm" draws from the posterior at each step (Ho et al. 2020, algorithm 2); "ddim" is deterministic
            for eta = 0 and loses little in few steps (Song et al. 2021, eq. 12); "dpm++" is deterministic, and of
            second order (DPM-Solver++ 2M, Lu et al. 2022, algorithm 2); "sde-dpm++" is of second order in the law of
            x_s, and draws as much noise as "ddpm" with "beta_tilde" (SDE-DPM-Solver++ 2M, their section 5).
        steps: number of network passes, 1 ... T (1 ... start + 1 with `start`); None means all.
        prediction: what the output means: "eps", "v" or "x0".
        types: [B, K], what each image is to show; a row of zeros asks for anything. None: a model without types.
        guidance: how far to go from what the model says of anything to what it says of these types, and beyond
            (classifier-free guidance, Ho & Salimans 2022): output = of anything + guidance * (of the types - of
            anything). 1 is the types' own output, in one pass; any other number doubles the batch.
        eta: noise that ddim adds, from 0 (none) to 1 (as much as ddpm with "beta_tilde").
        variance: of the noise that ddpm adds: "beta_tilde" or "beta" (Ho et al. 2020, section 3.2), see `posterior`.
        seeds: one integer an image; the noise added to an image then depends on its own seed alone, whatever the
            batch around it. None: noise from torch's global generator.
        start: the timestep of x_T, 0 ... T-1; None means T-1. Below that, x_T is a picture to which
            `NoiseScheduler.add_noise` added that timestep's noise, and the result resembles it (SDEdit, Meng et al.
            2022).
        clip: keep each predicted clean image within [-1, 1], or within plus and minus another number; eps is derived
            again from what was kept. Without it the errors of an eps network at large t (multiplied by up to 157 on
            the linear schedule, and more on the cosine one) end as black or garish pictures.
        callback: called after each step with (step number from 0, x_t, predicted x_0).

    Returns:
        Images, in [-1, 1] where `clip` is on, or in its range.

    Raises:
        ValueError: for an unknown sampler, prediction or variance, for steps, eta or start outside of the ranges above,
            for other than one seed and one row of types an image, for guidance that is not finite or has no types, and
            for predicting eps from a timestep of zero SNR.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}: choose one of {', '.join(VARIANCES)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], not {eta}")
    start = scheduler.num_timesteps - 1 if start is None else start
    if not 0 <= start < scheduler.num_timesteps:
        raise ValueError(f"start must be in 0 ... {scheduler.num_timesteps - 1}, not {start}")
    timesteps = trailing_timesteps(start + 1, steps)
    network = _guided(model, x_T, types, guidance)
    draw = _noise_source(x_T, seeds)

    x_t, before = x_T, None
    for i, (t, s) in enumerate(zip(timesteps, timesteps[1:] + [-1])):  # one step goes from t to the less noisy s
        t_batch = torch.full((len(x_t),), t, device=x_t.device)
        x_0 = scheduler.to_x_0(prediction, network(x_t, t_batch).to(x_t.dtype), x_t, t_batch)
        if clip:
            x_0 = x_0.clamp(-clip, clip)  # True is 1
        if sampler == "ddpm":
            mean, std = posterior(scheduler, x_0, x_t, t, s, variance)
        elif sampler == "ddim":
            mean, std = ddim_step(scheduler, x_0, x_t, t, s, eta)
        else:
            mean, std = dpm_solver_step(scheduler, x_0, x_t, t, s, before, eta=1.0 if sampler == "sde-dpm++" else 0.0)
        x_t = mean + std * draw() if s >= 0 and std > 0 else mean  # the last step, to the clean image, adds nothing
        before = t, x_0
        if callback is not None:
            callback(i, x_t, x_0)
    return x_t


# The steps. Each goes from x_t to x_s, where s < t and s = -1 is the clean image, and returns the mean of x_s (a
# tensor) and the standard deviation of the noise to add (a number).


def posterior(
    scheduler: NoiseScheduler, x_0: torch.Tensor, x_t: torch.Tensor, t: int, s: int, variance: str = "beta_tilde"
):
    """The step of "ddpm": q(x_s | x_t, x_0), for s = t-1 eq. 6 and 7 of Ho et al. (2020).

    The same formulas with alpha = alpha-bar_t / alpha-bar_s hold when steps are left out. The variance "beta_tilde" is
    the posterior's own, exact if there is only one possible image; "beta", which is 1 - alpha, is exact for images of
    standard normal pixels (their section 3.2).
    """
    abar_t, abar_s = scheduler.alpha_bar(t), scheduler.alpha_bar(s)
    alpha = abar_t / abar_s
    beta = 1 - alpha
    mean = (abar_s**0.5 * beta * x_0 + alpha**0.5 * (1 - abar_s) * x_t) / (1 - abar_t)
    return mean, (beta if variance == "beta" else beta * (1 - abar_s) / (1 - abar_t)) ** 0.5


def ddim_step(scheduler: NoiseScheduler, x_0: torch.Tensor, x_t: torch.Tensor, t: int, s: int, eta: float = 0.0):
    """The step of "ddim" (Song et al. 2021, eq. 12 and 16).

    It mixes the two things that x_t was made of, the predicted image and the predicted noise, in the proportion that
    belongs to s. Part of the noise, as told by eta, is drawn anew.
    """
    abar_t, abar_s = scheduler.alpha_bar(t), scheduler.alpha_bar(s)
    fresh = eta**2 * (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)  # variance of the new noise
    kept = max(1 - abar_s - fresh, 0.0)  # rounding must not leave less than 0 under the root
    return abar_s**0.5 * x_0 + kept**0.5 * scheduler.to_eps(x_0, x_t, t), fresh**0.5


def dpm_solver_step(
    scheduler: NoiseScheduler,
    x_0: torch.Tensor,
    x_t: torch.Tensor,
    t: int,
    s: int,
    before: tuple[int, torch.Tensor] | None = None,
    eta: float = 0.0,
):
    """The step of "dpm++" and, with eta = 1, of "sde-dpm++": DPM-Solver++ 2M and SDE-DPM-Solver++ 2M (Lu et al. 2022,
    algorithm 2 and section 5), where `before` is the last step's (t, x_0).

    From t to s the predicted image goes on moving. A straight line through it and the one before, in lambda = ln(signal
    / noise), is followed to the middle of the step, and the image there stands for all of it; the rest is ddim's. The
    first step has none before it, and the last, over which lambda grows to infinity, no middle: they are plain ddim.
    """
    if before is not None and s >= 0:
        t_before, x_0_before = before
        lambda_before, lambda_t, lambda_s = (_half_log_snr(scheduler, u) for u in (t_before, t, s))
        x_0 = x_0 + (lambda_s - lambda_t) / 2 * (x_0 - x_0_before) / (lambda_t - lambda_before)
    return ddim_step(scheduler, x_0, x_t, t, s, eta)


def _half_log_snr(scheduler: NoiseScheduler, t: int) -> float:
    """lambda_t = ln(sqrt(alpha-bar_t) / sqrt(1 - alpha-bar_t)) for t >= 0; minus infinity where there is only noise."""
    abar = scheduler.alpha_bar(t)
    return math.log(abar / (1 - abar)) / 2 if abar > 0 else -math.inf


def _guided(model: Callable, x_T: torch.Tensor, types: torch.Tensor | None, guidance: float) -> Callable:
    """(x_t, t) -> output, with the types and the guidance in it."""
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, not {guidance}")
    if types is None:
        if guidance != 1:
            raise ValueError(f"guidance {guidance} needs types, and there are none: leave it at 1")
        return model
    if len(types) != len(x_T):
        raise ValueError(f"{len(types)} rows of types for {len(x_T)} images")
    types = types.to(x_T.device)
    if guidance == 1:
        return lambda x_t, t: model(x_t, t, types)
    both = torch.cat([types, torch.zeros_like(types)])

    def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        of_types, of_anything = model(torch.cat([x_t, x_t]), torch.cat([t, t]), both).to(x_t.dtype).chunk(2)
        return of_anything + guidance * (of_types - of_anything)

    return network


def sample_seeds(
    model: torch.nn.Module,
    scheduler: NoiseScheduler,
    seeds: Sequence[int],
    image_size: int,
    device: torch.device,
    precision: str,
    *,
    codec: Pixels | Autoencoder = Pixels(),
    batch_size: int = 64,
    types: torch.Tensor | None = None,
    x_T: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """Images [len(seeds), 3, image_size, image_size] in [-1, 1], float32 on the CPU, drawn in batches on the device.

    Image i depends on seeds[i], types[i] and x_T[i] alone. It is the same to the last bit in any batch: checked on
    CPUs, with one thread and with two, in float32 and bfloat16. A GPU may choose other kernels for another batch; there
    it was not checked.

    Args:
        codec: the space in which the model denoises; what it arrives at is decoded.
        batch_size: images at a time; fewer where the memory of a GPU is too small for that.
        types: [len(seeds), K], as in `sample`.
        x_T: [len(seeds), *codec.shape(image_size)], to begin with (noise between two noises, see `slerp`, or a noised
            picture, see `start` of `sample`); the seeds then make only the noise of the steps. None: each seed's noise.
        options: go to `sample`.

    Raises:
        ValueError: as in `sample`, and for other than one row of types or x_T a seed.
    """
    for name, given in (("types", types), ("x_T", x_T)):
        if given is not None and len(given) != len(seeds):
            raise ValueError(f"{len(given)} rows of {name} for {len(seeds)} seeds")

    def in_full_batches(function: Callable, *inputs: torch.Tensor) -> torch.Tensor:
        # On a CPU an image's last bits differ where a batch is no multiple of 4, because its rows are added up in
        # another order; and below 16 where there is one thread, because PyTorch then has another 1x1 convolution. So
        # rows are repeated up to a multiple of 8 (twice what was found necessary), or 16: one image then costs as much.
        n, multiple = len(inputs[0]), 16 if torch.get_num_threads() == 1 else 8
        rows = torch.arange(math.ceil(n / multiple) * multiple, device=device) % n
        x_t, *others = (part[rows] for part in inputs)
        with autocast(device, precision):
            return function(x_t.contiguous(memory_format=memory_format(device)), *others)[:n]

    network = functools.partial(in_full_batches, model)
    if device.type == "cuda":
        network = Recorded(network)
    options = dict(clip=codec.limit) | options
    images, i = [], 0
    while i < len(seeds):
        part = slice(i, i + batch_size)
        noise = seeded_noise(seeds[part], codec.shape(image_size), device) if x_T is None else x_T[part].to(device)
        batch_types = None if types is None else types[part]
        try:
            x_0 = sample(network, scheduler, noise, seeds=seeds[part], types=batch_types, **options)
        except torch.OutOfMemoryError:
            if len(noise) == 1:
                raise
            batch_size = len(noise) // 2  # the first pass needs as much as any, so nothing was drawn yet
            print(f"note: too little memory for {len(noise)} images at a time; going on with {batch_size}")
            continue
        images += [in_full_batches(codec.decode, few).float().cpu() for few in x_0.split(16)]
        i += batch_size
    return torch.cat(images)


def trailing_timesteps(num_timesteps: int, steps: int | None) -> list[int]:
    """`steps` timesteps, evenly spaced and falling, the first at T-1 ("trailing", Lin et al. 2024, table 2)."""
    steps = num_timesteps if steps is None else steps
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must be in 1 ... {num_timesteps}, not {steps}")
    return (np.round(num_timesteps - np.arange(steps) * (num_timesteps / steps)).astype(int) - 1).tolist()


def seeded_noise(seeds: Iterable[int], shape: tuple[int, ...], device: str | torch.device = "cpu") -> torch.Tensor:
    """Standard normal noise [B, *shape], image i from seeds[i] alone, the same on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)


def slerp(a: torch.Tensor, b: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """From a (weight 0) to b (weight 1) along the arc between them, each [..., C, H, W] with an angle of its own.

    A straight line between two noises passes through noise that is too quiet for the network; on the arc it stays as
    loud as the two are (Shoemake 1985; for diffusion Song, Meng & Ermon 2021, section 5.3). Where there is no arc,
    because they point the same way or opposite ways, it is the straight line. `weight` is a number, or a tensor that
    broadcasts.
    """
    x, y = a.flatten(-3), b.flatten(-3)
    cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    angle = cosine.clamp(-1, 1).acos()[..., None, None, None]
    arc = (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / angle.sin()
    return torch.where(angle.sin() > 1e-3, arc, (1 - weight) * a + weight * b)


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
        noise = torch.stack(noise)
        if x_T.is_cuda:  # from pinned memory nothing waits, so the CPU draws while the GPU is at its pass
            noise = noise.pin_memory()
        return noise.to(x_T.device, non_blocking=x_T.is_cuda)

    return draw
