"""tools/theory_figures.py: what is computed for the figures, and that they are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian import MEAN, STD
from PIL import Image
from scripts import call

from forward_diffusion import NoiseScheduler
from tools import theory_figures
from unet import UNet, UNetConfig
from utils import plots


@pytest.mark.parametrize("schedule, sampler, steps, error", [
    ("linear", "ddim", 100, 0.0140), ("linear", "dpm++", 100, 0.0039), ("cosine", "ddim", 100, 0.0073),
    ("cosine", "dpm++", 20, 0.015),
])
def test_the_errors_are_those_of_the_page(schedule, sampler, steps, error):
    assert theory_figures.MEAN.flatten().equal(MEAN.flatten()) and theory_figures.STD.flatten().equal(STD.flatten())
    measured = theory_figures.error_after(NoiseScheduler(schedule=schedule), sampler, steps)
    assert measured == pytest.approx(error, abs=0.00006 if steps == 100 else 0.0005)


def test_the_weights_are_those_of_the_scheduler():
    scheduler = NoiseScheduler()
    weights, snr = theory_figures.loss_weights(scheduler), scheduler.snr().numpy()[1:]
    t = torch.arange(1, 1000)  # in the code's count
    for prediction, weight_of_output in (("eps", snr), ("v", snr + 1), ("x0", np.ones_like(snr))):
        uniform = scheduler.loss_weight("uniform", prediction, t).numpy()
        min_snr = scheduler.loss_weight("min_snr", prediction, t).numpy()
        assert np.allclose(weights[prediction], uniform * weight_of_output)
        assert np.allclose(weights["min-SNR"], min_snr * weight_of_output, rtol=1e-4)
    bound = weights["the bound"] / snr
    assert [round(bound[t - 2], 3) for t in (2, 10, 100, 350, 1000)] == [0.6, 0.086, 0.01, 0.005, 0.01]


def test_the_true_step_and_the_gaussian_have_one_mean():
    """The posterior's mean is linear in x_0, so only the shape of ddpm's step is approximate."""
    x = torch.linspace(-4, 4, 4001)
    for s in (390, 300, 100):
        truth, approximations = theory_figures.step_densities(x, 400, s)
        for density in (truth, *approximations.values()):
            assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-3)
            assert torch.trapezoid(x * density, x).item() == pytest.approx(
                torch.trapezoid(x * truth, x).item(), abs=1e-3)


def test_the_shapes_are_those_of_the_network():
    with torch.device("meta"):
        model = UNet(UNetConfig(width=8, multipliers=(1, 2, 3), blocks=1, groups=4))
    down, middle, up = theory_figures.level_shapes(model, 16)
    assert [tuple(shape[1:]) for shape in down] == [(8, 16, 16), (16, 8, 8), (24, 4, 4)]
    assert tuple(middle[1:]) == (24, 4, 4) and up == down[::-1]


def test_figures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "DPI", 60)
    for name in ("spikes", "orders"):  # which take seconds
        monkeypatch.delitem(theory_figures.FIGURES, name)
    assert call(theory_figures, "--output", tmp_path / "a") == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"a_{name}.png" for name in theory_figures.FIGURES}
    for path in tmp_path.iterdir():
        darkest, brightest = Image.open(path).convert("L").getextrema()
        assert darkest < 100 and brightest == 255 and path.stat().st_size < 300_000
