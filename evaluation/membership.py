"""Membership: does a model predict its training images better than unseen ones, and at which noise?

    timesteps = noise_levels(scheduler, 16)
    train, unseen = (denoising_errors(model, scheduler, x, timesteps, prediction="v") for x in (x_train, x_unseen))
    detail = png_bits(train_images), png_bits(unseen_images)
    gap_by_noise(train, unseen, detail)                  # how much larger the error of unseen images is, at each level
    membership(train, unseen, detail)                    # "auc" and "found": can a single image be told to be one?

What the bits of the variational bound say in one number, split by noise level and by image. A network that has learned
what the images have in common errs equally on both kinds; one that has stored its training images predicts those
better, first at medium noise, where much of the image must be guessed but not yet all of it.

Membership inference by the loss (Carlini et al. 2023): an attacker who can run the network calls an image a training
image if its error is small. The area under the ROC curve is the probability that a training
image has a smaller error than an unseen one; the true positives at a false positive rate of 1 % are the images that
can be named with some confidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from evaluation.error_bars import Score, adjusted_difference, residuals, score_figure, widened
from evaluation.likelihood import predict_x_0
from evaluation.memorization import FALSE_ALARM_RATE
from forward_diffusion import NoiseScheduler
from utils.seeding import seed_from

MAX_LOG_SNR = 4.0  # levels lie between this and its negative: before, nothing must be guessed; beyond, all of it
RESAMPLED = 1000  # times, for the intervals
Pair = tuple[torch.Tensor, torch.Tensor]  # of the training images, and of the unseen ones


def noise_levels(scheduler: NoiseScheduler, count: int) -> list[int]:
    """Return up to `count` timesteps whose log(SNR) are evenly spaced in -4 ... 4, as far as the schedule reaches."""
    log_snr = scheduler.snr().clamp(min=1e-12).log()
    high, low = min(MAX_LOG_SNR, log_snr.max().item()), max(-MAX_LOG_SNR, log_snr.min().item())
    return sorted({(log_snr - value).abs().argmin().item() for value in torch.linspace(high, low, count)})


@torch.no_grad()
def denoising_errors(
    model: Callable[..., torch.Tensor],
    scheduler: NoiseScheduler,
    x_0: torch.Tensor,
    timesteps: Sequence[int],
    *,
    prediction: str,
    latent_range: float = 1.0,
    labels: torch.Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    callback: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Return the logarithm of the mean squared error of the predicted x_0, float64 [N, len(timesteps)].

    Args:
        model: any callable (x_t, t[, labels]) -> output, what it means is `prediction`.
        x_0: float32 [N, C, H, W], images or latents.
        latent_range: predictions are clipped to -latent_range ... latent_range.
        labels: [N, K], the classes of each image; None for a model without.
        seed: the noise of image i at a level depends on (seed, i, level), so different models get the same.
        callback: called after each batch with the number of its passes.
    """
    errors = torch.empty(len(x_0), len(timesteps), dtype=torch.float64)
    for level, timestep in enumerate(timesteps):
        for low in range(0, len(x_0), batch_size):
            part = slice(low, low + batch_size)
            x = x_0[part].to(device)
            t = torch.full((len(x),), timestep, device=device)
            noise = torch.stack([_noise(x_0.shape[1:], seed, i, level) for i in range(low, low + len(x))]).to(device)
            part_labels = None if labels is None else labels[part].to(device)
            predicted = predict_x_0(model, scheduler, prediction, x, t, noise, part_labels)
            error = predicted.clamp(-latent_range, latent_range) - x
            errors[part, level] = error.double().square().mean(dim=(1, 2, 3)).clamp(min=1e-12).log().cpu()
            if callback is not None:
                callback(len(x))
    return errors


def _noise(shape: torch.Size, seed: int, image: int, level: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed_from(seed, image, level, stream="membership"))
    return torch.randn(shape, generator=generator)


def gap_by_noise(train: torch.Tensor, unseen: torch.Tensor, detail: Pair) -> list[dict[str, float]]:
    """Return for each noise level how much larger the error of unseen images is, as a figure (0.1 is a tenth).

    Args:
        train, unseen: the results of `denoising_errors`.
        detail: a number for each training and each unseen image, such as `png_bits`, whose influence is removed.
    """
    figures = []
    for level in range(train.shape[1]):
        difference, error = adjusted_difference(train[:, level], unseen[:, level], detail)
        figure = score_figure(Score(difference, error))
        figures.append({name: math.expm1(value) for name, value in figure.items()})
    return figures


def membership(train: torch.Tensor, unseen: torch.Tensor, detail: Pair) -> tuple[dict[str, dict], float]:
    """Measure how well the error tells training images from unseen ones.

    The score of an image is its log error, averaged over the noise levels, less what its detail predicts for any image.
    Neither knows which kind it is, so a model that has seen neither set gives an AUC of 0.5.

    The threshold for "found" is the k-th smallest score of the n unseen images, k = floor(0.01 (n + 1)) or 1: an image
    that was not trained on falls below it with probability k / (n + 1), whatever the distribution of the scores.

    Args:
        as for `gap_by_noise`.

    Returns:
        figures: "auc", and "found", the fraction of training images below the threshold; the intervals are those of a
            bootstrap over both sets.
        false_positive_rate: k / (n + 1).
    """
    scores = residuals(torch.cat([train, unseen]).mean(dim=1), torch.cat(detail))
    members, others = scores[: len(train)], scores[len(train) :]
    k = max(1, math.floor(FALSE_ALARM_RATE * (len(others) + 1)))
    generator = torch.Generator().manual_seed(seed_from(len(members), len(others), stream="membership"))

    def draw(values: torch.Tensor) -> torch.Tensor:
        return values[torch.randint(len(values), (RESAMPLED, len(values)), generator=generator)]

    figures = {}
    values, resampled = _roc(members[None], others[None], k), _roc(draw(members), draw(others), k)
    for name, value, drawn in zip(("auc", "found"), values, resampled):
        low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
        figures[name] = widened(dict(value=value.item(), low=low, high=high), min(len(members), len(others)))
    return figures, k / (len(others) + 1)


def _roc(members: torch.Tensor, others: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the AUC, and the fraction of members below the k-th smallest of the others, of B pairs of sets: [B] each.

    Args:
        members, others: [B, N] and [B, M].
    """
    others = others.sort(dim=1).values
    below = torch.searchsorted(others, members.contiguous(), right=False)
    up_to = torch.searchsorted(others, members.contiguous(), right=True)  # of equals, half count
    auc = 1 - (below + up_to).double().mean(dim=1) / (2 * others.shape[1])
    found = (members < others[:, k - 1 : k]).double().mean(dim=1)
    return auc, found
