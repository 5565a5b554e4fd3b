"""Error bars, in cases whose answer is known."""

import math

import numpy as np
import pytest
import torch

from evaluation.error_bars import (
    Score,
    fraction_figure,
    jackknife_error,
    mean_figure,
    score_figure,
    standard_error,
    wilson_interval,
)


def test_jackknife_error_of_a_mean_is_its_standard_error():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = torch.stack([values[torch.arange(40) != i].mean() for i in range(40)])
    assert jackknife_error(means).item() == pytest.approx(standard_error(values), rel=1e-12)


def test_jackknife_error_takes_lists_arrays_and_any_axis():
    values = np.random.default_rng(0).normal(size=(8, 3))
    expected = np.sqrt(7 / 8 * ((values - values.mean(axis=0)) ** 2).sum(axis=0))
    assert jackknife_error(values).numpy() == pytest.approx(expected, rel=1e-12)
    assert jackknife_error(values.T, axis=1).numpy() == pytest.approx(expected, rel=1e-12)
    assert float(jackknife_error(values[:, 0].tolist())) == pytest.approx(expected[0], rel=1e-12)


@pytest.mark.parametrize("count, n, low, high", [(0, 100, 0.0, 0.037), (50, 100, 0.404, 0.596), (100, 100, 0.963, 1.0)])
def test_wilson_interval_agrees_with_tables(count, n, low, high):
    assert wilson_interval(count, n) == pytest.approx((count / n, low, high), abs=5e-4)


def test_figures_have_an_interval_where_the_error_is_known():
    assert score_figure(Score(2.0, math.nan)) == dict(value=2.0)
    assert score_figure(Score(2.0, 1.0)) == dict(value=2.0, low=2 - 1.96, high=2 + 1.96)
    assert mean_figure(torch.tensor([3.0])) == dict(value=3.0)
    assert mean_figure(torch.tensor([1.0, 3.0])) == dict(value=2.0, low=2 - 1.96, high=2 + 1.96)
    assert fraction_figure(torch.tensor([True, False]))["value"] == 0.5
