"""The forward process of a diffusion model: noise schedules, q(x_t | x_0), and conversions between eps, v and x_0.

DIFFUSION_THEORY.md derives every line of this file. `python -m tools.plot_forward` plots an image on its way to noise
and the curves of both schedules.
"""

from __future__ import annotations

import math

import torch

SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("eps", "v", "x0")
LOSS_WEIGHTINGS = ("uniform", "min_snr")


class NoiseScheduler:
    """The forward process q of Ho et al. (2020), and the conversions between eps, v and x_0.

    A timestep t is an integer in 0 ... T-1 where 0 has the least noise. Images are floating-point tensors
    [B, C, H, W] in [-1, 1]; `t` is an integer tensor [B] on the images' device.

    Args:
        num_timesteps: T, from 2 to a million.
        beta_start, beta_end: the ends of the linear schedule, 0 < beta_start <= beta_end < 1; the cosine one has none.
        schedule: "linear" (Ho et al. 2020, section 4) or "cosine" (Nichol & Dhariwal 2021, eq. 17).
        zero_terminal_snr: rescale the schedule so that x_T is noise alone (Lin et al. 2024, algorithm 1). Noise says
            nothing about the image there, so "eps" cannot be sampled from T-1.

    Attributes:
        betas, alphas, alphas_cumprod, alphas_cumprod_prev: float32 tensors [T] on the CPU, computed in float64.

    Raises:
        ValueError: for an unknown schedule, or numbers outside of the ranges above.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        schedule: str = "linear",
        zero_terminal_snr: bool = False,
    ):
        if not 2 <= num_timesteps <= 1_000_000:
            raise ValueError(f"num_timesteps must be from 2 to 1,000,000, not {num_timesteps}")
        if schedule == "linear":
            if not 0 < beta_start <= beta_end < 1:
                raise ValueError(f"betas must satisfy 0 < start <= end < 1, not {beta_start} and {beta_end}")
            betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        elif schedule == "cosine":
            betas = _cosine_betas(num_timesteps)
        else:
            raise ValueError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
        self.num_timesteps, self.beta_start, self.beta_end = num_timesteps, beta_start, beta_end
        self.schedule, self.zero_terminal_snr = schedule, zero_terminal_snr

        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if alphas_cumprod[-1] < 1e-300:
            raise ValueError(f"{num_timesteps} timesteps of the {schedule} schedule are more than float64 can hold; "
                             f"choose fewer")
        if zero_terminal_snr:
            alphas_cumprod = _end_at_noise(alphas_cumprod)
            betas = 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        self.betas = betas.float()
        self.alphas = (1 - betas).float()
        self.alphas_cumprod = alphas_cumprod.float()
        self.alphas_cumprod_prev = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])

        # The masters stay in float64: 1 - alpha-bar at t = 0 is 1e-4, and taking it from a float32 alpha-bar would
        # leave three correct digits of it. Each use gets a copy on its own device in its own precision.
        self._tables = {
            "alphas_cumprod": alphas_cumprod,
            "signal": alphas_cumprod.sqrt(),
            "noise": (1 - alphas_cumprod).sqrt(),
        }
        self._copies: dict[tuple, torch.Tensor] = {}

    def config(self) -> dict:
        """Plain values that build this scheduler again: `NoiseScheduler(**scheduler.config())`."""
        names = ("num_timesteps", "beta_start", "beta_end", "schedule", "zero_terminal_snr")
        return {name: getattr(self, name) for name in names}

    def alpha_bar(self, t: int) -> float:
        """alpha-bar at one timestep, in float64; t = -1 is the clean image, where it is 1."""
        if not -1 <= t < self.num_timesteps:
            raise ValueError(f"timestep {t} is outside of -1 ... {self.num_timesteps - 1}")
        return 1.0 if t == -1 else self._tables["alphas_cumprod"][t].item()

    def snr(self) -> torch.Tensor:
        """Signal-to-noise ratio alpha-bar / (1 - alpha-bar) at every timestep, float64 [T] (Kingma et al. 2021)."""
        return (self._tables["signal"] / self._tables["noise"]) ** 2

    def add_noise(self, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A draw from q(x_t | x_0) in one jump (Ho et al. 2020, eq. 4); `noise` is standard normal, shaped as x_0."""
        signal, sigma = self._coefficients(t, x_0)
        return signal * x_0 + sigma * noise

    # What the network's output means is known here and nowhere else. With a = sqrt(alpha-bar_t) and
    # b = sqrt(1 - alpha-bar_t), so that a^2 + b^2 = 1 and x_t = a x_0 + b eps, any one of the three
    # gives the other two:   v = a eps - b x_0   (Salimans & Ho 2022, appendix D).

    def target(self, prediction: str, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the network should answer for x_t = add_noise(x_0, t, noise); `prediction` is "eps", "v" or "x0"."""
        if prediction == "eps":
            return noise
        if prediction == "x0":
            return x_0
        if prediction == "v":
            signal, sigma = self._coefficients(t, x_0)
            return signal * noise - sigma * x_0
        raise _unknown_prediction(prediction)

    def loss_weight(self, weighting: str, prediction: str, t: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
        """What each image's squared error of the network's output counts, float32 [B].

        "uniform" is the simple loss of Ho et al. (2020, eq. 14): always 1. "min_snr" makes the error of the clean image
        count min(SNR, gamma) (Hang et al. 2023, with their gamma of 5), whatever the network predicts: the nearly clean
        images, where there is least to learn, no longer outweigh the rest.
        """
        if prediction not in PREDICTIONS:
            raise _unknown_prediction(prediction)
        if weighting == "uniform":
            return torch.ones(len(t), device=t.device)
        if weighting != "min_snr":
            raise ValueError(f"unknown loss weighting {weighting!r}: choose one of {', '.join(LOSS_WEIGHTINGS)}")
        signal, sigma = self._coefficients(t, torch.empty(len(t), device=t.device))
        snr = (signal / sigma) ** 2
        if prediction == "eps":
            return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, which has a limit, 1, where the SNR is 0
        return snr.clamp(max=gamma) / (snr + 1 if prediction == "v" else 1)

    def to_x_0(self, prediction: str, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The clean image that the network's `output` at x_t stands for, not clipped.

        Raises:
            ValueError: for an unknown prediction, or for "eps" where alpha-bar is 0 and the noise leaves x_0 open.
        """
        signal, sigma = self._coefficients(t, x_t)
        if prediction == "eps":
            if self.zero_terminal_snr and (t == self.num_timesteps - 1).any():
                raise ValueError(f"prediction 'eps' leaves the image open at timestep {self.num_timesteps - 1}, which "
                                 "has zero terminal SNR: choose v or x0")
            return (x_t - sigma * output) / signal
        if prediction == "v":
            return signal * x_t - sigma * output
        if prediction == "x0":
            return output
        raise _unknown_prediction(prediction)

    def to_eps(self, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | int) -> torch.Tensor:
        """The noise that makes x_t out of x_0: eq. 4 of Ho et al. (2020) solved for it. `t` may be a single integer."""
        signal, sigma = self._coefficients(t, x_t)
        return (x_t - signal * x_0) / sigma

    def _coefficients(self, t: torch.Tensor | int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(alpha-bar_t) and sqrt(1 - alpha-bar_t), [B, 1, 1, 1], with the device and dtype of `like`; B = 1 for
        a single integer t."""
        tables = []
        for name in ("signal", "noise"):
            key = (name, like.device, like.dtype)
            if key not in self._copies:  # copied once, so that the training loop never waits for the transfer
                self._copies[key] = self._tables[name].to(like.dtype).to(like.device)
            tables.append(self._copies[key][t].view(-1, *[1] * (like.dim() - 1)))
        return tables[0], tables[1]


def _cosine_betas(num_timesteps: int, offset: float = 0.008, largest: float = 0.999) -> torch.Tensor:
    """beta of the cosine schedule, float64 [T] (Nichol & Dhariwal 2021, eq. 17 with s = 0.008, and its clip)."""
    steps = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((steps + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=largest)  # without the clip the last beta is 1, and eps would divide by 0


def _end_at_noise(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """alpha-bar, float64 [T], with its square root shifted and scaled: the last is 0, the first stays what it was."""
    signal = alphas_cumprod.sqrt()
    return ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2


def _unknown_prediction(prediction: str) -> ValueError:
    return ValueError(f"unknown prediction {prediction!r}: choose one of {', '.join(PREDICTIONS)}")
