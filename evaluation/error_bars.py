"""Error bars: standard errors, confidence intervals, and how a figure of the report is stored.

A figure is a dict of plain values: "value", and the ends "low" and "high" of its 95 % interval where that is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

Z_95 = 1.96  # a normal variable is within so many standard deviations of its mean with 95 % probability


@dataclass
class Score:
    """A measured value and its standard error (NaN where it is unknown)."""

    value: float
    error: float


def standard_error(values: torch.Tensor) -> float:
    """Return the standard error of the mean of `values` [N]; NaN for fewer than two."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan


def jackknife_error(without_each_group: torch.Tensor | np.ndarray | Sequence[float], axis: int = 0) -> torch.Tensor:
    """Return the standard error of a statistic by the delete-a-group jackknife (Efron & Stein 1981).

    Args:
        without_each_group: the statistic of all data but one group, for each of G groups of about the same size along
            `axis`; other axes hold other statistics.

    Returns:
        float64, without that axis.
    """
    values = torch.as_tensor(without_each_group, dtype=torch.float64)
    return ((values.shape[axis] - 1) * values.var(dim=axis, unbiased=False)).sqrt()


def wilson_interval(count: int, total: int, z: float = Z_95) -> tuple[float, float, float]:
    """Return a proportion and its 95 % interval, (fraction, low, high) (Wilson 1927).

    The interval stays within [0, 1] and also holds for proportions near 0 and 1. With a total of 0 the fraction is NaN.
    """
    if total == 0:
        return math.nan, 0.0, 1.0
    fraction = count / total
    middle = (fraction + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(fraction * (1 - fraction) / total + z**2 / (4 * total**2))
    return fraction, max(0.0, middle - half), min(1.0, middle + half)


# ---------------------------------------------------------------------------------------------------------------------
# removing the influence of a covariate


def residuals(values: torch.Tensor, covariate: torch.Tensor) -> torch.Tensor:
    """Return what is left of `values` [N] after a linear regression on `covariate` [N], float64."""
    x = covariate.double() - covariate.double().mean()
    design = torch.stack([torch.ones_like(x), x], dim=1)
    return values.double() - design @ (torch.linalg.pinv(design) @ values.double())


def adjusted_difference(first: torch.Tensor, second: torch.Tensor, covariate: tuple[torch.Tensor, torch.Tensor]
                        ) -> tuple[float, float]:
    """Return how much larger the mean of `second` [M] is than that of `first` [N], and its standard error.

    The influence of a covariate, a number for each value of either, is removed by a linear regression with a common
    slope (analysis of covariance). The error allows for unequal variances (White 1980).
    """
    y, x = torch.cat([first, second]).double(), torch.cat(covariate).double()
    is_second = torch.cat([torch.zeros(len(first)), torch.ones(len(second))]).double()
    design = torch.stack([torch.ones_like(x), is_second, x - x.mean()], dim=1)
    inverse = torch.linalg.pinv(design)  # [3, N + M]
    coefficients = inverse @ y
    residual = (y - design @ coefficients) * (len(y) / max(1, len(y) - 3)) ** 0.5
    return coefficients[1].item(), ((inverse[1] * residual) ** 2).sum().sqrt().item()


# ---------------------------------------------------------------------------------------------------------------------
# figures of the report


def score_figure(score: Score) -> dict[str, float]:
    """Return a score as a figure; without an interval where its error is unknown."""
    if math.isnan(score.error):
        return dict(value=score.value)
    return dict(value=score.value, low=score.value - Z_95 * score.error, high=score.value + Z_95 * score.error)


def mean_figure(values: torch.Tensor) -> dict[str, float]:
    """Return the mean of `values` [N] as a figure."""
    return score_figure(Score(values.mean().item(), standard_error(values)))


def widened(figure: dict[str, float], total: int) -> dict[str, float]:
    """Limit a fraction's interval to [0, 1], and make it at least as wide as the Wilson interval of `total` images.

    Resampling gives no error at all for a fraction of exactly 0 or 1.
    """
    _, low, high = wilson_interval(round(figure["value"] * total), total)
    return dict(value=figure["value"], low=max(0.0, min(low, figure["low"])), high=min(1.0, max(high, figure["high"])))


def fraction_figure(mask: torch.Tensor) -> dict[str, float]:
    """Return the fraction of true elements of `mask`, bool [N], as a figure."""
    fraction, low, high = wilson_interval(mask.sum().item(), len(mask))
    return dict(value=fraction, low=low, high=high)
