"""The forward process: noise schedules, q(x_t | x_0), and conversions between eps, v and x_0.

    scheduler = NoiseScheduler(schedule="cosine")
    x_t = scheduler.add_noise(x_0, t, torch.randn_like(x_0))

DIFFUSION_THEORY.md derives every formula of this file. `python -m tools.plot_forward` plots an image at increasing
timesteps and the curves of both schedules.
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
        beta_start, beta_end: first and last beta of the linear schedule, 0 < beta_start <= beta_end < 1; the cosine
            schedule ignores them.
        schedule: "linear" (Ho et al. 2020, section 4) or "cosine" (Nichol & Dhariwal 2021, eq. 17).
        zero_terminal_snr: rescale the schedule so that x_{T-1} is pure noise (Lin et al. 2024, algorithm 1). Its eps
            does not determine x_0, so a model that predicts eps cannot be sampled from T-1.

    Attributes:
        betas, alphas, alphas_cumprod, alphas_cumprod_prev: float32 tensors [T] on the CPU, computed in float64.

    Raises:
        ValueError: for an unknown schedule, or a number out of its range.
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

        # Compute alpha-bar.
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if alphas_cumprod[-1] < 1e-300:
            raise ValueError(f"{num_timesteps} timesteps of the {schedule} schedule are more than float64 can hold; "
                             f"choose fewer")
        if zero_terminal_snr:
            alphas_cumprod = _rescale_to_zero_snr(alphas_cumprod)
            betas = 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])

        # Publish the tables in float32.
        self.betas = betas.float()
        self.alphas = (1 - betas).float()
        self.alphas_cumprod = alphas_cumprod.float()
        self.alphas_cumprod_prev = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])

        # Keep the originals in float64: 1 - alpha-bar is 1e-4 at t = 0, so a float32 alpha-bar would give it only three
        # correct digits. `_coefficients` copies them to each device and precision that is used.
        self._tables = {
            "alphas_cumprod": alphas_cumprod,
            "signal": alphas_cumprod.sqrt(),
            "noise": (1 - alphas_cumprod).sqrt(),
        }
        self._tables["log_noise_levels"] = (self._tables["noise"] / self._tables["signal"]).log()
        self._copies: dict[tuple, torch.Tensor] = {}

    def config(self) -> dict[str, int | float | str | bool]:
        """Return the arguments that build an equal scheduler: `NoiseScheduler(**scheduler.config())`."""
        names = ("num_timesteps", "beta_start", "beta_end", "schedule", "zero_terminal_snr")
        return {name: getattr(self, name) for name in names}

    def alpha_bar(self, t: int) -> float:
        """Return alpha-bar at one timestep in float64; t = -1 is the clean image, where it is 1.

        Raises:
            ValueError: for a timestep outside of -1 ... T-1.
        """
        if not -1 <= t < self.num_timesteps:
            raise ValueError(f"timestep {t} is outside of -1 ... {self.num_timesteps - 1}")
        return 1.0 if t == -1 else self._tables["alphas_cumprod"][t].item()

    def snr(self) -> torch.Tensor:
        """Return the signal-to-noise ratio alpha-bar / (1 - alpha-bar), float64 [T] (Kingma et al. 2021)."""
        return (self._tables["signal"] / self._tables["noise"]) ** 2

    def log_noise_levels(self, device: torch.device) -> torch.Tensor:
        """Return ln(sqrt(1 - alpha-bar_t) / sqrt(alpha-bar_t)) of every timestep, rising, float32 [T]."""
        return self._copy("log_noise_levels", device, torch.float32)

    def add_noise(self, x_0: torch.Tensor, t: torch.Tensor | int, noise: torch.Tensor) -> torch.Tensor:
        """Draw from q(x_t | x_0) in one jump (Ho et al. 2020, eq. 4).

        Args:
            x_0: clean images [B, C, H, W], in any floating-point precision.
            t: timesteps [B], or one integer for all.
            noise: standard normal, in the shape of x_0.
        """
        signal, sigma = self._coefficients(t, x_0)
        return signal * x_0 + sigma * noise

    def add_more_noise(self, x_s: torch.Tensor, s: int, t: int, noise: torch.Tensor) -> torch.Tensor:
        """Draw from q(x_t | x_s) for s < t: noisy images [B, C, H, W] get noisier (Ho et al. 2020, eq. 2, repeated)."""
        alpha = self.alpha_bar(t) / self.alpha_bar(s)
        return alpha**0.5 * x_s + (1 - alpha) ** 0.5 * noise

    # -----------------------------------------------------------------------------------------------------------------
    # predictions: all conversions between eps, v and x_0 are here
    #
    # With a = sqrt(alpha-bar_t) and b = sqrt(1 - alpha-bar_t), a^2 + b^2 = 1 and x_t = a x_0 + b eps. v is defined as
    # v = a eps - b x_0 (Salimans & Ho 2022, appendix D), so x_t and any one of the three give the other two.

    def target(self, prediction: str, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the regression target of the network at x_t = add_noise(x_0, t, noise), in the shape of x_0.

        Args:
            prediction: "eps", "v" or "x0".

        Raises:
            ValueError: for an unknown prediction.
        """
        if prediction == "eps":
            return noise
        if prediction == "x0":
            return x_0
        if prediction == "v":
            signal, sigma = self._coefficients(t, x_0)
            return signal * noise - sigma * x_0
        raise _unknown_prediction(prediction)

    def loss_weight(self, weighting: str, prediction: str, t: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
        """Return the weight of each image's squared error, float32 [B].

        "uniform" is 1, the simple loss of Ho et al. (2020, eq. 14). "min_snr" weights the squared error of x_0 by
        min(SNR, gamma), whatever the network predicts (Hang et al. 2023, with their gamma of 5), so that nearly clean
        images, from which there is least to learn, do not dominate the loss.

        Args:
            weighting: "uniform" or "min_snr".
            prediction: "eps", "v" or "x0": what the squared error is of.
            t: timesteps [B].

        Raises:
            ValueError: for an unknown weighting or prediction.
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
            return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, whose limit for SNR = 0 is 1
        return snr.clamp(max=gamma) / {"v": snr + 1, "x0": 1}[prediction]

    def to_x_0(self, prediction: str, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the clean images that the network's `output` at x_t implies, not clipped, in the shape of x_t.

        Args:
            prediction: what the output is: "eps", "v" or "x0".
            output: of the network, in the shape of x_t.
            t: timesteps [B].

        Raises:
            ValueError: for an unknown prediction, or for "eps" where alpha-bar is 0 and eps does not determine x_0.
        """
        signal, sigma = self._coefficients(t, x_t)
        if prediction == "eps":
            if self.zero_terminal_snr and (t == self.num_timesteps - 1).any():
                raise ValueError(f"prediction 'eps' does not determine x_0 at timestep {self.num_timesteps - 1}, which "
                                 "has zero terminal SNR: choose v or x0")
            return (x_t - sigma * output) / signal
        if prediction == "v":
            return signal * x_t - sigma * output
        if prediction == "x0":
            return output
        raise _unknown_prediction(prediction)

    def to_eps(self, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | int) -> torch.Tensor:
        """Return the noise between x_0 and x_t: eq. 4 of Ho et al. (2020) solved for eps.

        Args:
            t: timesteps [B], or one integer for all.
        """
        signal, sigma = self._coefficients(t, x_t)
        return (x_t - signal * x_0) / sigma

    def _coefficients(self, t: torch.Tensor | int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sqrt(alpha-bar_t) and sqrt(1 - alpha-bar_t), [B, 1, 1, 1], in the device and dtype of `like`.

        B is 1 for a single integer t.
        """
        if isinstance(t, int) and not 0 <= t < self.num_timesteps:
            raise ValueError(f"timestep {t} is outside of 0 ... {self.num_timesteps - 1}")
        signal, noise = (self._copy(name, like.device, like.dtype)[t].view(-1, *[1] * (like.dim() - 1))
                         for name in ("signal", "noise"))
        return signal, noise

    def _copy(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return a table on a device. It is copied once: the training loop must not wait for that in each step."""
        key = (name, device, dtype)
        if key not in self._copies:
            self._copies[key] = self._tables[name].to(dtype).to(device)
        return self._copies[key]


def _cosine_betas(num_timesteps: int, offset: float = 0.008, largest: float = 0.999) -> torch.Tensor:
    """Return the betas of the cosine schedule, float64 [T] (Nichol & Dhariwal 2021, eq. 17 and its clip)."""
    steps = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((steps + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=largest)  # the last beta is 1 without the clip, and eps would be divided by 0


def _rescale_to_zero_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Shift and scale the square root of alpha-bar, float64 [T]: the last becomes 0, the first stays the same."""
    signal = alphas_cumprod.sqrt()
    return ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2


def _unknown_prediction(prediction: str) -> ValueError:
    return ValueError(f"unknown prediction {prediction!r}: choose one of {', '.join(PREDICTIONS)}")
